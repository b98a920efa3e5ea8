"""Floating-point rounding as PTX defines it, on numpy arrays.

bfloat16 values live in uint16 arrays, float16 in float16. What PTX rounds once is rounded once here: from an exact
intermediate, or from a float64 and its error term.
"""

import numpy as np

F16, F32, F64 = np.float16, np.float32, np.float64
U16, U32, U64, I64 = np.uint16, np.uint32, np.uint64, np.int64
INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def ftz(x):
    """Flushes float32 subnormals to a zero of the same sign."""
    bits = x.view(U32)
    return np.where((bits & U32(0x7F800000)) == 0, bits & U32(0x80000000), bits).view(F32)


def from_bf16(bits):
    """bfloat16 bits -> float32."""
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(x, mode="rn"):
    """float32 -> bfloat16 bits, to nearest even ("rn") or toward zero ("rz")."""
    bits = x.view(U32)
    if mode == "rn":
        bits = bits + (((bits >> U32(16)) & U32(1)) + U32(0x7FFF))
    elif mode != "rz":
        raise NotImplementedError(f"conversion to bf16 with .{mode}")
    return np.where(np.isnan(x), U16(0x7FFF), (bits >> U32(16)).astype(U16))


def _to_odd(x, error, rounded, wide):
    """An inexact ``rounded`` moved to its odd neighbour on the error's side, so that rounding again is exact."""
    bits = rounded.view({4: U32, 8: U64}[rounded.itemsize])
    fix = (error != 0) & ((bits & bits.dtype.type(1)) == 0) & np.isfinite(x) & np.isfinite(error)
    if not fix.any():
        return rounded
    return np.where(fix, np.nextafter(rounded, np.where(error > 0, wide(np.inf), wide(-np.inf))), rounded)


def odd32(x, error=None):
    """float64, plus an error term, rounded to odd in float32: a narrower rounding of the result is exact."""
    rounded = x.astype(F32)
    difference = x - rounded.astype(F64)
    if error is not None:
        difference = np.where(difference == 0, error, difference)
    return _to_odd(x, difference, rounded, F32)


def two_sum(a, b):
    """a + b in float64 and what that rounding lost."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def directed32(s, error, mode):
    """s + error, where s is that sum rounded to float64, rounded to float32 toward zero, -inf or inf (rz, rm, rp)."""
    rounded = s.astype(F32)
    wide = rounded.astype(F64)
    above = (wide > s) | ((wide == s) & (error < 0))
    below = (wide < s) | ((wide == s) & (error > 0))
    negative = (s < 0) | ((s == 0) & (error < 0))
    down = above if mode == "rm" else above & ~negative
    up = below if mode == "rp" else below & negative
    if mode != "rp":
        rounded = np.where(down, np.nextafter(rounded, F32(-np.inf)), rounded)
    if mode != "rm":
        rounded = np.where(up, np.nextafter(rounded, F32(np.inf)), rounded)
    return rounded


def fma32(a, b, c, mode="rn"):
    """a * b + c with one rounding: the product is exact in float64, only ties of the sum need its error term."""
    product, c = a.astype(F64) * b.astype(F64), c.astype(F64)
    if mode != "rn":
        return directed32(*two_sum(product, c), mode)
    s = product + c
    rounded = s.astype(F32)
    # The sum sits on a midpoint of float32, or is too small for the midpoints to be where they are looked for.
    tie = ((s.view(U64) & U64(0x1FFFFFFF)) == 0x10000000) | ((np.abs(s) < 1.2e-38) & (s != 0))
    if tie.any():
        at = np.nonzero(tie)
        s, error = two_sum(product[at], c[at])
        rounded[at] = _to_odd(s, error, s, F64).astype(F32)
    return rounded


def _halves(a):
    t = a * 134217729.0
    high = t - (t - a)
    return high, a - high


def fma64(a, b, c):
    """float64 fused multiply-add by double-double arithmetic (right but for the last bit of rare ties)."""
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    s, t = two_sum(product, c)
    exact = s + (t + error)
    return np.where(np.isfinite(exact) & (np.abs(product) > 1e-290), exact, product + c)


def fma_half(a, b, c, bf16):
    """float16 or bfloat16 fused multiply-add."""
    if bf16:
        a, b, c = from_bf16(a), from_bf16(b), from_bf16(c)
    rounded = odd32(*two_sum(a.astype(F64) * b.astype(F64), c.astype(F64)))
    return to_bf16(rounded) if bf16 else rounded.astype(F16)


def min_max(a, b, largest, nan=False, dtype=F32):
    """PTX min / max: a NaN operand is dropped unless ``nan``; -0 < +0."""
    bits = {2: U16, 4: U32, 8: U64}[np.dtype(dtype).itemsize]
    picked = (np.fmax if largest else np.fmin)(a, b)
    zero = (a.view(bits) & b.view(bits)) if largest else (a.view(bits) | b.view(bits))
    picked = np.where(a == b, zero.view(dtype), picked)
    if nan:
        canonical = np.array(np.iinfo(bits).max >> 1, bits).view(dtype)
        picked = np.where(np.isnan(a) | np.isnan(b), canonical, picked)
    return picked


def float_to_int(x, dtype, mode, nan_is_top=False):
    """Rounds to an integer, clamps to the range; NaN becomes 0, or the top bit alone."""
    x = INTEGRAL[mode](x.astype(F64))
    info = np.iinfo(dtype)
    under, over, nan = x <= float(info.min), x >= float(info.max), np.isnan(x)
    out = np.where(under | over | nan, 0.0, x).astype(dtype)
    out = np.where(under, dtype(info.min), np.where(over, dtype(info.max), out))
    top = dtype(info.min) if info.min < 0 else dtype((int(info.max) >> 1) + 1)
    return np.where(nan, top if nan_is_top else dtype(0), out).astype(dtype)


def int_to_float(x, dtype):
    """Integer to float64, float32 or float16, to nearest."""
    return x.astype(F32).astype(dtype) if dtype is F16 and x.dtype.itemsize == 8 else x.astype(dtype)
