"""CUDA C++ through nvcc: does compiled code compute what it should, and are the counters right?"""

import ctypes

import numpy as np
import pytest
import torch
from cuda_builds import BUILDS, KERNELS, build_of, needs_nvcc
from ptxsim.nvcc import CudaModule

pytestmark = needs_nvcc
CHECK = {"check_races": True, "check_uninit": True}


@pytest.fixture(params=BUILDS)
def build(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def mod(build):
    return build_of(build)


def test_entries(mod):
    assert any("softmax_rows<float, 128>" in d for d in mod.names.values())


@pytest.mark.parametrize(
    ("ty", "dt", "threads"),
    [("float", torch.float32, 128), ("__half", torch.float16, 128), ("__nv_bfloat16", torch.bfloat16, 256)],
)
def test_softmax_rows(mod, ty, dt, threads):
    x = (3 * torch.randn(12, 2048)).to(dt)
    y = torch.empty_like(x)
    st = mod.run(
        f"softmax_rows<{ty}, {threads}>", 12, threads, [x, y, 2048], shared_bytes=2048 * 4, poison=[y], **CHECK
    )
    ref = x.double().softmax(1)
    tol = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dt]
    assert ((y.double() - ref).abs() / ref.max(1, keepdim=True).values).max() < tol
    assert st.load.efficiency == 1
    assert st.store.efficiency == 1
    assert st.bank_conflicts == 0
    assert st.buffers["arg0"].reads_per_byte == 1
    assert st.buffers["arg1"].unwritten == 0
    assert st.load.instrs == x.numel() * x.element_size() // 512


def test_warp_lse(mod, build):
    x = 5 * torch.randn(19, 333)
    y = torch.empty(19)
    mod.run("warp_lse", 2, 128, [x, y, 19, 333], poison=[y], **CHECK)
    torch.testing.assert_close(y.double(), x.double().logsumexp(1), rtol=4e-6 if "fast" in build else 1e-6, atol=1e-6)


def test_double(mod):
    n = 200
    x = 3 * torch.randn(n, dtype=torch.float64)
    y = torch.empty(10, n, dtype=torch.float64)
    mod.run("dbl", 2, 128, [x, y, n], poison=[y], **CHECK)
    a = x.abs() + 0.5
    ref = torch.stack(
        [x.exp(), a.log(), a.sqrt(), x.exp2(), a.pow(x), x / a, x.tanh(), x * a + 1, torch.erf(x), a.rsqrt()]
    )
    torch.testing.assert_close(y, ref, rtol=1e-14, atol=1e-15)


def test_float_math(mod, build):
    n = 200
    x = 3 * torch.randn(n)
    y = torch.empty(10, n)
    mod.run("flt", 2, 128, [x, y, n], poison=[y], **CHECK)
    d, a = x.double(), (x.abs() + 0.5).double()
    ref = torch.stack(
        [d.exp(), a.log(), a.sqrt(), d.exp2(), a.pow(d), d / a, d.tanh(), a.log1p(), torch.erf(d), a.rsqrt()]
    )
    fast = "fast" in build
    torch.testing.assert_close(y.double(), ref, rtol=1e-5 if fast else 5e-7, atol=1e-6 if fast else 1e-7)


def test_tile_topk(mod):
    x = torch.randint(0, 60, (8, 400)).float()  # many ties: the lowest index must win
    v, i = torch.empty(8, 5), torch.empty(8, 5, dtype=torch.int32)
    mod.run("tile_topk<5>", 2, 64, [x, v, i, 400], poison=[v, i], **CHECK)
    for r in range(8):
        order = sorted(range(400), key=lambda k: (-x[r, k].item(), k))[:5]
        assert i[r].tolist() == order
        assert v[r].tolist() == x[r, order].tolist()


def test_atomics(mod):
    n = 1500
    x = torch.randint(-1000, 1000, (n,), dtype=torch.int32)
    hist, fs, ds = torch.zeros(32, dtype=torch.int32), torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    packed, misc = torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    mod.run("atoms", 4, 128, [x, hist, fs, ds, packed, misc, n], **CHECK)
    assert torch.equal(hist.long(), torch.bincount((x & 31).long(), minlength=32))
    assert fs.item() == (x & 31).sum()
    assert ds.item() == x.sum()
    u = x.long() & 0xFFFFFFFF
    assert packed.item() & (2**64 - 1) == max(int(u[k]) << 32 | k for k in range(n))
    r = 0
    for _ in range(n):
        r = (r * 3 + 1) & 0xFFFFFFFF
    assert misc[0] == 1
    assert misc[2].item() & 0xFFFFFFFF == r
    assert misc[1].item() & 0xFFFFFFFF == 0xFFFFFFFF


def test_half_atomics(mod):
    h, b = torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16)
    mod.run("half_atomics", 1, 32, [h, b])
    assert h.tolist() == [32, 496]
    assert b.tolist() == [32, 64]


def test_half_math(mod):
    n = 50
    x, u = torch.randn(n, 2).half(), torch.randn(n, 2).bfloat16()
    y, w = torch.empty(6, n, 2).half(), torch.empty(6, n, 2).bfloat16()
    mod.run("half_math", 1, 64, [x, y, u, w, n], poison=[y, w], **CHECK)
    a, b = x.double(), x.roll(-1, 0).double()
    for got, want in zip(y, [a * b + a, a.maximum(b), a - b, a + b, a * b, a.abs()], strict=True):
        assert torch.equal(got, want.half())
    a, b = u.double(), u.roll(-1, 0).double()
    for got, want in zip(w, [a * b + a, a.minimum(b), a.maximum(b), a + b, a * b, a - b], strict=True):
        assert torch.equal(got, want.bfloat16())


def signed(v):
    return v - (1 << 32) if v >> 31 else v


def test_bits(mod):
    n = 300
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, n, dtype=np.uint32)
    x[:3] = (0, 1, 0x80000000)
    y, z = np.zeros((10, n), np.uint32), np.zeros((2, n), np.uint64)
    mod.run("bits", 3, 128, [x, y, z, n], **CHECK)
    mask = 0xFFFFFFFF
    for i in range(n):
        a, b = int(x[i]), int(x[(i + 1) % n])
        sel = 0x5140 + (i & 7)
        by = (b << 32 | a).to_bytes(8, "little")
        d = b | 1
        q = int(signed(a) / signed(d))  # exact: float64 holds the quotient of 32-bit integers
        sh = i & 31
        ref = [
            a.bit_count(),
            32 - a.bit_length(),
            int(f"{a:032b}"[::-1], 2),
            int.from_bytes(bytes(by[sel >> 4 * k & 7] for k in range(4)), "little"),
            ((b << 32 | a) << sh >> 32) & mask,
            (a & -a).bit_length(),
            a * b >> 32,
            a % d,
            q & mask,
            (a >> sh | b << (31 - sh)) & mask,
        ]
        assert [int(v) for v in y[:, i]] == ref, i
        assert int(z[0, i]) == (a << 32 | b) * (b << 32 | a) >> 64
        assert int(z[1, i]) == a * b // d % 1000003


def diverge_ref(x):
    f = np.float32
    out = []
    for i, start in enumerate(x.numpy()):
        v = start
        for k in range(i % 7):
            if k == 3:
                continue
            v = f(float(v) * 2 + k) if k & 1 else f(v - f(k))
            if v > 40:
                break
        v = (f(v + f(1)), f(float(v) * 3 - 2), f(v - f(2)), -v, v)[i % 5]
        out.append(f(f(v + f((i * 5) % 8)) + f(v + f(i % 3))))
    return np.array(out)


def test_divergence(mod):
    x = 10 * torch.randn(250)
    y = torch.empty(250)
    st = mod.run("diverge", 3, 96, [x, y, 250], poison=[y], **CHECK)
    np.testing.assert_allclose(y.numpy(), diverge_ref(x), rtol=1e-6)
    assert st.buffers["arg1"].unwritten == 0


def test_switch(mod):
    sel = torch.randint(0, 12, (64,), dtype=torch.int32)
    y = torch.empty(64, dtype=torch.int32)
    mod.run("switcher", 1, 64, [sel, y, 38], **CHECK)
    f = {
        0: lambda r: 114,
        1: lambda r: 5,
        2: lambda r: r ^ 0x55,
        3: lambda r: r * r,
        4: lambda r: r.bit_count(),
        5: lambda r: -38,
        6: lambda r: r << 3,
        7: lambda r: r + 1000,
        8: lambda r: 3,
        9: lambda r: ~r,
    }
    assert y.tolist() == [f.get(s, lambda r: r)(r) for r, s in enumerate(sel.tolist())]


def test_votes_shuffles(mod):
    x = torch.randint(0, 16, (64,), dtype=torch.int32)
    y = torch.empty(448, dtype=torch.int32)
    mod.run("votes", 1, 64, [x, y], poison=[y], **CHECK)
    y = y.view(7, 64)
    for t in range(64):
        w = x[t // 32 * 32 : t // 32 * 32 + 32].tolist()
        lane, v = t % 32, x[t].item()
        odd = sum(q & 1 for q in w)
        assert y[0, t] == odd + 100 * any(q > 14 for q in w) + 1000
        assert y[1, t] == w[(t + 5) & 31]
        assert y[2, t] == (w[lane - 3] if lane >= 3 else v)
        assert y[3, t] == (w[lane + 3] if lane % 16 < 13 else v)
        assert y[4:, t].tolist() == [max(w) + sum(w), (x & 1).sum(), odd if v & 1 else -1]


def test_async_copy(mod):
    x = torch.randn(3, 64, 4)
    y = torch.empty_like(x)
    mod.run("async_copy", 3, 64, [x, y], poison=[y], **CHECK)
    assert torch.equal(y, x.flip(1))


def test_params_constants_globals(build):
    mod = CudaModule(KERNELS, arch=build.split("-")[0], flags=BUILDS[build])  # its own: the variables keep their values

    class Par(ctypes.Structure):
        _fields_ = [("a", ctypes.c_float), ("b", ctypes.c_int), ("c", ctypes.c_double * 3)]

    y = torch.empty(16)
    p = Par(2.5, 3, (ctypes.c_double * 3)(0.25, 0.5, 0.75))
    for k in (1, 2):
        mod.run("params", 1, 16, [p, y, True, 4, np.float16(0.125)])
        i = torch.arange(16)
        assert torch.equal(y, 7.5 + torch.tensor([0.25, 0.5, 0.75])[i % 3] + 1 + (i & 7) + 0.5 + (i & 3) + 4 + 0.125)
        assert mod.global_array("counter").view(np.int32)[0] == 7 + 3 * k


def test_clusters(mod, build):
    if build == "sm_80":
        pytest.skip("no clusters before sm_90")
    x = torch.randn(8, 64)
    y = torch.empty(8)
    mod.run("cluster_sum", 8, 64, [x, y], poison=[y], **CHECK)
    tot = x.double().view(2, 256).sum(1).repeat_interleave(4)
    torch.testing.assert_close(y.double(), tot + 1000 * (torch.arange(8) % 4), rtol=1e-6, atol=1e-4)


def test_batches_agree(mod):
    """Small batches of CTAs give the same answer as one big batch."""
    x = torch.randn(10, 2048)
    out = []
    for lanes in (128, 300, 100_000):
        y = torch.empty_like(x)
        st = mod.run("softmax_rows<float, 128>", 10, 128, [x, y, 2048], shared_bytes=8192, max_lanes=lanes)
        out.append((y, dict(st.warp_instrs), st.load.sectors, st.barriers))
    for o in out[1:]:
        assert torch.equal(o[0], out[0][0])
        assert o[1:] == out[0][1:]


def test_memory_statistics(mod):
    x, y = torch.randn(32 * 64), torch.empty(32)
    for stride, sectors in ((1, 4), (2, 8), (8, 32), (64, 32)):
        st = mod.run("strided", 1, 32, [x, y, stride])
        assert st.load.sectors == sectors
        assert st.load.bytes == 128
        assert st.load.instrs == 1
        assert st.buffers["arg0"].distinct_loaded == 128
    y = torch.empty(32)
    for stride, extra in ((1, 0), (2, 1), (32, 31), (33, 0), (0, 0)):
        st = mod.run("conflicts", 1, 32, [y, stride], **CHECK)
        assert st.bank_conflicts == extra, stride
