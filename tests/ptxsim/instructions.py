"""What is known about instructions as such: the modifiers understood, and the class each is counted in."""

from .parser import TYPE_SIZE

MUFU = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"}
FLOAT_ALU = {"add", "sub", "mul", "fma", "mad", "min", "max", "neg", "abs", "setp", "div", "copysign"}
MATRIX_MOVES = {"ldmatrix", "stmatrix"}
WARP_SYNC = {"shfl", "vote", "redux", *MATRIX_MOVES}
#: Without effect on a functional simulation.
NO_OPS = {"fence", "membar", "prefetch", "prefetchu", "griddepcontrol", "nanosleep", "discard", "applypriority"}
NO_OPS |= {"setmaxnreg", "pmevent"}
#: Instructions with which a kernel orders what its blocks do to global memory.
BETWEEN_BLOCKS = {"atom", "red", "fence", "membar"}

_ROUND, _SPACE = "rn rz rm rp ", "global shared shared::cta shared::cluster local const param param::entry param::func "
_MEMORY = "relaxed acquire release acq_rel weak volatile cta cluster gpu sys v2 v4 v8 "
_COMPARE = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz"
#: The modifiers of each instruction, types and cache hints aside; any other is refused rather than ignored.
_MODIFIERS = {
    "add": _ROUND + "ftz sat",
    "sub": _ROUND + "ftz sat",
    "mul": _ROUND + "ftz sat lo hi wide",
    "fma": _ROUND + "ftz sat relu",
    "mad": _ROUND + "ftz sat lo hi wide",
    "div": "rn approx full ftz",
    "sqrt": "rn approx ftz",
    "rcp": "rn approx ftz",
    "min": "ftz NaN relu",
    "max": "ftz NaN relu",
    "neg": "ftz",
    "abs": "ftz",
    **dict.fromkeys(("ex2", "lg2", "rsqrt", "sin", "cos", "tanh"), "approx ftz"),
    "setp": _COMPARE,
    "cvt": _ROUND + "rna rni rzi rmi rpi ftz sat relu",
    "shf": "l r wrap clamp",
    "bfind": "shiftamt",
    "ld": _SPACE + _MEMORY + "nc ca cg cs cv lu mmio",
    "ldu": _SPACE + _MEMORY,
    "st": _SPACE + _MEMORY + "wb cg cs wt mmio",
    "atom": _SPACE + _MEMORY + "add min max and or xor exch cas inc dec noftz",
    "red": _SPACE + _MEMORY + "add min max and or xor inc dec noftz",
    "cvta": _SPACE + "to",
    "isspacep": _SPACE,
    "mapa": _SPACE,
    "getctarank": _SPACE,
    "cp": _SPACE + "async ca cg commit_group wait_group wait_all",
    **dict.fromkeys(MATRIX_MOVES, _SPACE + "sync aligned m8n8 x1 x2 x4 trans"),
    "shfl": "sync up down bfly idx",
    "vote": "sync any all uni ballot",
    "redux": "sync add min max and or xor abs NaN",
    "bar": "sync arrive red warp cta popc and or aligned",
    "barrier": "sync arrive red cta cluster wait release acquire relaxed aligned popc and or",
    "bra": "uni",
    "brx": "idx uni",
    "ret": "uni",
}
_UNDERSTOOD = {base: set(names.split()) for base, names in _MODIFIERS.items()}


def check_modifiers(ins):
    """NotImplementedError for a modifier that is not understood."""
    if ins.base in NO_OPS or ins.base in ("extcall", "createpolicy"):
        return
    understood = _UNDERSTOOD.get(ins.base, set())
    for modifier in ins.mods:
        known = modifier in understood or modifier in TYPE_SIZE or modifier in ("s16x2", "u16x2")
        if not known and not modifier.startswith(("L1::", "L2::")):
            raise NotImplementedError(f"modifier .{modifier}")


def classify(ins):
    """The class an instruction is counted in."""
    base, mods = ins.base, ins.mods
    if base in ("ld", "st", "ldu", "cp", *MATRIX_MOVES):
        return "other" if any(m.startswith("param") for m in mods) else "ldst"
    for name, bases in _CLASSES.items():
        if base in bases:
            return name
    ty = mods[-1] if mods else ""
    if base in MUFU or (base == "div" and ty == "f32" and mods[0] in ("approx", "full")):
        return "mufu"
    if base in FLOAT_ALU and ty in _FLOAT_CLASSES:
        return _FLOAT_CLASSES[ty]
    return "int"


_CLASSES = {
    "atomic": {"atom", "red"},
    "shfl": WARP_SYNC,
    "bar": {"bar", "barrier"},
    "branch": {"bra", "brx", "ret", "exit"},
    "cvt": {"cvt"},
    "other": {"mov", "selp", "cvta", "isspacep", "mapa", "createpolicy", *NO_OPS},
}
_FLOAT_CLASSES = {"f32": "fp32", "f32x2": "fp32", "f64": "fp64"}
_FLOAT_CLASSES |= dict.fromkeys(("f16", "bf16", "f16x2", "bf16x2"), "fp16")
