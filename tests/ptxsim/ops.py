"""Arithmetic instructions: each ``b_NAME`` method turns one Instr into ``step(ix)``.

``ix`` selects the active lanes (a slice where they are contiguous, else a sorted index array). Views of the registers
are bound once, when a kernel is built, so that a step is a few numpy calls over all lanes of a batch of blocks.
"""

from dataclasses import replace

import numpy as np

from . import fp
from .fp import F16, F32, F64, I64, U16, U32, U64
from .parser import TYPE_SIZE

UINT = {1: np.uint8, 2: U16, 4: U32, 8: U64}
SINT = {1: np.int8, 2: np.int16, 4: np.int32, 8: I64}
DT = {
    "pred": np.bool_,
    **{f"{kind}{8 * size}": dtype for size, dtype in UINT.items() for kind in "bu"},
    **{f"s{8 * size}": dtype for size, dtype in SINT.items()},
    **{"f16": F16, "bf16": U16, "f32": F32, "f64": F64, "f16x2": U32, "bf16x2": U32, "f32x2": U64},
}
FLOATS = ("f16", "bf16", "f32", "f64")
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
DIRECTED = ("rz", "rm", "rp")
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARE |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
LOW_HALF = U64(0xFFFFFFFF)


class Sink:
    """The destination of a result that is dropped."""

    def __setitem__(self, ix, values):
        pass


class Negated:
    """A predicate register read with ``!``."""

    def __init__(self, register):
        self.register = register

    def __getitem__(self, ix):
        return ~self.register[ix]


# Integers ---------------------------------------------------------------------------------------------------------


def _mul_hi_u64(a, b):
    s = U64(32)
    a_low, a_high, b_low, b_high = a & LOW_HALF, a >> s, b & LOW_HALF, b >> s
    m1, m2 = a_low * b_high, a_high * b_low
    carry = (a_low * b_low >> s) + (m1 & LOW_HALF) + (m2 & LOW_HALF)
    return a_high * b_high + (m1 >> s) + (m2 >> s) + (carry >> s)


def mul_hi(a, b):
    """The upper half of a product."""
    size = a.dtype.itemsize
    if size < 8:
        wide = I64 if a.dtype.kind == "i" else U64
        return (a.astype(wide) * b.astype(wide) >> wide(8 * size)).astype(a.dtype)
    if a.dtype.kind == "u":
        return _mul_hi_u64(a, b)
    high = _mul_hi_u64(a.view(U64), b.view(U64)).view(I64)
    return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)


def divide(a, b):
    """C's division: truncates toward zero; x / 0 gives all ones."""
    zero = b == 0
    b = np.where(zero, b.dtype.type(1), b)
    quotient = a // b
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)
        quotient = np.where(b == -1, -a, quotient)
    return np.where(zero, np.array(-1).astype(a.dtype), quotient)


def remainder(a, b):
    return np.where(b == 0, a, a - divide(a, b) * b).astype(a.dtype)


def shift(a, n, left):
    """Shifts by the type's width or more give 0, or copies of the sign."""
    bits = 8 * a.dtype.itemsize
    n = n.astype(U64)
    far = n >= U64(bits)
    n = np.where(far, U64(bits - 1), n).astype(a.dtype)
    if left:
        return np.where(far, a.dtype.type(0), a << n)
    moved = a >> n
    return moved if a.dtype.kind == "i" else np.where(far, a.dtype.type(0), moved)


def funnel_shift(a, b, n, left, wrap):
    n = ((n & U32(31)) if wrap else np.minimum(n, U32(32))).astype(U64)
    both = (b.astype(U64) << U64(32)) | a
    return ((both >> (U64(32) - n)) if left else (both >> n)).astype(U32)


def leading_zeros(a):
    bits = 8 * a.dtype.itemsize
    count, rest = np.full(a.shape, bits, U32), a.copy()
    for s in (32, 16, 8, 4, 2, 1):
        if s < bits:
            upper = rest >> rest.dtype.type(s)
            some = upper != 0
            count = np.where(some, count - U32(s), count)
            rest = np.where(some, upper, rest)
    return (count - (rest != 0)).astype(U32)


def reverse_bits(a):
    one, bits = a.dtype.type(1), 8 * a.dtype.itemsize
    out = np.zeros_like(a)
    for k in range(bits):
        out |= ((a >> a.dtype.type(k)) & one) << a.dtype.type(bits - 1 - k)
    return out


def _ones(count):
    """``count`` low bits of 64."""
    return np.where(count >= 64, ~U64(0), (U64(1) << np.minimum(count, U64(63))) - U64(1))


def extract_bits(a, position, length, signed, bits):
    position, length = (position & U32(255)).astype(U64), (length & U32(255)).astype(U64)
    x = a.astype(I64).view(U64) if signed else a.astype(U64)
    field = np.where(position < bits, (x & _ones(U64(bits))) >> np.minimum(position, U64(63)), U64(0)) & _ones(length)
    if signed:
        top = np.minimum(position + np.maximum(length, U64(1)) - U64(1), U64(bits - 1))
        there = _ones(np.where(position < bits, U64(bits) - np.minimum(position, U64(bits)), U64(0)))
        sign = (x >> np.minimum(top, U64(63))) & U64(1)
        field = np.where((sign == 1) & (length > 0), field | ~(_ones(length) & there), field)
    return np.where(length == 0, U64(0), field)


def insert_bits(a, b, position, length, bits):
    position, length = (position & U32(255)).astype(U64), np.minimum(length & U32(255), U32(bits)).astype(U64)
    s = np.minimum(position, U64(63))
    mask = np.where(position >= bits, U64(0), _ones(length) << s)
    return (b.astype(U64) & ~mask) | ((a.astype(U64) << s) & mask)


def permute_bytes(a, b, selector):
    source = (b.astype(U64) << U64(32)) | a
    out = np.zeros(a.shape, U32)
    for k in range(4):
        pick = (selector >> U32(4 * k)) & U32(15)
        byte = (source >> ((pick & U32(7)).astype(U64) * U64(8))).astype(np.uint8)
        byte = np.where(pick & U32(8), (byte.view(np.int8) >> 7).view(np.uint8), byte)
        out |= byte.astype(U32) << U32(8 * k)
    return out


def lookup(a, b, c, table):
    """lop3: any function of three bits."""
    out = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


# Floats -----------------------------------------------------------------------------------------------------------


def saturate(x):
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)


def relu(x):
    return np.where(np.isnan(x), x, np.maximum(x, x.dtype.type(0)))


def float_compare(op):
    """The comparison ``op`` of two float arrays; those ending in u hold for NaN too."""
    if op in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (op == "nan")
    if op == "ne":  # ordered
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if op.endswith("u"):
        compare = COMPARE[op[:-1]]
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return COMPARE[op]


def widening(ty):
    """Storage form -> float array to compute on."""
    return {"bf16": fp.from_bf16, "f16": lambda a: a.astype(F32)}.get(ty, lambda a: a)


def narrowing(ty):
    """float32 -> storage form."""
    return {"bf16": fp.to_bf16, "f16": lambda a: a.astype(F16)}.get(ty, lambda a: a)


def _by_float64(f):
    """``.approx`` functions are computed in float64: closer to the truth than hardware."""
    return lambda a: f(a.astype(F64)).astype(a.dtype)


def _extremum(largest, nan, dtype):
    def pick(a, b, *c):
        picked = fp.min_max(a, b, largest, nan, dtype)
        return fp.min_max(picked, c[0], largest, nan, dtype) if c else picked

    return pick


def _float_core(base, dtype, nan, mode="rn"):
    """The operation on plain float32 or float64 arrays."""
    if mode != "rn":
        return _directed_core(base, dtype, mode)
    if base in ("fma", "mad"):
        return fp.fma64 if dtype is F64 else fp.fma32
    if base in ("min", "max"):
        return _extremum(base == "max", nan, dtype)
    return {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "neg": np.negative,
        "abs": np.abs,
        "sqrt": np.sqrt,
        "rcp": lambda a: dtype(1) / a,
        "rsqrt": _by_float64(lambda a: 1.0 / np.sqrt(a)),
        "ex2": _by_float64(np.exp2),
        "lg2": _by_float64(np.log2),
        "sin": _by_float64(np.sin),
        "cos": _by_float64(np.cos),
        "tanh": _by_float64(np.tanh),
    }[base]


def _directed_core(base, dtype, mode):
    """add, sub, mul and fma of float32 rounded toward zero or an infinity: parts of nvcc's expf and divisions."""
    f = {
        "add": lambda a, b: fp.fma32(a, F32(1), b, mode),
        "sub": lambda a, b: fp.fma32(b, F32(-1), a, mode),
        "mul": lambda a, b: fp.fma32(a, b, F32(0), mode),
        "fma": lambda a, b, c: fp.fma32(a, b, c, mode),
    }.get(base)
    if f is None or dtype is not F32:
        raise NotImplementedError(f"{base} with .{mode}")
    return f


def _half_core(base, ty, nan):
    """The operation on float16 or bfloat16 arrays in storage form, rounded once."""
    bf16 = ty == "bf16"
    if base in ("neg", "abs"):
        sign = U16(0x8000)
        return lambda a: ((a.view(U16) ^ sign) if base == "neg" else (a.view(U16) & ~sign)).view(a.dtype)
    if base in ("add", "sub", "fma", "mad"):
        one, minus = (U16(0x3F80), U16(0xBF80)) if bf16 else (F16(1), F16(-1))
        if base == "add":
            return lambda a, b: fp.fma_half(b, np.full_like(b, one), a, bf16)
        if base == "sub":
            return lambda a, b: fp.fma_half(b, np.full_like(b, minus), a, bf16)
        return lambda a, b, c: fp.fma_half(a, b, c, bf16)
    core, wide, narrow = _float_core(base, F32, nan), widening(ty), narrowing(ty)
    return lambda *a: narrow(core(*[wide(x) for x in a]))


def float_function(base, ty, mods):
    """The function of an instruction on arrays in storage form of one scalar float type."""
    nan, mode = "NaN" in mods, next((m for m in mods if m in DIRECTED), "rn")
    if ty in ("f32", "f64"):
        f = _float_core(base, DT[ty], nan, mode)
    elif mode == "rn":
        f = _half_core(base, ty, nan)
    else:
        raise NotImplementedError(f"{base} of {ty} with .{mode}")
    if "ftz" in mods and ty == "f32":
        f = _flushed(f)
    for name, post in (("sat", saturate), ("relu", relu)):
        if name in mods:
            f = _followed(f, lambda x, post=post: narrowing(ty)(post(widening(ty)(x))))
    return f


def _flushed(f):
    return lambda *a: fp.ftz(f(*[fp.ftz(x) for x in a]))


def _followed(f, post):
    return lambda *a: post(f(*a))


def packed(f, ty):
    """A scalar function lifted to two values in one integer (f16x2, bf16x2, f32x2, s16x2, u16x2)."""
    element = DT[PACKED.get(ty, ty[:-2])]
    whole = UINT[2 * np.dtype(element).itemsize]

    def lifted(*a):
        out = f(*[np.ascontiguousarray(x).view(element) for x in a])
        return np.ascontiguousarray(out.astype(element, copy=False)).view(whole)

    return lifted


# Conversions ------------------------------------------------------------------------------------------------------


def conversion(dty, sty, mods):
    """The function of cvt between scalar types, on arrays in storage form."""
    if dty not in DT or sty not in DT or dty in PACKED or sty in PACKED:
        raise NotImplementedError(f"cvt between {sty} and {dty}")
    integral = next((m for m in mods if m in fp.INTEGRAL), None)
    if dty not in FLOATS:
        if sty not in FLOATS:
            return _int_to_int(DT[dty], DT[sty], "sat" in mods)
        read = _flushing(widening(sty), sty, mods)
        nan_is_top = sty == "f64" or dty in ("s64", "u64")
        return lambda a: fp.float_to_int(read(a), DT[dty], integral or "rzi", nan_is_top)
    f = _int_to_float(dty, mods) if sty not in FLOATS else _float_to_float(dty, sty, mods, integral)
    if "sat" in mods or "relu" in mods:
        post = saturate if "sat" in mods else relu
        wide, narrow = widening(dty), narrowing(dty)
        return lambda a: narrow(post(wide(f(a))))
    return f


def _flushing(f, ty, mods):
    return (lambda a: fp.ftz(f(a))) if "ftz" in mods and ty == "f32" else f


def _int_to_int(to, source, clamp):
    if not clamp:
        return lambda a: a.astype(to)
    low, high = (source(f(np.iinfo(to), np.iinfo(source))) for f in (_lowest, _highest))
    return lambda a: np.clip(a, low, high).astype(to)


def _lowest(a, b):
    return max(a.min, b.min)


def _highest(a, b):
    return min(a.max, b.max)


def _int_to_float(dty, mods):
    if any(mode in mods for mode in DIRECTED):
        raise NotImplementedError("conversion of an integer with directed rounding")
    if dty == "bf16":
        return lambda a: fp.to_bf16(fp.odd32(a.astype(F64)))
    return lambda a: fp.int_to_float(a, DT[dty])


def _float_to_float(dty, sty, mods, integral):
    mode = next((m for m in mods if m in ("rn", "rz", "rm", "rp", "rna")), "rn")
    read = _flushing(widening(sty), sty, mods)
    if integral:
        read = _followed(read, fp.INTEGRAL[integral])
    elif sty == "f64" and dty == "bf16":
        read = _followed(read, fp.odd32)
    elif sty == dty == "bf16":
        return lambda a: a
    if dty == "bf16":
        return lambda a: fp.to_bf16(read(a).astype(F32), mode)
    if mode != "rn":
        raise NotImplementedError(f"conversion with .{mode}")
    return _flushing(lambda a: read(a).astype(DT[dty]), dty, mods)


class Arithmetic:
    """Mixin of Machine, which provides src() and dst()."""

    def simple(self, ins, f, to, sources):
        """A step that writes f of the sources, with the types given, to the first operand."""
        out = self.dst(ins.args[0], to)
        read = [self.src(operand, ty) for operand, ty in zip(ins.args[1:], sources, strict=False)]
        if len(read) == 1:
            (a,) = read

            def step(ix):
                out[ix] = f(a[ix])
        elif len(read) == 2:
            a, b = read

            def step(ix):
                out[ix] = f(a[ix], b[ix])
        else:

            def step(ix):
                out[ix] = f(*[s[ix] for s in read])

        return step

    def arith(self, ins, integers=None):
        """add, sub, mul, fma, min, max, ... on any scalar or packed type."""
        ty, n = ins.mods[-1], len(ins.args) - 1
        if ty in ("f16", "bf16") and "f32" in ins.mods:  # mixed precision: the last operand is float32
            f, wide = float_function(ins.base, "f32", ins.mods[:-2]), widening(ty)
            k = 2 if ins.base == "fma" else 1
            return self.simple(ins, lambda *a: f(*[wide(x) for x in a[:k]], a[k]), "f32", [ty] * k + ["f32"])
        if ty in FLOATS:
            return self.simple(ins, float_function(ins.base, ty, ins.mods), ty, [ty] * n)
        if ty in PACKED:
            return self.simple(ins, packed(float_function(ins.base, PACKED[ty], ins.mods), ty), ty, [ty] * n)
        if ty in ("s16x2", "u16x2"):
            return self.simple(ins, packed(integers, ty), "b32", ["b32"] * n)
        if integers is None:
            raise NotImplementedError(ins.text)
        f = integers
        if "sat" in ins.mods:
            info = np.iinfo(DT[ty])
            f = _followed(lambda *a: integers(*[x.astype(I64) for x in a]), lambda x: x.clip(info.min, info.max))
        if "relu" in ins.mods:
            f = _followed(f, lambda x: np.maximum(x, 0))
        return self.simple(ins, lambda *a: f(*a).astype(DT[ty], copy=False), ty, [ty] * n)

    def b_add(self, ins):
        return self.arith(ins, np.add)

    def b_sub(self, ins):
        return self.arith(ins, np.subtract)

    def b_min(self, ins):
        return self.arith(ins, np.minimum)

    def b_max(self, ins):
        return self.arith(ins, np.maximum)

    def b_neg(self, ins):
        return self.arith(ins, np.negative)

    def b_abs(self, ins):
        return self.arith(ins, np.abs)

    def b_div(self, ins):
        return self.arith(ins, divide)

    def b_rem(self, ins):
        return self.arith(ins, remainder)

    def b_fma(self, ins):
        return self.arith(ins)

    b_ex2 = b_lg2 = b_rcp = b_sqrt = b_rsqrt = b_sin = b_cos = b_tanh = b_fma

    def product(self, ins):
        """(result type, function) of integer mul and mad."""
        ty = ins.mods[-1]
        if "wide" in ins.mods:
            wide = ty[0] + str(2 * int(ty[1:]))
            return wide, lambda a, b: a.astype(DT[wide]) * b.astype(DT[wide])
        return ty, mul_hi if "hi" in ins.mods else np.multiply

    def b_mul(self, ins):
        ty = ins.mods[-1]
        if ty in FLOATS or ty in PACKED:
            return self.arith(ins)
        to, f = self.product(ins)
        return self.simple(ins, f, to, [ty] * 2)

    def b_mad(self, ins):
        ty = ins.mods[-1]
        if ty in FLOATS or ty in PACKED:
            return self.arith(ins)
        if "sat" in ins.mods:
            raise NotImplementedError(ins.text)
        to, f = self.product(ins)
        return self.simple(ins, lambda a, b, c: f(a, b) + c, to, [ty, ty, to])

    # Bits

    def bitwise(self, ins, f):
        ty = ins.mods[-1]
        return self.simple(ins, f, ty, [ty] * (len(ins.args) - 1))

    def b_and(self, ins):
        return self.bitwise(ins, np.bitwise_and)

    def b_or(self, ins):
        return self.bitwise(ins, np.bitwise_or)

    def b_xor(self, ins):
        return self.bitwise(ins, np.bitwise_xor)

    def b_not(self, ins):
        return self.bitwise(ins, np.invert)

    def b_lop3(self, ins):
        table = ins.args[4][1]
        ins = replace(ins, args=ins.args[:4])
        return self.simple(ins, lambda a, b, c: lookup(a, b, c, table), "b32", ["b32"] * 3)

    def b_shl(self, ins):
        return self.simple(ins, lambda a, n: shift(a, n, True), ins.mods[-1], [ins.mods[-1], "u32"])

    def b_shr(self, ins):
        return self.simple(ins, lambda a, n: shift(a, n, False), ins.mods[-1], [ins.mods[-1], "u32"])

    def b_shf(self, ins):
        left, wrap = ins.mods[0] == "l", "wrap" in ins.mods
        return self.simple(ins, lambda a, b, n: funnel_shift(a, b, n, left, wrap), "b32", ["b32"] * 3)

    def b_bfe(self, ins):
        ty = ins.mods[-1]
        signed, bits = ty[0] == "s", 8 * TYPE_SIZE[ty]

        def f(a, position, length):
            return extract_bits(a, position, length, signed, bits).astype(UINT[bits // 8]).view(DT[ty])

        return self.simple(ins, f, ty, [ty, "u32", "u32"])

    def b_bfi(self, ins):
        ty = ins.mods[-1]

        def f(a, b, position, length):
            return insert_bits(a, b, position, length, 8 * TYPE_SIZE[ty]).astype(DT[ty])

        return self.simple(ins, f, ty, [ty, ty, "u32", "u32"])

    def b_popc(self, ins):
        return self.simple(ins, lambda a: np.bitwise_count(a).astype(U32), "u32", [ins.mods[-1]])

    def b_clz(self, ins):
        return self.simple(ins, leading_zeros, "u32", [ins.mods[-1]])

    def b_bfind(self, ins):
        """The position of the highest bit that is not the sign, or how far to shift it to the top; -1 for none."""
        ty = ins.mods[-1]
        bits = 8 * TYPE_SIZE[ty]

        def f(a):
            magnitude = np.where(a < 0, ~a, a).astype(UINT[bits // 8])
            zeros = leading_zeros(magnitude)
            position = zeros if "shiftamt" in ins.mods else U32(bits - 1) - zeros
            return np.where(magnitude == 0, U32(0xFFFFFFFF), position)

        return self.simple(ins, f, "u32", [ty])

    def b_brev(self, ins):
        return self.simple(ins, reverse_bits, ins.mods[-1], [ins.mods[-1]])

    def b_prmt(self, ins):
        return self.simple(ins, permute_bytes, "b32", ["b32"] * 3)

    # Moves, selects, compares

    def b_mov(self, ins):
        to, source = ins.args
        ty = ins.mods[-1]
        if source[0] == "v":
            return self.pack_elements(to, source[1], TYPE_SIZE[ty])
        if to[0] == "v":
            return self.unpack_elements(to[1], source, TYPE_SIZE[ty])
        return self.simple(ins, lambda a: a, ty, [ty])

    def pack_elements(self, to, sources, size):
        n = 8 * size // len(sources)
        read = [self.src(operand, f"b{n}") for operand in sources]
        out, whole = self.dst(to, f"b{8 * size}"), UINT[size]

        def step(ix):
            packed = read[0][ix].astype(whole)
            for k in range(1, len(read)):
                packed = packed | (read[k][ix].astype(whole) << whole(n * k))
            out[ix] = packed

        return step

    def unpack_elements(self, targets, source, size):
        n = size // len(targets)
        read = self.src(source, f"b{8 * size}")
        outs = [self.dst(operand, f"b{8 * n}") for operand in targets]

        def step(ix):
            elements = np.array(read[ix]).view(UINT[n])
            for k, out in enumerate(outs):
                out[ix] = elements[k :: len(outs)]

        return step

    def b_selp(self, ins):
        ty = ins.mods[-1]
        return self.simple(ins, lambda a, b, p: np.where(p, a, b), ty, [ty, ty, "pred"])

    def comparison(self, mods):
        """setp's comparison of arrays in storage form."""
        ty, op = mods[-1], mods[0]
        element = PACKED.get(ty, ty)
        if element not in FLOATS:
            return COMPARE[op]
        compare, wide = float_compare(op), _flushing(widening(element), element, mods)
        return lambda a, b: compare(wide(a), wide(b))

    def b_setp(self, ins):
        """Two results: the comparison and its negation, or for packed types one a half."""
        f, ty = self.comparison(ins.mods), ins.mods[-1]
        first, second = ins.args[0][1:] if ins.args[0][0] == "pair" else (ins.args[0], ("_",))
        out, out2 = self.dst(first, "pred"), self.dst(second, "pred")
        a, b = self.src(ins.args[1], ty), self.src(ins.args[2], ty)
        combine = next((COMBINE[m] for m in ins.mods if m in COMBINE), None)
        c = self.src(ins.args[3], "pred") if combine else None
        halves = DT[PACKED[ty]] if ty in PACKED else None

        def step(ix):
            if halves is None:
                result = f(a[ix], b[ix])
                other = ~result
            else:
                both = f(np.ascontiguousarray(a[ix]).view(halves), np.ascontiguousarray(b[ix]).view(halves))
                result, other = both[::2], both[1::2]
            if c is not None:
                given = c[ix]
                result, other = combine(result, given), combine(other, given)
            out[ix] = result
            out2[ix] = other

        return step

    def b_copysign(self, ins):
        ty = ins.mods[-1]
        return self.simple(ins, lambda a, b: np.copysign(b, a), ty, [ty] * 2)

    def b_cvt(self, ins):
        to, source = ins.mods[-2:]
        if to in ("f16x2", "bf16x2") and source == "f32":
            one = conversion(to[:-2], "f32", ins.mods)

            def f(high, low):
                high, low = (np.ascontiguousarray(one(x)).view(U16).astype(U32) for x in (high, low))
                return low | (high << U32(16))

            return self.simple(ins, f, "b32", ["f32", "f32"])
        return self.simple(ins, conversion(to, source, ins.mods), to, [source])
