"""Triton kernels through Triton's own compiler and launch path."""

import os
import re

import pytest
import torch
from ptxsim import MemoryFault, Module, RaceError, TrapError, UninitError

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)

import jit_kernels as K
from ptxsim.triton_driver import patched_triton, triton_run

#: Without and with clusters, stmatrix and the like.
ARCHS = [80, 90]
CHECK = {"check_races": True, "check_uninit": True}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(fn, args, grid, arch=90, poison=(), **kw):
    options = CHECK | {"poison": poison}
    return triton_run(fn, args, {}, grid, arch=arch, sim_options=options, enable_fp_fusion=True, **kw)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("dt", "tol"), [(torch.float32, 5e-7), (torch.float16, 6e-4), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("n", [4096, 4001])
def test_softmax(arch, dt, tol, n):
    x = (3 * torch.randn(8, n)).to(dt)
    y = torch.empty_like(x)
    st = run(K.softmax, (x, y, n, n), (8,), arch, [y], BLOCK=4096, num_warps=8)
    ref = x.double().softmax(1)
    assert ((y.double() - ref).abs() / ref.max(1, keepdim=True).values).max() < tol
    assert st.buffers["X"].loaded == x.numel() * x.element_size() == st.buffers["X"].distinct_loaded
    assert st.buffers["Y"].unwritten == 0
    assert st.buffers["Y"].loaded == 0
    assert st.load.efficiency > 0.99 if n == 4096 else st.load.efficiency > 0.4
    assert st.bank_conflicts == 0
    assert not st.warnings


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16])
def test_online_lse(arch, dt):
    x = (4 * torch.randn(6, 3001)).to(dt)
    ids = torch.randint(0, 3001, (6,))
    lse, t = torch.empty(6), torch.empty(6)
    st = run(K.online_lse, (x, lse, t, ids, 3001, 3001), (6,), arch, [lse, t], BLOCK=512)
    torch.testing.assert_close(lse.double(), x.double().logsumexp(1), rtol=2e-6, atol=2e-6)
    assert torch.equal(t, x.float()[torch.arange(6), ids])
    assert st.buffers["X"].reads_per_byte == 1.0


@pytest.mark.parametrize("arch", ARCHS)
def test_while_loop_atomic_add(arch):
    x, y = torch.randn(10_000), torch.zeros(1)
    run(K.while_sum, (x, y, 10_000), (5,), arch, BLOCK=256)
    torch.testing.assert_close(y.double()[0], x.double().sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_atomics(arch):
    n = 3000
    x = torch.randint(0, 50, (n,), dtype=torch.int32)
    i, f = torch.zeros(50, dtype=torch.int32), torch.zeros(50)
    g = torch.zeros(16, dtype=torch.int32)
    g[1] = 1 << 30
    st = run(K.atomics, (x, i, f, g, n), (6,), arch, BLOCK=512)
    assert torch.equal(i.long(), torch.bincount(x, minlength=50))
    torch.testing.assert_close(
        f.double(), torch.bincount(x, weights=torch.arange(n).double(), minlength=50), rtol=1e-6, atol=0
    )
    assert g[0] == x.max()
    assert g[1] == x.min()
    assert g[2] == 6
    assert sorted(g[8:14].tolist()) == list(range(6))
    assert st.buffers["I"].atomic == 4 * n


@pytest.mark.parametrize("dt", [torch.float32, torch.float16])
def test_topk_sort(dt):
    x = torch.randn(4, 64).to(dt)
    y = torch.empty(4, 8, dtype=dt)
    run(K.topk, (x, y), (4,), 90, [y], N=64, K=8)
    assert torch.equal(y, x.topk(8).values)
    for desc in (False, True):
        z = torch.empty_like(x)
        run(K.sort, (x, z), (4,), 90, [z], N=64, DESC=desc)
        assert torch.equal(z, x.sort(1, descending=desc).values)


@pytest.mark.parametrize("arch", ARCHS)
def test_argmax_ties(arch):
    x = torch.randint(0, 20, (7, 1000)).float()
    v, i = torch.empty(7), torch.empty(7, dtype=torch.int32)
    run(K.argmax, (x, v, i, 1000), (7,), arch, [v, i], BLOCK=1024)
    first = torch.tensor([(r == r.max()).nonzero()[0].item() for r in x])
    assert torch.equal(v, x.max(1).values)
    assert torch.equal(i.long(), first)
    j = torch.empty(7, dtype=torch.int32)
    run(K.argmax_loop, (x.bfloat16(), j, 1000), (7,), arch, [j], BLOCK=256)
    assert torch.equal(j.long(), first)


@pytest.mark.parametrize("arch", ARCHS)
def test_2d_reductions(arch):
    x = torch.randn(77, 130).half()
    y = torch.empty(130)
    run(K.colsum, (x, y, 77, 130), (3,), arch, [y], BM=32, BN=64)
    torch.testing.assert_close(y.double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
    x = torch.randn(32, 64)
    r, c = torch.empty(32), torch.empty(64)
    run(K.rowcol, (x, r, c), (1,), arch, [r, c], BM=32, BN=64)
    torch.testing.assert_close(r.double(), x.double().sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(c, x.max(0).values)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dt", [torch.float32, torch.float16, torch.int8])
def test_transpose_layout_conversion(arch, dt):
    x = (10 * torch.randn(64, 64)).to(dt)
    y = torch.empty(64, 64, dtype=dt)
    run(K.transpose, (x, y), (1,), arch, [y], BM=64, BN=64)
    assert torch.equal(y, x.T)


@pytest.mark.parametrize("arch", ARCHS)
def test_scans(arch):
    x = 1 + 0.1 * torch.randn(3, 512)
    s, p, r = (torch.empty_like(x) for _ in range(3))
    run(K.scans, (x, s, p, r), (3,), arch, [s, p, r], N=512)
    d = x.double()
    torch.testing.assert_close(s.double(), d.cumsum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p.double(), d.cumprod(1), rtol=1e-4, atol=1e-6)
    b, ref = torch.zeros(3).double(), []
    for k in range(512):
        b = d[:, k] * b + d[:, k]
        ref.append(b)
    torch.testing.assert_close(r.double(), torch.stack(ref, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_elementwise_math(arch):
    n = 700
    x = 3 * torch.randn(n)
    x[:4] = torch.tensor([0.0, -0.0, 20.0, -20.0])
    y = torch.empty(16, n)
    run(K.elementwise, (x, y, n), (3,), arch, [y], BLOCK=256)
    d = x.double()
    a = (x.abs() + 0.5).double()
    ref = torch.stack(
        [
            d.exp(),
            a.log(),
            a.sqrt(),
            a.rsqrt(),
            d.sigmoid(),
            d.tanh(),
            torch.erf(d),
            d.ceil(),
            torch.maximum(d, a),
            d.floor(),
            d.exp2(),
            a.log2(),
            a.log1p(),
            d.expm1(),
            a.pow(d),
            d / a,
        ]
    )
    torch.testing.assert_close(y.double(), ref, rtol=3e-6, atol=2e-7)


@pytest.mark.parametrize("arch", ARCHS)
def test_integers(arch):
    n = 900
    x = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32)
    for divisor in (7, -13, 16):
        y, z = torch.empty(5, n, dtype=torch.int32), torch.empty(n, dtype=torch.int64)
        run(K.intops, (x, y, z, n, divisor), (4,), arch, [y, z], BLOCK=256)
        w = x.long()

        def wrap(t):
            return t.to(torch.int32)

        assert torch.equal(y[0].long(), torch.div(w, divisor, rounding_mode="trunc"))
        assert torch.equal(y[1].long(), torch.fmod(w, divisor))
        assert torch.equal(y[2], wrap((w << 3) ^ (w >> 5)))
        assert torch.equal(y[3].long(), w.clamp(max=divisor))
        u = [((int(v) & 0xFFFFFFFF) * 0x9E3779B9) >> 32 for v in w]
        assert [int(v) & 0xFFFFFFFF for v in y[4]] == u
        assert torch.equal(z, torch.div(w * w, 7, rounding_mode="trunc"))


@pytest.mark.parametrize("arch", ARCHS)
def test_custom_reduction_and_device_assert(arch):
    x, m, v = torch.randn(5, 1000).half(), torch.empty(5), torch.empty(5)
    run(K.mean_var, (x, m, v, 1000), (5,), arch, [m, v], BLOCK=1024, debug=True)
    torch.testing.assert_close(m, x.float().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(v, x.float().var(1, unbiased=False), rtol=1e-5, atol=1e-6)
    with pytest.raises(TrapError, match="device assertion failed"):
        run(K.mean_var, (x, m, v, 1000), (5,), arch, [], BLOCK=512, debug=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_dtypes_and_masks(arch):
    for dt in (torch.int8, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64):
        x, w, y = torch.randint(0, 100, (256,)).to(dt), torch.rand(256) > 0.5, torch.empty(258)
        run(K.dtypes, (x, w, y), (1,), arch, [y], N=256)
        assert torch.equal(y[:256], torch.where(w, x.float(), -1.0))
        assert y[256] == x.float().sum()
        assert y[257] == x.float().argmin()


def test_tensor_cores_are_refused():
    with pytest.raises(NotImplementedError, match=r"mma\.sync"):
        run(K.dot, (torch.randn(32, 32), torch.empty(32, 32)), (1,), N=32)


def test_philox_uniform():
    y = torch.empty(4000)
    run(K.philox, (y, 1234, 4000), (4,), 90, [y], BLOCK=1024)
    assert y.min() >= 0
    assert y.max() < 1
    assert abs(y.mean() - 0.5) < 0.02
    assert len(y.unique()) > 3900


@pytest.mark.parametrize("arch", ARCHS)
def test_casts(arch):
    n = 500
    x = 100 * torch.randn(n)
    out = [torch.empty(n, dtype=t) for t in (torch.float16, torch.bfloat16, torch.float64, torch.int32)]
    run(K.casts, (x, *out, n), (1,), arch, out, BLOCK=512)
    for o in out:
        assert torch.equal(o, x.to(o.dtype))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("stages", [1, 3])
def test_cache_policies_and_pipelining(arch, stages):
    x, y = torch.randn(5000), torch.empty(2)
    run(K.policies, (x, y, 5000), (1,), arch, [y], BLOCK=1024, STAGES=stages)
    torch.testing.assert_close(y.double(), 2 * x.double().sum().expand(2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_histogram_gather(arch):
    x = torch.randint(0, 64, (1024,), dtype=torch.int32)
    y = torch.empty(64, dtype=torch.int32)
    run(K.histo, (x, y), (1,), arch, [y], N=1024, BINS=64)
    assert torch.equal(y.long(), torch.bincount(x, minlength=64))
    v, i = torch.randn(512), torch.randint(0, 512, (512,), dtype=torch.int32)
    z = torch.empty(512)
    run(K.gather, (v, i, z), (1,), arch, [z], N=512)
    assert torch.equal(z, v[i.long()])


def test_last_block_and_spinlock():
    x = torch.randn(16 * 256 - 9)
    p, c, y = torch.empty(16), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    run(K.last_block, (x, p, c, y, x.numel()), (16,), 90, [p, y], BLOCK=256, G=16)
    torch.testing.assert_close(y.double()[0], x.double().sum(), rtol=1e-5, atol=1e-4)
    lock, y = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(K.spinlock, (lock, y, 9), (9,), 90)
    assert y.item() == 9


def test_cluster_launch():
    x = torch.randn(4, 4096)
    y = torch.empty_like(x)
    st = run(K.softmax, (x, y, 4096, 4096), (4,), 90, [y], BLOCK=4096, num_ctas=2)
    torch.testing.assert_close(y.double(), x.double().softmax(1), rtol=1e-5, atol=1e-9)
    assert st.grid == (8, 1, 1)


def test_out_of_bounds():
    x, y = torch.randn(1000), torch.empty(1024)
    with pytest.raises(MemoryFault, match="buffer 'X'"):
        run(K.oob, (x, y, 1000), (4,), BLOCK=256)


def test_value_one_and_unaligned_specialisation():
    x = torch.randn(1 + 4096)[1:]
    y = torch.empty(1, 4096)
    st = run(K.softmax, (x, y, 4096, 1), (1,), BLOCK=4096)
    torch.testing.assert_close(y.double()[0], x.double().softmax(0), rtol=1e-5, atol=1e-9)
    assert st.load.instrs == 4096 // 32  # an unaligned pointer cannot use vector loads


def test_memory_nobody_has_written():
    """torch.empty may be read only after a kernel wrote it, also by another launch."""
    x = torch.randn(2, 256)
    with patched_triton(fresh=True) as sim:
        y, z = torch.empty_like(x), torch.empty(2, 256)
        with pytest.raises(UninitError, match="never-written buffer 'X'"):
            K.softmax[(2,)](y, z, 256, 256, BLOCK=256, enable_fp_fusion=True)
        K.softmax[(2,)](x, y, 256, 256, BLOCK=256, enable_fp_fusion=True)
        K.softmax[(2,)](y, z, 256, 256, BLOCK=256, enable_fp_fusion=True)
    torch.testing.assert_close(z, x.softmax(1).softmax(1))
    assert [launch.name for launch in sim.log] == ["softmax"] * 2  # the one that failed is not among them
    assert sim.stats["softmax"].launches == 2


def test_views_bound_the_accesses():
    x = torch.randn(4, 300)[1:3, :256]
    y = torch.full((4, 300), 7.0)
    run(K.softmax, (x, y[1:3, :256], 256, 300), (2,), BLOCK=256)
    torch.testing.assert_close(y[1:3, :256], x.softmax(1))
    with pytest.raises(MemoryFault, match="inside the allocation, but outside the tensors"):
        run(K.softmax, (x, y[1:3, :255], 256, 300), (2,), BLOCK=256)
    with pytest.raises(MemoryFault, match="4-byte global read at byte 2224 of buffer 'X'"):
        run(K.softmax, (x, y, 257, 300), (2,), BLOCK=512)


def without_barrier(text, k):
    """PTX with its k-th bar.sync deleted, or None."""
    lines = text.splitlines()
    bars = [j for j, line in enumerate(lines) if re.search(r"\b(bar|barrier)(\.cta)?\.sync", line)]
    if k >= len(bars):
        return None
    lines[bars[k]] = ""
    return "\n".join(lines)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_barrier_of_a_softmax_is_needed(arch):
    """Deleting any barrier from compiled code must be noticed by the race checker."""
    x = torch.randn(2, 1024)
    with patched_triton(arch) as sim:
        compiled = K.softmax[(2,)](x, torch.empty_like(x), 1024, 1024, BLOCK=1024, num_warps=8, enable_fp_fusion=True)
    args, shared = (x, torch.empty_like(x), 1024, 1024), sim.log[0].metadata.shared
    ptx, k = compiled.asm["ptx"], 0
    Module(ptx).launch("softmax", 2, 256, args, shared, check_races=True)
    while (cut := without_barrier(ptx, k)) is not None:
        with pytest.raises(RaceError):
            Module(cut).launch("softmax", 2, 256, args, shared, check_races=True)
        k += 1
    assert k >= 3
