"""Registers and operands: each is a numpy array over the lanes of a batch, read and written as ``operand[ix]``."""

import numpy as np

from .fp import F32, F64, U32, U64
from .ops import DT, SINT, UINT, Negated, Sink
from .parser import TYPE_SIZE

#: Special registers that hold the same for all lanes, or differ by the lane's place in its block only.
_PROCESSORS = 132


class Register:
    __slots__ = ("raw", "type")

    def __init__(self, raw, ty):
        self.raw, self.type = raw, ty


class Cast:
    """An array read in another, wider or narrower type."""

    def __init__(self, array, dtype):
        self.array, self.dtype = array, dtype

    def __getitem__(self, ix):
        return self.array[ix].astype(self.dtype)


class Clock:
    """%clock and its kin: the number of instructions executed so far."""

    def __init__(self, machine, dtype):
        self.machine, self.dtype, self.itemsize = machine, dtype, dtype.itemsize

    def __getitem__(self, ix):
        return np.full(self.machine.lanes[ix].size, self.machine.executed, self.dtype)

    def __setitem__(self, ix, value):
        pass

    def view(self, dtype):
        return Cast(self, dtype)


class Operands:
    """Mixin of Machine."""

    def reg(self, name):
        register = self.regs.get(name)
        if register is None:
            ty = self.kernel.regs[name]
            dtype = np.bool_ if ty == "pred" else UINT[TYPE_SIZE[ty]]
            register = self.regs[name] = Register(np.zeros(self.L, dtype), ty)
        return register

    def symbol(self, operand):
        """The address of a variable or a parameter."""
        name = operand[1]
        tables = (self.module.param_addr,) if operand[0] == "kp" else (self.variables, self.module.global_addr)
        for table in tables:
            if name in table:
                return table[name]
        raise NotImplementedError(f"unknown symbol {name}")

    def const(self, value, dtype):
        return np.broadcast_to(np.array(value).astype(dtype), (self.L,))

    def src(self, operand, ty):  # noqa: PLR0911, PLR0912 - one a kind
        """What ``operand[ix]`` reads, as the given type."""
        kind, dtype = operand[0], DT[ty]
        if kind == "r":
            return self.register_source(operand[1], ty, dtype)
        if kind == "i":
            if ty == "pred":
                return self.const(bool(operand[1]), np.bool_)
            if ty in ("f32", "f64", "f16"):
                return self.const(float(operand[1]), dtype)
            bits = 8 * TYPE_SIZE[ty]
            return self.const(np.array(operand[1] & ((1 << bits) - 1), U64).astype(UINT[bits // 8]).view(dtype), dtype)
        if kind == "f":
            value = np.array(operand[1], U32 if operand[2] == 4 else U64)
            if dtype is F32 or dtype is F64:
                return self.const(value.view(F32 if operand[2] == 4 else F64), dtype)
            if TYPE_SIZE[ty] == operand[2]:
                return self.const(value.view(dtype), dtype)
        if kind == "d":
            return self.const(operand[1], dtype)
        if kind == "sr":
            array = self.sreg(operand[1])
            if ty == "pred":
                return array.astype(bool)
            if array.dtype == dtype:
                return array
            return array.view(dtype) if array.itemsize == np.dtype(dtype).itemsize else Cast(array, dtype)
        if kind in ("s", "kp"):
            return self.const(self.symbol(operand), dtype)
        if kind == "n":
            return Negated(self.src(operand[1], "pred"))
        raise NotImplementedError(f"operand {operand} as {ty}")

    def register_source(self, name, ty, dtype):
        raw = self.reg(name).raw
        if ty == "pred" or raw.dtype == np.bool_:
            if ty != "pred" or raw.dtype != np.bool_:
                raise NotImplementedError(f"predicate register {name} used as {ty}")
            return raw
        size = TYPE_SIZE[ty]
        if raw.itemsize < size:
            raise NotImplementedError(f"register {name} is narrower than .{ty}")
        return raw.view(dtype)[:: raw.itemsize // size]

    def dst(self, operand, ty):
        """A writable view of a register, widened (with the sign) where the register is wider than the type."""
        if operand[0] == "_":
            return Sink()
        if operand[0] != "r":
            raise NotImplementedError(f"destination {operand}")
        raw = self.reg(operand[1]).raw
        if raw.dtype == np.bool_ or ty == "pred":
            if ty != "pred" or raw.dtype != np.bool_:
                raise NotImplementedError(f"destination {operand[1]} as {ty}")
            return raw
        size, width = TYPE_SIZE[ty], raw.itemsize
        if width < size:
            raise NotImplementedError(f"destination {operand[1]} is narrower than .{ty}")
        if width == size:
            return raw.view(DT[ty])
        if ty in ("f16", "bf16", "f32"):
            return raw.view(DT[ty])[:: width // size]
        return raw.view((SINT if ty[0] == "s" else UINT)[width])

    # Special registers

    def sreg(self, name):
        """The array of a special register."""
        if name in self.sregs:
            return self.sregs[name]
        base, _, axis = name[1:].partition(".")
        if base in ("clock", "clock_hi", "clock64", "globaltimer", "globaltimer_lo", "globaltimer_hi"):
            self.sregs[name] = Clock(self, np.dtype(U64 if base in ("clock64", "globaltimer") else U32))
        elif base in ("ctaid", "smid", "clusterid", "cluster_ctaid", "cluster_ctarank"):
            self.sregs[name] = np.zeros(self.L, U32)  # differs from batch to batch
            self.fill_batch_sregs()
        else:
            value = self.fixed_sreg(base, "xyz".find(axis) if axis else 0)
            if value is None:
                raise NotImplementedError(f"special register {name}")
            self.sregs[name] = np.ascontiguousarray(np.broadcast_to(value, (self.L,))).astype(U32)
        return self.sregs[name]

    def fixed_sreg(self, base, axis):
        bx, by, _ = self.block
        if base.startswith("lanemask_"):
            own = U64(1) << self.lane_id.astype(U64)
            below = own - U64(1)
            masks = {"eq": own, "lt": below, "le": own | below, "gt": ~(own | below), "ge": ~below}
            return masks[base.removeprefix("lanemask_")] & U64(0xFFFFFFFF)
        cluster, rank_count = self.cluster, self.cluster_size
        return {
            "tid": (self.tid % bx, self.tid // bx % by, self.tid // (bx * by))[axis],
            "ntid": self.block[axis],
            "nctaid": self.grid[axis],
            "laneid": self.lane_id,
            "warpid": self.warp_in_block,
            "nwarpid": self.warps,
            "nsmid": _PROCESSORS,
            "dynamic_smem_size": self.dynamic,
            "total_smem_size": self.smem_size,
            "aggr_smem_size": self.smem_size,
            "gridid": 0,
            "envreg0": 0,
            "is_explicit_cluster": int(rank_count > 1),
            "cluster_nctaid": cluster[axis],
            "cluster_nctarank": rank_count,
            "nclusterid": self.grid[axis] // cluster[axis],
        }.get(base)

    def fill_batch_sregs(self):
        """Special registers that depend on which blocks are in the batch."""
        gx, gy, _ = self.grid
        block_id = (self.linear % gx, self.linear // gx % gy, self.linear // (gx * gy))
        for name, array in self.sregs.items():
            base, _, axis = name[1:].partition(".")
            k = "xyz".find(axis) if axis else 0
            if base == "ctaid":
                array[:] = block_id[k]
            elif base == "smid":
                array[:] = self.linear % _PROCESSORS
            elif base == "clusterid":
                array[:] = block_id[k] // self.cluster[k]
            elif base == "cluster_ctaid":
                array[:] = block_id[k] % self.cluster[k]
            elif base == "cluster_ctarank":
                array[:] = self.rank_of
