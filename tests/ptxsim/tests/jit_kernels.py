"""Triton kernels with what such kernels use. Names in capitals are Triton's custom for pointers and constexprs."""

# ruff: noqa: N803, E741
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def softmax(X, Y, N, stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    m = o < N
    x = tl.load(X + r * stride + o, mask=m, other=-float("inf")).to(tl.float32)
    x = x - tl.max(x, 0)
    e = tl.exp(x)
    y = e / tl.sum(e, 0)
    tl.store(Y + r * stride + o, y.to(Y.dtype.element_ty), mask=m)


@triton.jit
def online_lse(X, L, T, ids, N, stride, BLOCK: tl.constexpr):
    """Online log-sum-exp over chunks, with the logit of one target id."""
    r = tl.program_id(0)
    t = tl.load(ids + r)
    m, s, xt = -float("inf"), 0.0, 0.0
    for k in range(0, N, BLOCK):
        o = k + tl.arange(0, BLOCK)
        x = tl.load(X + r.to(tl.int64) * stride + o, mask=o < N, other=-float("inf")).to(tl.float32)
        nm = tl.maximum(m, tl.max(x, 0))
        s = s * tl.exp(m - nm) + tl.sum(tl.exp(x - nm), 0)
        m = nm
        xt += tl.sum(tl.where(o == t, x, 0.0), 0)
    tl.store(L + r, m + tl.log(s))
    tl.store(T + r, xt)


@triton.jit
def while_sum(X, Y, N, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    acc = tl.zeros((BLOCK,), tl.float32)
    k = r * BLOCK
    while k < N:
        o = k + tl.arange(0, BLOCK)
        acc += tl.load(X + o, mask=o < N, other=0.0)
        k += tl.num_programs(0) * BLOCK
    tl.atomic_add(Y, tl.sum(acc, 0))


@triton.jit
def atomics(X, I, F, G, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    x = tl.load(X + o, mask=m, other=0)
    tl.atomic_add(I + x, 1, mask=m)
    tl.atomic_add(F + x, o.to(tl.float32), mask=m)
    tl.atomic_max(G, tl.max(x, 0))
    tl.atomic_min(G + 1, tl.min(tl.where(m, x, 1 << 30), 0))
    old = tl.atomic_add(G + 2, 1)
    tl.store(G + 8 + old, tl.program_id(0))


@triton.jit
def topk(X, Y, N: tl.constexpr, K: tl.constexpr):
    r = tl.program_id(0)
    x = tl.load(X + r * N + tl.arange(0, N))
    tl.store(Y + r * K + tl.arange(0, K), tl.topk(x, K))


@triton.jit
def sort(X, Y, N: tl.constexpr, DESC: tl.constexpr):
    r = tl.program_id(0)
    x = tl.load(X + r * N + tl.arange(0, N))
    tl.store(Y + r * N + tl.arange(0, N), tl.sort(x, descending=DESC))


@triton.jit
def argmax(X, V, I, N, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    x = tl.load(X + r * N + o, mask=o < N, other=-float("inf"))
    v, i = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(V + r, v)
    tl.store(I + r, i)


@triton.jit
def argmax_loop(X, I, N, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    best, bi = -float("inf"), 0
    for k in range(0, N, BLOCK):
        o = k + tl.arange(0, BLOCK)
        x = tl.load(X + r * N + o, mask=o < N, other=-float("inf")).to(tl.float32)
        v, i = tl.max(x, 0, return_indices=True)
        bi = tl.where(v > best, i + k, bi)
        best = tl.maximum(v, best)
    tl.store(I + r, bi)


@triton.jit
def colsum(X, Y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for k in range(0, M, BM):
        r = k + tl.arange(0, BM)
        x = tl.load(X + r[:, None] * N + c[None, :], mask=(r[:, None] < M) & (c[None, :] < N), other=0.0)
        acc += tl.sum(x.to(tl.float32), 0)
    tl.store(Y + c, acc, mask=c < N)


@triton.jit
def rowcol(X, R, C, BM: tl.constexpr, BN: tl.constexpr):
    """Both reductions of one 2D tile, and its transpose written back."""
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    x = tl.load(X + r[:, None] * BN + c[None, :])
    tl.store(R + r, tl.sum(x, 1))
    tl.store(C + c, tl.max(x, 0))


@triton.jit
def transpose(X, Y, BM: tl.constexpr, BN: tl.constexpr):
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    x = tl.load(X + r[:, None] * BN + c[None, :])
    tl.store(Y + c[:, None] * BM + r[None, :], tl.trans(x))


@triton.jit
def mul_(a, b):
    return a * b


@triton.jit
def linrec_(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def scans(X, S, P, L, N: tl.constexpr):
    r = tl.program_id(0)
    o = tl.arange(0, N)
    x = tl.load(X + r * N + o)
    tl.store(S + r * N + o, tl.cumsum(x, 0))
    tl.store(P + r * N + o, tl.associative_scan(x, 0, mul_))
    _, b = tl.associative_scan((x, x), 0, linrec_)
    tl.store(L + r * N + o, b)


@triton.jit
def elementwise(X, Y, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    x = tl.load(X + o, mask=m, other=1.0)
    a = tl.abs(x) + 0.5
    tl.store(Y + 0 * N + o, tl.exp(x), mask=m)
    tl.store(Y + 1 * N + o, tl.log(a), mask=m)
    tl.store(Y + 2 * N + o, tl.sqrt(a), mask=m)
    tl.store(Y + 3 * N + o, tl.rsqrt(a), mask=m)
    tl.store(Y + 4 * N + o, tl.sigmoid(x), mask=m)
    tl.store(Y + 5 * N + o, libdevice.tanh(x), mask=m)
    tl.store(Y + 6 * N + o, tl.erf(x), mask=m)
    tl.store(Y + 7 * N + o, tl.ceil(x), mask=m)
    tl.store(Y + 8 * N + o, tl.maximum(x, a), mask=m)
    tl.store(Y + 9 * N + o, tl.floor(x), mask=m)
    tl.store(Y + 10 * N + o, tl.exp2(x), mask=m)
    tl.store(Y + 11 * N + o, tl.log2(a), mask=m)
    tl.store(Y + 12 * N + o, libdevice.log1p(a), mask=m)
    tl.store(Y + 13 * N + o, libdevice.expm1(x), mask=m)
    tl.store(Y + 14 * N + o, libdevice.pow(a, x), mask=m)
    tl.store(Y + 15 * N + o, x / a, mask=m)


@triton.jit
def intops(X, Y, Z, N, D, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    x = tl.load(X + o, mask=m, other=1)
    tl.store(Y + 0 * N + o, x // D, mask=m)
    tl.store(Y + 1 * N + o, x % D, mask=m)
    tl.store(Y + 2 * N + o, (x << 3) ^ (x >> 5), mask=m)
    tl.store(Y + 3 * N + o, tl.minimum(x, D), mask=m)
    tl.store(Y + 4 * N + o, tl.umulhi(x.to(tl.uint32), 0x9E3779B9).to(tl.int32), mask=m)
    tl.store(Z + o, x.to(tl.int64) * x.to(tl.int64) // 7, mask=m)


@triton.jit
def philox(Y, seed, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + o, tl.rand(seed, o), mask=o < N)


@triton.jit
def casts(X, H, B, D, I, N, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(X + o, mask=o < N, other=0.0)
    tl.store(H + o, x.to(tl.float16), mask=o < N)
    tl.store(B + o, x.to(tl.bfloat16), mask=o < N)
    tl.store(D + o, x.to(tl.float64), mask=o < N)
    tl.store(I + o, x.to(tl.int32), mask=o < N)


@triton.jit
def policies(X, Y, N, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.range(0, N, BLOCK, num_stages=STAGES):
        o = k + tl.arange(0, BLOCK)
        acc += tl.load(X + o, mask=o < N, other=0.0, eviction_policy="evict_first")
        acc += tl.load(X + o, mask=o < N, other=0.0, cache_modifier=".cg")
    tl.store(Y, tl.sum(acc, 0), eviction_policy="evict_last")
    tl.store(Y + 1, tl.sum(acc, 0), cache_modifier=".wt")


@triton.jit
def histo(X, Y, N: tl.constexpr, BINS: tl.constexpr):
    x = tl.load(X + tl.arange(0, N))
    tl.store(Y + tl.arange(0, BINS), tl.histogram(x, BINS))


@triton.jit
def gather(X, I, Y, N: tl.constexpr):
    o = tl.arange(0, N)
    x, i = tl.load(X + o), tl.load(I + o)
    tl.store(Y + o, tl.gather(x, i, 0))


@triton.jit
def last_block(X, P, C, Y, N, BLOCK: tl.constexpr, G: tl.constexpr):
    """Two-stage sum in one launch: the program that takes the last ticket adds the partial sums."""
    p = tl.program_id(0)
    o = p * BLOCK + tl.arange(0, BLOCK)
    tl.store(P + p, tl.sum(tl.load(X + o, mask=o < N, other=0.0), 0))
    tl.debug_barrier()
    t = tl.atomic_add(C, 1)
    if t == G - 1:
        tl.store(Y, tl.sum(tl.load(P + tl.arange(0, G), volatile=True), 0))


@triton.jit
def spinlock(L, Y, N):
    """Every program adds to Y under a lock taken by compare-and-swap."""
    while tl.atomic_cas(L, 0, 1) == 1:
        pass
    tl.store(Y, tl.load(Y, volatile=True) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(L, 0)


@triton.jit
def oob(X, Y, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(X + o))


@triton.jit
def welford_(m1, s1, n1, m2, s2, n2):
    d, n = m2 - m1, n1 + n2
    r = tl.where(n == 0, 0.0, n2 / n)
    return m1 + d * r, s1 + s2 + d * d * n1 * r, n


@triton.jit
def mean_var(X, M, V, N, BLOCK: tl.constexpr):
    r, o = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + r * N + o, mask=o < N, other=0.0).to(tl.float32)
    a, b, c = tl.reduce((x, tl.zeros_like(x), (o < N).to(tl.float32)), 0, welford_)
    tl.device_assert(c == N, "the block does not cover the row")
    tl.store(M + r, a)
    tl.store(V + r, b / c)


@triton.jit
def dtypes(X, W, Y, N: tl.constexpr):
    o = tl.arange(0, N)
    x, w = tl.load(X + o).to(tl.float32), tl.load(W + o)
    tl.store(Y + o, tl.where(w, x, -1.0))
    tl.store(Y + N, tl.sum(x.to(tl.int32), 0))
    tl.store(Y + N + 1, tl.argmin(x, 0))


@triton.jit
def dot(X, Y, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(X + o)
    tl.store(Y + o, tl.dot(x, x))
