"""Single instructions on hand-written PTX against independent references."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptxsim import DeadlockError, MemoryFault, Module, SimError, Struct

F32, F64 = np.float32, np.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow in the numpy references
SIZE = {"u8": 1, "s8": 1, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b16": 2, "pred": 1}
NP = {
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "f32": F32,
    "f64": F64,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "b64": np.uint64,
    "b16": np.uint16,
}
HEAD = ".version 8.6\n.target sm_100a\n.address_size 64\n"


def size(t):
    return SIZE.get(t) or int(t[-2:]) // 8


def kernel(body, ptrs, regs="", block=None, shared=""):
    params = ",\n".join(f".param .u64 p{k}" for k in range(ptrs))
    load = "\n".join(f"ld.param.u64 %P{k}, [p{k}];" for k in range(ptrs))
    return Module(f"""{HEAD}
.visible .entry k({params})
{{
  .reg .b64 %P<8>; .reg .b64 %A<8>; .reg .u32 %t; .reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %d<32>;
  .reg .f32 %f<32>; .reg .f64 %fd<16>; .reg .b16 %h<32>; {regs}
  {shared}
  {load}
  mov.u32 %t, %tid.x;
  {body}
  ret;
}}""")


def op(text, dty, *ins):
    """Run `text` with operands %a, %b, %c (types/values in ins) and result %o, one thread per element."""
    n = len(ins[0][1])

    def cls(t):
        return f".b{max(16, 8 * size(t))}"

    regs = "".join(f".reg {cls(t)} %{c};" for c, (t, _) in zip("abc", ins, strict=False)) + f".reg {cls(dty)} %o;"
    ld = "".join(
        f"mad.wide.u32 %A0, %t, {size(t)}, %P{k}; ld.global.b{8 * size(t)} %{c}, [%A0];\n"
        for k, (c, (t, _)) in enumerate(zip("abc", ins, strict=False))
    )
    q = len(ins)
    m = kernel(
        f"{ld} {text} mad.wide.u32 %A0, %t, {size(dty)}, %P{q}; st.global.b{8 * size(dty)} [%A0], %o;", q + 1, regs
    )
    out = np.zeros(n, NP[dty])
    m.launch("k", 1, n, [np.ascontiguousarray(v, NP[t]) for t, v in ins] + [out])
    return out


RNG = np.random.default_rng(1)


def rand32(n=256):
    """Assorted float32 values: ordinary, subnormal, huge, special."""
    x = RNG.standard_normal(n).astype(F32) * F32(2) ** RNG.integers(-20, 20, n).astype(F32)
    x[:12] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3e38, -3e38, 1.0, 1.1754944e-38, 0.5]
    return RNG.permutation(x)


def exact_round(fr, mode):
    """Correctly rounded float32 of a Fraction."""
    if fr == 0:
        return F32(0)
    r = F32(float(fr))  # a candidate within one ulp
    cand = sorted({float(np.nextafter(r, F32(-np.inf))), float(r), float(np.nextafter(r, F32(np.inf)))})
    lo = max(c for c in cand if Fraction(c) <= fr) if Fraction(cand[0]) <= fr else cand[0]
    hi = min(c for c in cand if Fraction(c) >= fr)
    if mode == "rm" or (mode == "rz" and fr > 0):
        return F32(lo)
    if mode in {"rp", "rz"}:
        return F32(hi)
    a, b = fr - Fraction(lo), Fraction(hi) - fr
    if a == b:
        return F32(lo) if not (F32(lo).view(np.uint32) & 1) else F32(hi)
    return F32(lo) if a < b else F32(hi)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_rounding_modes(mode):
    n = 400
    a, b, c = (RNG.standard_normal(n).astype(F32) * F32(2) ** RNG.integers(-12, 12, n).astype(F32) for _ in range(3))
    # products that land next to a rounding boundary of the sum
    a[:50] = 1 + np.arange(50, dtype=F32) * F32(2**-23)
    b[:50] = 1 + F32(2**-23)
    c[:50] = F32(2**24) * np.where(np.arange(50) % 2, 1, -1)
    c[50:80] = -a[50:80] * b[50:80]

    def exact(x):
        return Fraction(float(x))

    got = {
        "fma": op(f"fma.{mode}.f32 %o, %a, %b, %c;", "f32", ("f32", a), ("f32", b), ("f32", c)),
        "add": op(f"add.{mode}.f32 %o, %a, %b;", "f32", ("f32", a), ("f32", b)),
        "mul": op(f"mul.{mode}.f32 %o, %a, %b;", "f32", ("f32", a), ("f32", b)),
    }
    for i in range(n):
        for name, fr in (
            ("fma", exact(a[i]) * exact(b[i]) + exact(c[i])),
            ("add", exact(a[i]) + exact(b[i])),
            ("mul", exact(a[i]) * exact(b[i])),
        ):
            want = exact_round(fr, mode)
            assert got[name][i] == want, (name, a[i], b[i], c[i], got[name][i], want)


def test_fma_double_rounding_case():
    # a*b + c is a hair above a float32 midpoint that float64 cannot distinguish
    a, b, c = F32(1 + 2**-12), F32(1 + 2**-12), F32(2**-60)
    x = op("fma.rn.f32 %o, %a, %b, %c;", "f32", ("f32", [a] * 2), ("f32", [b] * 2), ("f32", [c, -c]))
    for v, cc in zip(x, (c, -c), strict=True):
        assert v == exact_round(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(cc)), "rn")


def test_fma_f64_exact():
    n = 300
    a, b = RNG.standard_normal(n), RNG.standard_normal(n)
    c = -(a * b)  # the result is the rounding error of the product
    x = op("fma.rn.f64 %o, %a, %b, %c;", "f64", ("f64", a), ("f64", b), ("f64", c))
    assert [Fraction(v) for v in x] == [
        Fraction(p) * Fraction(q) + Fraction(r) for p, q, r in zip(a, b, c, strict=True)
    ]


def test_ftz():
    x = np.array([1e-40, -1e-40, 2e-38, 1.2e-38], F32)
    y = np.array([1.0, 1.0, 0.5, 1.0], F32)
    assert op("mul.ftz.f32 %o, %a, %b;", "f32", ("f32", x), ("f32", y)).view(np.uint32).tolist() == [
        0,
        0x80000000,
        0,
        int(F32(1.2e-38).view(np.uint32)),
    ]
    assert np.array_equal(op("mul.f32 %o, %a, %b;", "f32", ("f32", x), ("f32", y)), x * y)


def test_min_max():
    a, b = rand32(), rand32()
    a[:4], b[:4] = [0.0, -0.0, np.nan, 1], [-0.0, 0.0, 2, np.nan]
    mx = op("max.f32 %o, %a, %b;", "f32", ("f32", a), ("f32", b))
    mn = op("min.f32 %o, %a, %b;", "f32", ("f32", a), ("f32", b))
    assert np.array_equal(mx, np.fmax(a, b), equal_nan=True)
    assert np.array_equal(mn, np.fmin(a, b), equal_nan=True)
    assert not np.signbit(mx[:2]).any()
    assert np.signbit(mn[:2]).all()
    nn = op("max.NaN.f32 %o, %a, %b;", "f32", ("f32", a), ("f32", b))
    assert np.array_equal(nn, np.maximum(a, b), equal_nan=True)
    c = rand32()
    m3 = op("max.f32 %o, %a, %b, %c;", "f32", ("f32", a), ("f32", b), ("f32", c))
    assert np.array_equal(m3, np.fmax(np.fmax(a, b), c), equal_nan=True)


def test_cvt_float_to_int():
    x = np.concatenate([rand32(), np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 300, -300, 4e9, 1e19, -1e19], F32)])
    for dty in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        info = np.iinfo(NP[dty])
        for mode, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            got = op(f"cvt.{mode}.{dty}.f32 %o, %a;", dty, ("f32", x))
            for v, g in zip(x, got, strict=True):
                if np.isnan(v):
                    continue
                want = (
                    info.max
                    if v == np.inf
                    else info.min
                    if v == -np.inf
                    else min(max(int(f(F64(v))), info.min), info.max)
                )
                assert int(g) == want, (dty, mode, v)


def test_cvt_int_to_float_and_int():
    for sty in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        info = np.iinfo(NP[sty])
        x = RNG.integers(info.min, info.max, 200, dtype=NP[sty], endpoint=True)
        x[:2] = info.min, info.max
        for dty in ("f16", "f32", "f64"):
            got = op(f"cvt.rn.{dty}.{sty} %o, %a;", dty, (sty, x))
            if not (dty == "f16" and size(sty) == 8):
                assert np.array_equal(got, x.astype(NP[dty]), equal_nan=True), (sty, dty)
        for dty in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
            d = np.iinfo(NP[dty])
            assert np.array_equal(op(f"cvt.{dty}.{sty} %o, %a;", dty, (sty, x)), x.astype(NP[dty]))
            got = op(f"cvt.sat.{dty}.{sty} %o, %a;", dty, (sty, x))
            assert [int(v) for v in got] == [min(max(int(v), d.min), d.max) for v in x]


def test_cvt_float_formats():
    x = rand32(400)
    t = torch.from_numpy(x)
    bf = op("cvt.rn.bf16.f32 %o, %a;", "bf16", ("f32", x))
    want = t.bfloat16().view(torch.int16).numpy().view(np.uint16)
    ok = ~np.isnan(x)
    assert np.array_equal(bf[ok], want[ok])
    assert (bf[~ok] == 0x7FFF).all()
    assert np.array_equal(op("cvt.rn.f16.f32 %o, %a;", "f16", ("f32", x)), x.astype(np.float16), equal_nan=True)
    d = x.astype(F64) * (1 + 2.0**-30)
    assert np.array_equal(op("cvt.rn.f32.f64 %o, %a;", "f32", ("f64", d)), d.astype(F32), equal_nan=True)
    got = op("cvt.rn.bf16x2.f32 %o, %a, %b;", "b32", ("f32", x), ("f32", x[::-1]))
    lo, hi = (got & 0xFFFF).astype(np.uint16), (got >> 16).astype(np.uint16)
    assert np.array_equal(hi[ok], want[ok])
    assert np.array_equal(lo[::-1][ok], want[ok])
    h = np.arange(65536, dtype=np.uint16)[::16].view(np.float16)
    assert np.array_equal(op("cvt.f32.f16 %o, %a;", "f32", ("f16", h)), h.astype(F32), equal_nan=True)
    assert np.array_equal(op("cvt.sat.f32.f32 %o, %a;", "f32", ("f32", x)), np.nan_to_num(np.clip(x, 0, 1), nan=0.0))
    assert np.array_equal(op("cvt.rni.f32.f32 %o, %a;", "f32", ("f32", x)), np.rint(x), equal_nan=True)


def test_half_arithmetic():
    h = np.arange(65536, dtype=np.uint16)
    a, b, c = (RNG.choice(h, 600) for _ in range(3))
    x, y, z = (v.view(np.float16) for v in (a, b, c))
    assert np.array_equal(op("add.f16 %o, %a, %b;", "f16", ("f16", x), ("f16", y)), x + y, equal_nan=True)
    assert np.array_equal(op("mul.f16 %o, %a, %b;", "f16", ("f16", x), ("f16", y)), x * y, equal_nan=True)
    got = op("fma.rn.f16 %o, %a, %b, %c;", "f16", ("f16", x), ("f16", y), ("f16", z))
    for g, p, q, r in zip(got, x, y, z, strict=True):
        if np.isfinite([p, q, r]).all() and np.isfinite(g):
            exact = Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r))
            ulp = Fraction(float(np.spacing(np.abs(g))))
            assert abs(Fraction(float(g)) - exact) <= ulp / 2, (p, q, r)

    def tb(v):
        return torch.from_numpy(v.view(np.int16)).view(torch.bfloat16)

    got = op("fma.rn.bf16 %o, %a, %b, %c;", "bf16", ("bf16", a), ("bf16", b), ("bf16", c))
    for g, p, q, r in zip(
        tb(got).double().tolist(),
        tb(a).double().tolist(),
        tb(b).double().tolist(),
        tb(c).double().tolist(),
        strict=True,
    ):
        if np.isfinite([g, p, q, r]).all() and abs(g) > 1e-37:
            ex = Fraction(p) * Fraction(q) + Fraction(r)
            assert abs(Fraction(g) - ex) <= abs(Fraction(g)) / 256, (p, q, r)


def test_approximations():
    x = (4 * RNG.standard_normal(300)).astype(F32)
    p = np.abs(x) + F32(0.1)
    d, q = x.astype(F64), p.astype(F64)
    for text, arg, want in (
        ("ex2.approx.ftz.f32", x, np.exp2(d)),
        ("lg2.approx.f32", p, np.log2(q)),
        ("rcp.approx.f32", p, 1 / q),
        ("rsqrt.approx.f32", p, q**-0.5),
        ("sqrt.approx.f32", p, q**0.5),
        ("tanh.approx.f32", x, np.tanh(d)),
        ("sin.approx.f32", x, np.sin(d)),
        ("cos.approx.f32", x, np.cos(d)),
        ("sqrt.rn.f32", p, np.sqrt(p)),
        ("rcp.rn.f32", p, F32(1) / p),
    ):
        got = op(f"{text} %o, %a;", "f32", ("f32", arg))
        np.testing.assert_allclose(got, want.astype(F32), rtol=1.2e-7, atol=0)
    assert op("ex2.approx.ftz.f32 %o, %a;", "f32", ("f32", [-np.inf, np.inf, -140, 0])).tolist() == [0, np.inf, 0, 1]
    assert op("lg2.approx.f32 %o, %a;", "f32", ("f32", [0, np.inf])).tolist() == [-np.inf, np.inf]


def ref_bfe(v, pos, ln, bits, signed):
    pos, ln = pos & 255, ln & 255
    if ln == 0:
        return 0
    sb = (v >> min(pos + ln - 1, bits - 1)) & 1 if signed else 0
    r = 0
    for i in range(bits):
        bit = (v >> (pos + i)) & 1 if i < ln and pos + i < bits else sb
        r |= bit << i
    return r


def test_bit_fields():
    n = 400
    for bits in (32, 64):
        v, _w = (RNG.integers(0, 2**bits, n, dtype=NP[f"u{bits}"]) for _ in range(2))
        pos, ln = RNG.integers(0, bits + 4, n).astype(np.uint32), RNG.integers(0, bits + 4, n).astype(np.uint32)
        for sg in "us":
            got = op(f"bfe.{sg}{bits} %o, %a, %b, %c;", f"u{bits}", (f"u{bits}", v), ("u32", pos), ("u32", ln))
            assert [int(x) for x in got] == [
                ref_bfe(int(a), int(p), int(n), bits, sg == "s") for a, p, n in zip(v, pos, ln, strict=True)
            ]
    v = RNG.integers(0, 2**32, n, dtype=np.uint32)
    for p, w in ((0, 8), (5, 20), (31, 4), (0, 32), (16, 0), (33, 4)):
        got = op(f"bfi.b32 %o, %a, %b, {p}, {w};", "u32", ("u32", v), ("u32", v[::-1]))
        m = ((1 << w) - 1) << p & 0xFFFFFFFF if p < 32 else 0
        assert [int(x) for x in got] == [(int(b) & ~m) | (int(a) << p & m) for a, b in zip(v, v[::-1], strict=True)]


def test_shifts_clz_etc():
    v = np.concatenate([RNG.integers(0, 2**32, 100, dtype=np.uint32), [0, 1, 2**31, 2**32 - 1]]).astype(np.uint32)
    for s in (0, 1, 31, 32, 40, 255):
        assert [int(x) for x in op(f"shl.b32 %o, %a, {s};", "u32", ("u32", v))] == [int(x) << s & 0xFFFFFFFF for x in v]
        assert [int(x) for x in op(f"shr.u32 %o, %a, {s};", "u32", ("u32", v))] == [int(x) >> s for x in v]
        assert [int(x) for x in op(f"shr.s32 %o, %a, {s};", "s32", ("u32", v))] == [
            int(x) >> s for x in v.view(np.int32)
        ]
    assert [int(x) for x in op("clz.b32 %o, %a;", "u32", ("u32", v))] == [32 - int(x).bit_length() for x in v]
    assert [int(x) for x in op("bfind.u32 %o, %a;", "s32", ("u32", v))] == [int(x).bit_length() - 1 for x in v]
    w = v.astype(np.uint64) << np.uint64(20)
    assert [int(x) for x in op("clz.b64 %o, %a;", "u32", ("u64", w))] == [64 - int(x).bit_length() for x in w]
    assert [int(x) for x in op("popc.b64 %o, %a;", "u32", ("u64", w))] == [int(x).bit_count() for x in w]
    lut = op("lop3.b32 %o, %a, %b, %c, 0x96;", "u32", ("u32", v), ("u32", v[::-1]), ("u32", v + np.uint32(5)))
    assert np.array_equal(lut, v ^ v[::-1] ^ (v + np.uint32(5)))
    for c in (0, 7, 32, 40):
        left = op(f"shf.l.clamp.b32 %o, %a, %b, {c};", "u32", ("u32", v), ("u32", v[::-1]))
        right = op(f"shf.r.wrap.b32 %o, %a, %b, {c};", "u32", ("u32", v), ("u32", v[::-1]))
        for x, y, p, q in zip(left, right, v, v[::-1], strict=True):
            cat = int(q) << 32 | int(p)
            assert int(x) == (cat << min(c, 32)) >> 32 & 0xFFFFFFFF
            assert int(y) == cat >> (c & 31) & 0xFFFFFFFF


def test_prmt():
    a, b = (RNG.integers(0, 2**32, 64, dtype=np.uint32) for _ in range(2))
    sel = RNG.integers(0, 65536, 64).astype(np.uint32)
    got = op("prmt.b32 %o, %a, %b, %c;", "u32", ("u32", a), ("u32", b), ("u32", sel))
    for g, x, y, s in zip(got, a, b, sel, strict=True):
        by, r = (int(y) << 32 | int(x)).to_bytes(8, "little"), []
        for k in range(4):
            nib = int(s) >> 4 * k & 15
            v = by[nib & 7]
            r.append(v if nib < 8 else 255 * (v >> 7))
        assert int(g) == int.from_bytes(bytes(r), "little")


def test_integer_arithmetic():
    a, b = RNG.integers(-(2**31), 2**31, 200), RNG.integers(-(2**31), 2**31, 200)
    b[:5] = [1, -1, 2, 7, -7]
    a[:2] = [-(2**31), 2**31 - 1]

    def w(v):
        return ((v + 2**31) % 2**32) - 2**31

    pairs = list(zip(a.tolist(), b.tolist(), strict=True))

    def tq(p, q):
        return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

    for text, f, d in (
        ("mul.lo.s32", lambda p, q: w(p * q), "s32"),
        ("mul.hi.s32", lambda p, q: p * q >> 32, "s32"),
        ("mul.wide.s32", lambda p, q: p * q, "s64"),
        ("div.s32", lambda p, q: w(tq(p, q)), "s32"),
        ("rem.s32", lambda p, q: w(p - q * tq(p, q)), "s32"),
        ("sub.s32", lambda p, q: w(p - q), "s32"),
        ("add.sat.s32", lambda p, q: min(max(p + q, -(2**31)), 2**31 - 1), "s32"),
        ("min.s32", min, "s32"),
    ):
        assert op(f"{text} %o, %a, %b;", d, ("s32", a), ("s32", b)).tolist() == [f(p, q) for p, q in pairs], text
    u, v = (RNG.integers(0, 2**64, 200, dtype=np.uint64) for _ in range(2))
    assert [int(x) for x in op("mul.hi.u64 %o, %a, %b;", "u64", ("u64", u), ("u64", v))] == [
        int(p) * int(q) >> 64 for p, q in zip(u, v, strict=True)
    ]
    s, t = u.view(np.int64), v.view(np.int64)
    assert [int(x) for x in op("mul.hi.s64 %o, %a, %b;", "s64", ("s64", s), ("s64", t))] == [
        int(p) * int(q) >> 64 for p, q in zip(s, t, strict=True)
    ]
    assert [
        int(x)
        for x in op("mad.wide.u32 %o, %a, %b, 5;", "u64", ("u32", u.astype(np.uint32)), ("u32", v.astype(np.uint32)))
    ] == [(int(p) & 0xFFFFFFFF) * (int(q) & 0xFFFFFFFF) + 5 for p, q in zip(u, v, strict=True)]


def test_setp_forms():
    a, b = rand32(64), rand32(64)
    ref = {
        "eq": a == b,
        "ne": (a != b) & ~np.isnan(a) & ~np.isnan(b),
        "lt": a < b,
        "geu": ~(a < b),
        "num": ~np.isnan(a) & ~np.isnan(b),
        "nan": np.isnan(a) | np.isnan(b),
        "neu": ~(a == b),
        "gtu": ~(a <= b),
    }
    for c, r in ref.items():
        got = op(f"setp.{c}.f32 %p0, %a, %b; selp.u32 %o, 1, 0, %p0;", "u32", ("f32", a), ("f32", b))
        assert np.array_equal(got.astype(bool), r), c
    u = RNG.integers(0, 4, 64).astype(np.uint32)
    got = op(
        "setp.gt.u32 %p2, %a, 2; setp.lt.and.u32 %p0|%p1, %a, %b, !%p2; selp.u32 %r0, 1, 0, %p0; "
        "selp.u32 %r1, 2, 0, %p1; add.u32 %o, %r0, %r1;",
        "u32",
        ("u32", u),
        ("u32", u[::-1]),
    )
    keep = ~(u > 2)
    assert np.array_equal(got, ((u < u[::-1]) & keep) + 2 * (~(u < u[::-1]) & keep))


def test_redux():
    n = 64
    x = RNG.standard_normal(n).astype(F32)
    x[5] = np.nan
    got = op("redux.sync.max.f32 %o, %a, 0xffffffff;", "f32", ("f32", x))
    assert (got[:32] == np.nanmax(x[:32])).all()
    assert (got[32:] == x[32:].max()).all()
    got = op("redux.sync.min.abs.NaN.f32 %o, %a, 0xffffffff;", "f32", ("f32", x))
    assert np.isnan(got[:32]).all()
    assert (got[32:] == np.abs(x[32:]).min()).all()
    u = RNG.integers(0, 2**32, n, dtype=np.uint32)
    got = op("redux.sync.xor.b32 %o, %a, 0xffffffff;", "u32", ("u32", u))
    assert (got[:32] == np.bitwise_xor.reduce(u[:32])).all()


def test_wide_vectors_and_vector_atomics():
    x, y, acc = np.arange(256, dtype=F32), np.zeros(256, F32), np.zeros(4, F32)
    st = kernel(
        """mad.wide.u32 %A0, %t, 32, %P0; mad.wide.u32 %A1, %t, 32, %P1;
      ld.global.nc.L1::no_allocate.L2::256B.v8.f32 {%f0,%f1,%f2,%f3,%f4,%f5,%f6,%f7}, [%A0];
      st.global.cs.v8.f32 [%A1], {%f7,%f6,%f5,%f4,%f3,%f2,%f1,%f0};
      red.global.add.v4.f32 [%P2], {%f0,%f1,%f2,%f3};""",
        3,
    ).launch("k", 1, 32, [x, y, acc])
    assert np.array_equal(y.reshape(32, 8), x.reshape(32, 8)[:, ::-1])
    assert np.array_equal(acc, x.reshape(32, 8).sum(0)[:4])
    assert st.load.sectors == 32
    assert st.load.efficiency == 1


def test_brx_and_bar_red():
    y = np.zeros(64, np.uint32)
    kernel(
        """rem.u32 %r0, %t, 3; ts: .branchtargets A, B, C; brx.idx %r0, ts;
      A: mov.u32 %r1, 10; bra.uni J; B: mov.u32 %r1, 20; bra.uni J; C: mov.u32 %r1, 30;
      J: setp.gt.u32 %p0, %r1, 15; barrier.cta.red.popc.aligned.u32 %r2, 0, %p0; add.u32 %r1, %r1, %r2;
      mad.wide.u32 %A0, %t, 4, %P0; st.global.u32 [%A0], %r1;""",
        1,
    ).launch("k", 1, 64, [y])
    k = np.arange(64) % 3
    assert np.array_equal(y, 10 * (k + 1) + np.count_nonzero(k))


def test_scopes_and_generic_addresses():
    """Shadowed registers, scoped labels, shared/local/global through generic pointers."""
    y = np.zeros(32, np.uint32)
    kernel(
        """mov.u32 %r1, 5;
      { .reg .u32 %r1; mov.u32 %r1, 7; { .reg .pred %p9; setp.lt.u32 %p9, %t, 16;
        @%p9 bra L; add.u32 %r1, %r1, 1; L: mov.u32 %r2, %r1; } }
      mov.u64 %d0, sh; cvta.shared.u64 %d1, %d0; mad.wide.u32 %d1, %t, 4, %d1; st.u32 [%d1], %r2;
      mov.u64 %d2, loc; cvta.local.u64 %d3, %d2; st.u32 [%d3+4], %r1; ld.local.u32 %r3, [loc+4];
      bar.warp.sync 0xffffffff; ld.u32 %r4, [%d1]; isspacep.shared %p1, %d1; selp.u32 %r5, 100, 0, %p1;
      setp.lt.u32 %p2, %t, 8; selp.b64 %d4, %d1, %d3, %p2;
      @%p2 st.u32 [%d4], 1000; @!%p2 st.u32 [%d4], 2000; @%p2 ld.u32 %r4, [%d4];
      add.u32 %r4, %r4, %r3; add.u32 %r4, %r4, %r5; mad.wide.u32 %A0, %t, 4, %P0; st.u32 [%A0], %r4;""",
        1,
        shared=".shared .align 4 .b8 sh[128]; .local .align 8 .b8 loc[16];",
    ).launch("k", 1, 32, [y], check_races=True, check_uninit=True)
    t = np.arange(32)
    assert np.array_equal(y, np.where(t < 8, 1000, np.where(t < 16, 7, 8)) + 5 + 100)


def test_unknown_instructions_are_named():
    with pytest.raises(NotImplementedError, match=r"wgmma\.fence\.sync\.aligned;"):
        kernel("wgmma.fence.sync.aligned;", 1).launch("k", 1, 32, [np.zeros(1, F32)])
    for text in (
        "min.xorsign.abs.f32 %f0, %f1, %f2;",
        "add.rz.f64 %fd0, %fd1, %fd2;",
        "cvt.rn.satfinite.bf16.f32 %h0, %f1;",
        "div.rz.f32 %f0, %f1, %f2;",
        "mad.hi.sat.s32 %r0, %r1, %r2, %r3;",
        "ld.global.b128 %d0, [%P0];",
    ):
        with pytest.raises(NotImplementedError, match=text.split()[0].replace(".", r"\.")):
            kernel(text, 1).launch("k", 1, 32, [np.zeros(1, F32)])


def test_shuffle_waits_for_late_lanes():
    """Lanes that take a detour still meet at the shuffle; lanes that never come are a deadlock."""
    y = np.zeros(32, np.uint32)
    body = """mov.u32 %r1, %t; setp.lt.u32 %p0, %t, 9; @%p0 bra.uni F; bra.uni S;
      F: add.u32 %r1, %r1, 100; S: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
      mad.wide.u32 %A0, %t, 4, %P0; st.global.u32 [%A0], %r2;"""
    kernel(body, 1).launch("k", 1, 32, [y])
    t = np.arange(32) ^ 1
    assert np.array_equal(y, t + 100 * (t < 9))
    with pytest.raises(DeadlockError, match=r"shfl\.sync"):
        kernel(
            "setp.lt.u32 %p0, %t, 9; @%p0 bra W; shfl.sync.bfly.b32 %r2, %t, 1, 31, -1; bra E; W: bar.sync 0; E:", 1
        ).launch("k", 1, 32, [y])


def test_argument_errors():
    m = kernel("", 2)
    with pytest.raises(SimError):
        m.launch("k", 1, 32, [1, 2, 3])
    m.launch("k", 1, 32, [np.zeros(4)])  # missing pointers are null


def test_structures_by_value():
    """Their pointers become addresses of the simulator's; what they do not point at is out of bounds."""
    module = Module(f"""{HEAD}
.visible .entry k(.param .align 8 .b8 p[24])
{{
  .reg .b64 %d<4>; .reg .u32 %r<4>;
  ld.param.u64 %d1, [p]; ld.param.u32 %r1, [p+8]; ld.param.u64 %d2, [p+16];
  ld.global.u32 %r2, [%d2+4];
  add.u32 %r3, %r1, %r2;
  st.global.u32 [%d1], %r3;
  ret;
}}""")
    out, given = torch.zeros(1, dtype=torch.int32), torch.tensor([1, 20], dtype=torch.int32)
    data = bytes(8) + (300).to_bytes(8, "little") + bytes(8)
    stats = module.launch("k", 1, 1, [Struct(data, [(0, out, "out"), (16, given, "given")])])
    assert out.item() == 320
    assert stats.buffers["given"].loaded == stats.buffers["out"].stored == 4
    with pytest.raises(MemoryFault, match="given"):
        module.launch("k", 1, 1, [Struct(data, [(0, out, "out"), (16, given[:1], "given")])])
