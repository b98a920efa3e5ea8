"""Parser for the PTX text that nvcc and Triton emit.

Function bodies are flattened to a list of `Instr` with unique register names
(nested `{ }` scopes and inlined `.func` calls get renamed registers, labels
and variables), so the executor never sees scopes or calls.

Operands are tuples:
  ('r', name) register        ('i', int) integer        ('f', bits, 4|8) 0f../0d..
  ('d', float) decimal float  ('s', name) symbol        ('sr', name) special register
  ('v', [ops]) vector         ('m', base_op, offset)    ('n', op) negated predicate
  ('pair', a, b) "a|b"        ('_',) sink               ('t', [ops]) parenthesised list
"""

import re
from dataclasses import dataclass, field

TYPE_SIZE = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "f32x2": 8,
    "b128": 16,
}

TOKEN = re.compile(
    r"""
    (?P<str>"(?:\\.|[^"\\])*") |
    (?P<flt>0[fF][0-9A-Fa-f]{8}\b|0[dD][0-9A-Fa-f]{16}\b) |
    (?P<dec>\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+) |
    (?P<num>0[xX][0-9A-Fa-f]+U?|0[bB][01]+U?|\d+U?) |
    (?P<id>[A-Za-z_$%.][\w$%.]*(?:::[\w$%.]+)*) |
    (?P<op>[{}()\[\],;:<>=+\-*/!|@&~?]) |
    (?P<ws>\s+) | (?P<bad>.)""",
    re.X,
)


@dataclass(slots=True)
class Tok:
    kind: str
    s: str
    pos: int
    line: int


@dataclass(slots=True)
class Instr:
    op: str  # full opcode, e.g. "ld.global.v4.b32"
    base: str  # "ld"
    mods: tuple  # ("global", "v4", "b32")
    args: list
    pred: tuple | None  # (register, negated)
    line: int
    text: str
    targets: list | None = None  # resolved branch targets (pcs)
    pc: int = -1


@dataclass
class Var:
    space: str
    name: str
    size: int  # bytes; 0 for extern arrays
    align: int
    init: list | None = None  # list of (offset, size, value) or symbol names
    extern: bool = False
    offset: int | None = None  # filled in by the machine


@dataclass
class Param:
    name: str
    size: int
    align: int
    type: str
    array: bool


@dataclass
class Kernel:
    name: str
    params: list
    instrs: list = field(default_factory=list)
    regs: dict = field(default_factory=dict)  # unique name -> type string
    vars: dict = field(default_factory=dict)  # unique name -> Var (shared / local / param slots)
    labels: dict = field(default_factory=dict)
    reqntid: tuple | None = None
    cluster: tuple | None = None


class ParseError(Exception):
    pass


def strip_noise(text):
    """Blank out comments, .loc/.file lines and debug sections, keeping line numbers."""

    def blank(match):
        return re.sub(r"[^\n]", " ", match.group(0))

    text = re.sub(r"/\*.*?\*/", blank, text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    cut = re.search(r"^[ \t]*\.section\b", text, flags=re.M)
    if cut:
        text = text[: cut.start()]
    return re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*", blank, text, flags=re.M)


def tokenize(text):
    toks, line = [], 1
    for m in TOKEN.finditer(text):
        k = m.lastgroup
        if k == "ws":
            line += m.group().count("\n")
            continue
        if k == "bad":
            raise ParseError(f"line {line}: unexpected character {m.group()!r}")
        if k == "id" and m.group()[0] == "." and m.group().count(".") > 1:  # ".reg.b16" -> ".reg", ".b16"
            toks += [Tok(k, "." + part, m.start(), line) for part in m.group()[1:].split(".")]
        else:
            toks.append(Tok(k, m.group(), m.start(), line))
    return toks


def int_of(s):
    s = s.rstrip("U")
    return int(s, 8) if len(s) > 1 and s.isdecimal() and s[0] == "0" else int(s, 0)


class Scope:
    def __init__(self, parent, uid):
        self.parent, self.uid, self.names = parent, uid, {}

    def find(self, name):
        s = self
        while s is not None:
            if name in s.names:
                return s.names[name]
            s = s.parent
        return None


class Parser:
    def __init__(self, text):
        self.src = strip_noise(text)
        self.t = tokenize(self.src)
        self.i = 0
        self.globals = {}  # name -> Var  (.global/.const/.shared at module scope)
        self.funcs = {}  # name -> (ret params, params, body start token index or None)
        self.kernels = {}  # name -> (params, body start, attributes)
        self.target = ""
        self.uid = 0
        self.extern_next = False
        self.module()

    # -- token helpers
    def peek(self, k=0):
        return self.t[self.i + k].s if self.i + k < len(self.t) else None

    def next(self):
        self.i += 1
        return self.t[self.i - 1]

    def expect(self, s):
        tok = self.next()
        if tok.s != s:
            raise ParseError(f"line {tok.line}: expected {s!r}, got {tok.s!r}")

    def accept(self, s):
        if self.peek() == s:
            self.i += 1
            return True
        return False

    def skip_to(self, s):
        while self.next().s != s:
            pass

    def skip_block(self):
        depth = 0
        while True:
            s = self.next().s
            depth += (s == "{") - (s == "}")
            if depth == 0:
                return

    # -- module level
    def module(self):  # noqa: PLR0912
        while self.i < len(self.t):
            s = self.peek()
            if s == ".version":
                self.i += 2
            elif s == ".target":
                self.i += 1
                self.target = self.next().s
                while self.accept(","):
                    self.i += 1
            elif s == ".address_size":
                self.i += 2
            elif s in (".visible", ".weak", ".extern", ".common"):
                self.i += 1
                if s == ".extern":
                    self.extern_next = True
            elif s == ".entry":
                self.i += 1
                self.entry()
            elif s == ".func":
                self.i += 1
                self.func()
            elif s in (".global", ".const", ".shared"):
                for v in self.vardecl():
                    v.extern = self.extern_next
                    self.globals[v.name] = v
                self.extern_next = False
            elif s in (".pragma", ".alias"):
                self.skip_to(";")
            elif s == ";":
                self.i += 1
            else:
                raise ParseError(f"line {self.t[self.i].line}: unexpected {s!r} at module level")

    def param_list(self):
        out = []
        self.expect("(")
        while not self.accept(")"):
            align, ty, size, array, name = 0, None, 0, False, None
            while self.peek() not in (",", ")"):
                s = self.next().s
                if s == ".align":
                    align = int_of(self.next().s)
                elif s == ".ptr":  # .ptr .space .align N describes the pointee
                    while self.peek() in (".global", ".shared", ".const", ".local", ".generic"):
                        self.i += 1
                    if self.accept(".align"):
                        self.i += 1
                elif s == "[":
                    size, array = (0 if self.peek() == "]" else int_of(self.next().s)), True
                    self.expect("]")
                elif s.startswith(".") and s[1:] in TYPE_SIZE:
                    ty = s[1:]
                elif s.startswith("."):
                    pass  # .param / .reg
                else:
                    name = s
            n = TYPE_SIZE[ty] * (size if array else 1)
            out.append(Param(name, n, align or TYPE_SIZE[ty], ty, array))
            self.accept(",")
        return out

    def attributes(self):
        """Directives between the parameter list and the body."""
        at = {}
        while self.peek() is not None and self.peek() not in ("{", ";"):
            s = self.next().s
            vals = []
            while self.t[self.i].kind == "num" or self.peek() == ",":
                tok = self.next()
                if tok.kind == "num":
                    vals.append(int_of(tok.s))
            at[s] = tuple(vals)
        return at

    def entry(self):
        name = self.next().s
        params = self.param_list() if self.peek() == "(" else []
        at = self.attributes()
        self.kernels[name] = (params, self.i, at)
        self.extern_next = False
        self.skip_block()

    def func(self):
        while self.peek().startswith(".") and self.peek() != "(":  # .noreturn etc.
            self.i += 1
        ret = self.param_list() if self.peek() == "(" else []
        name = self.next().s
        params = self.param_list() if self.peek() == "(" else []
        self.attributes()
        self.extern_next = False
        if self.accept(";"):
            self.funcs.setdefault(name, (ret, params, None))
        else:
            self.funcs[name] = (ret, params, self.i)
            self.skip_block()

    def vardecl(self):
        """.space [.align N] .type name[d0][d1] [= init] {, name...} ;"""
        space, align, ty = self.next().s[1:], 0, None
        vec = 1
        while self.peek().startswith("."):
            s = self.next().s
            if s == ".align":
                align = int_of(self.next().s)
            elif s in (".v2", ".v4"):
                vec = int(s[2])
            elif s[1:] in TYPE_SIZE:
                ty = s[1:]
            # .attribute(.managed) etc. are ignored
            elif s == ".attribute":
                while self.next().s != ")":
                    pass
        out = []
        while True:
            name, n = self.next().s, vec
            while self.accept("["):
                n *= 0 if self.peek() == "]" else int_of(self.next().s)
                self.expect("]")
            v = Var(space, name, n * TYPE_SIZE[ty], align or TYPE_SIZE[ty] * vec)
            if self.accept("="):
                v.init = self.initialiser(ty)
                if v.size == 0:
                    v.size = len(v.init) * TYPE_SIZE[ty]
            out.append(v)
            if not self.accept(","):
                break
        self.expect(";")
        return out

    def initialiser(self, ty):
        """Flat list of (type, value) with value int/float or ('sym', name, addend)."""
        out, depth = [], 0
        while True:
            s = self.peek()
            if s == "{":
                depth += 1
                self.i += 1
            elif s == "}":
                depth -= 1
                self.i += 1
            elif s == "," and depth:
                self.i += 1
            elif s in (";", ","):
                return out
            else:
                tok = self.next()
                if tok.kind == "id":  # symbol, generic(symbol), symbol+off
                    name = tok.s
                    if name == "generic":
                        self.expect("(")
                        name = self.next().s
                        self.expect(")")
                    add = 0
                    if self.accept("+"):
                        add = int_of(self.next().s)
                    out.append((ty, ("sym", name, add)))
                else:
                    neg = tok.s == "-"
                    if neg:
                        tok = self.next()
                    op = self.literal(tok)
                    val = op[1]
                    out.append((ty, (("bits", val) if op[0] == "f" else (-val if neg else val))))
            if depth == 0 and self.peek() in (";", ","):
                return out

    # -- function bodies
    def literal(self, tok):
        if tok.kind == "flt":
            return ("f", int(tok.s[2:], 16), 4 if tok.s[1] in "fF" else 8)
        if tok.kind == "dec":
            return ("d", float(tok.s))
        return ("i", int_of(tok.s))

    def kernel(self, name):
        params, start, at = self.kernels[name]
        k = Kernel(name, params, reqntid=at.get(".reqntid"), cluster=at.get(".reqnctapercluster"))
        top = Scope(None, 0)
        for p in params:
            top.names[p.name] = ("kparam", p.name)
        self.k, self.depth = k, 0
        self.i = start
        self.body(top)
        end = len(k.instrs)
        k.instrs.append(Instr("exit", "exit", (), [], None, k.instrs[-1].line if k.instrs else 0, "<end of kernel>"))
        for ins in k.instrs:
            if ins.targets is not None:
                ins.targets = [end if t is None else k.labels[t] for t in ins.targets]
        return k

    def body(self, parent, exit_label=None):  # noqa: PLR0912
        """Parse one { ... } block."""
        self.expect("{")
        self.uid += 1
        sc = Scope(parent, self.uid)
        suffix = f"#{self.uid}" if parent.parent is not None or self.uid > 1 else ""
        # pre-scan this block for labels (they may be used before they appear)
        j, depth = self.i, 0
        while True:
            s = self.t[j].s
            if s == "{":
                depth += 1
            elif s == "}":
                if depth == 0:
                    break
                depth -= 1
            elif (
                depth == 0
                and self.t[j].kind == "id"
                and self.t[j + 1].s == ":"
                and self.t[j - 1].s in (";", "{", "}", ":")
            ):
                sc.names[s] = ("label", s + suffix)
            j += 1
        while True:
            s = self.peek()
            if s == "}":
                self.i += 1
                return
            if s == ";":
                self.i += 1
            elif s == "{":
                self.body(sc, exit_label)
            elif s == ".reg":
                self.regdecl(sc, suffix)
            elif s in (".shared", ".local", ".param", ".const", ".global"):
                for v in self.vardecl():
                    uname = v.name + suffix
                    v.name = uname
                    sc.names[uname.split("#")[0]] = ("var", uname)
                    self.k.vars[uname] = v
            elif s in (".pragma",):
                self.skip_to(";")
            elif self.t[self.i].kind == "id" and self.peek(1) == ":":
                name = self.next().s
                self.next()
                if self.peek() in (".branchtargets", ".calltargets", ".callprototype"):
                    self.i += 1
                    names = []
                    while not self.accept(";"):
                        tok = self.next()
                        if tok.kind == "id":
                            names.append(tok.s)
                    sc.names[name] = ("targets", names)
                else:
                    self.k.labels[sc.names[name][1]] = len(self.k.instrs)
            else:
                self.instr(sc, exit_label)

    def regdecl(self, sc, suffix):
        self.next()
        ty = self.next().s[1:]
        if ty in ("v2", "v4"):
            raise NotImplementedError(f"vector .reg declaration (line {self.t[self.i].line})")
        while True:
            name = self.next().s
            if self.accept("<"):
                n = int_of(self.next().s)
                self.expect(">")
                names = [f"{name}{j}" for j in range(n)]
            else:
                names = [name]
            for nm in names:
                sc.names[nm] = ("reg", nm + suffix)
                self.k.regs[nm + suffix] = ty
            if not self.accept(","):
                break
        self.expect(";")

    def operand(self, sc):  # noqa: PLR0911, PLR0912
        tok = self.next()
        s = tok.s
        if s == "{":
            ops = []
            while not self.accept("}"):
                ops.append(self.operand(sc))
                self.accept(",")
            return ("v", ops)
        if s == "(":
            ops = []
            while not self.accept(")"):
                ops.append(self.operand(sc))
                self.accept(",")
            return ("t", ops)
        if s == "[":
            base = self.operand(sc)
            off = 0
            while not self.accept("]"):
                sg = self.next().s
                if sg == ",":  # e.g. tensor coordinates
                    raise NotImplementedError(f"line {tok.line}: multi-part address")
                if sg == "+" and self.accept("-"):
                    sg = "-"
                off += (-1 if sg == "-" else 1) * int_of(self.next().s)
            if base[0] == "i":
                return ("m", ("i", base[1] + off), 0)
            return ("m", base, off)
        if s == "!":
            return ("n", self.operand(sc))
        if s == "-":
            op = self.literal(self.next())
            return ("f", op[1] ^ (1 << (8 * op[2] - 1)), op[2]) if op[0] == "f" else (op[0], -op[1])
        if tok.kind in ("flt", "dec", "num"):
            return self.literal(tok)
        if tok.kind == "id":
            if s == "_":
                op = ("_",)
            elif s == "WARP_SZ":
                op = ("i", 32)
            else:
                hit = sc.find(s)
                if hit is None:
                    op = ("sr", s) if s.startswith("%") else ("s", s)
                elif hit[0] == "reg":
                    op = ("r", hit[1])
                elif hit[0] == "kparam":
                    op = ("kp", hit[1])
                else:
                    op = ("s", hit[1])
            if self.accept("|"):
                return ("pair", op, self.operand(sc))
            return op
        raise ParseError(f"line {tok.line}: unexpected {s!r} in operand")

    def instr(self, sc, exit_label):
        start = self.t[self.i]
        pred = None
        if self.accept("@"):
            neg = self.accept("!")
            nm = self.next().s
            hit = sc.find(nm)
            if hit is None:
                raise ParseError(f"line {start.line}: unknown predicate {nm}")
            pred = (hit[1], neg)
        op = self.next().s
        if self.t[self.i - 1].kind != "id":
            raise ParseError(f"line {start.line}: expected an opcode, got {op!r}")
        args = []
        while self.peek() != ";":
            args.append(self.operand(sc))
            self.accept(",")
        end = self.next()
        text = " ".join(self.src[start.pos : end.pos + 1].split())
        parts = op.split(".")
        ins = Instr(op, parts[0], tuple(parts[1:]), args, pred, start.line, text)
        if ins.base == "call":
            return self.call(sc, ins)
        if ins.base == "ret" and exit_label is not None:  # return from an inlined function
            ins = Instr("bra", "bra", (), [], pred, start.line, text, targets=[exit_label])
        elif ins.base == "bra":
            ins.targets = [args[0][1]]
        elif ins.base == "brx":
            ins.targets = [sc.find(n)[1] for n in args[1][1]]  # the .branchtargets list
            ins.args = args[:1]
        self.k.instrs.append(ins)

    def call(self, sc, ins):
        """Inline the callee: formal parameters become aliases of the actual ones."""
        args = list(ins.args)
        ret_act = args.pop(0)[1] if args[0][0] == "t" else []
        fname = args.pop(0)
        act = args.pop(0)[1] if args and args[0][0] == "t" else []
        if fname[0] != "s" or fname[1] not in self.funcs:
            raise NotImplementedError(f"line {ins.line}: indirect or unknown call: {ins.text}")
        ret, params, start = self.funcs[fname[1]]
        if start is None:
            if fname[1] in ("__assertfail", "__assert_fail", "vprintf", "cudaDeviceSynchronize"):
                ins.base, ins.op, ins.mods = "extcall", "extcall", (fname[1],)
                ins.args = [("t", ret_act), ("t", act)]
                self.k.instrs.append(ins)
                return
            raise NotImplementedError(f"line {ins.line}: call to external function: {ins.text}")
        if ins.pred is not None:
            raise NotImplementedError(f"line {ins.line}: predicated call: {ins.text}")
        self.depth += 1
        if self.depth > 16:
            raise NotImplementedError(f"line {ins.line}: recursive call: {ins.text}")
        self.uid += 1
        fsc = Scope(None, self.uid)
        for formal, actual in zip([*ret, *params], [*ret_act, *act], strict=True):
            if actual[0] == "r":
                fsc.names[formal.name] = ("reg", actual[1])
            elif actual[0] == "s":
                fsc.names[formal.name] = ("var", actual[1])
            else:
                raise NotImplementedError(f"line {ins.line}: call argument {actual}: {ins.text}")
        lab = f"$ret#{self.uid}"
        save, self.i = self.i, start
        self.body(fsc, lab)
        self.i = save
        self.k.labels[lab] = len(self.k.instrs)
        self.depth -= 1
