"""Warp collectives: shfl, vote, redux, activemask."""

import numpy as np

from . import fp
from .fp import F64, I64, U32
from .instructions import MATRIX_MOVES
from .ops import DT

_REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum}
_REDUCE |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_SHUFFLES = {
    "up": lambda lane, b, first, segment: lane - b,
    "down": lambda lane, b, first, segment: lane + b,
    "bfly": lambda lane, b, first, segment: lane ^ b,
    "idx": lambda lane, b, first, segment: first | (b & ~segment),
}


class WarpCollectives:
    """Mixin of Machine."""

    def ballot(self, ix, where):
        """A bit mask a warp of the lanes ix for which ``where`` holds (None: of all of them)."""
        bits = (np.int64(1) << self.lane_id[ix]).astype(F64)
        if where is not None:
            bits = np.where(where, bits, 0.0)
        return np.bincount(self.warp_of[ix], weights=bits, minlength=self.L // 32).astype(I64).astype(U32)

    def b_activemask(self, ins):
        out = self.dst(ins.args[0], "b32")

        def step(ix):
            out[ix] = self.ballot(ix, None)[self.warp_of[ix]]

        return step

    def build_warp(self, ins):
        """(step, member mask a lane, whether that is all lanes)."""
        if ins.base in MATRIX_MOVES:
            return getattr(self, "b_" + ins.base)(ins), self.const(0xFFFFFFFF, U32), True
        if "sync" not in ins.mods:
            raise NotImplementedError("collective without .sync")
        return getattr(self, "w_" + ins.base)(ins), *self.member_mask(ins.args[-1])

    def member_mask(self, operand):
        return self.src(operand, "b32"), operand[0] == "i" and operand[1] & 0xFFFFFFFF == 0xFFFFFFFF

    def w_shfl(self, ins):
        mode = next(m for m in ins.mods if m in _SHUFFLES)
        other_lane = _SHUFFLES[mode]
        to, valid = ins.args[0][1:] if ins.args[0][0] == "pair" else (ins.args[0], ("_",))
        out, out_valid = self.dst(to, "b32"), self.dst(valid, "pred")
        values, offsets, clamps = (self.src(operand, "b32") for operand in ins.args[1:4])

        def step(ix):
            lanes = self.lanes[ix]
            lane, b, c = lanes & 31, offsets[ix].astype(I64) & 31, clamps[ix].astype(I64)
            segment, clamp = (c >> 8) & 31, c & 31
            first, last = lane & segment, (lane & segment) | (clamp & ~segment)
            j = other_lane(lane, b, first, segment)
            inside = j >= last if mode == "up" else j <= last
            source = np.where(inside, lanes - lane + (j & 31), lanes)
            if not isinstance(ix, slice) or len(lanes) % 32 or lane[0]:
                active = np.zeros(self.L, bool)
                active[ix] = True
                if not active[source].all():
                    k = int(np.argmin(active[source]))
                    self.stats.warn(
                        f"line {ins.line}: `{ins.text}` reads lane {int(source[k]) & 31}, which does not take part "
                        f"(first seen in {self.where(lanes[k])}); the value is undefined"
                    )
            out[ix] = values[source]
            out_valid[ix] = inside

        return step

    def w_vote(self, ins):
        mode = next(m for m in ins.mods if m in ("any", "all", "uni", "ballot"))
        out = self.dst(ins.args[0], "b32" if mode == "ballot" else "pred")
        values, masks = self.src(ins.args[1], "pred"), self.src(ins.args[2], "b32")

        def step(ix):
            mask, warp = masks[ix], self.warp_of[ix]
            true = self.ballot(ix, values[ix])[warp] & mask
            voters = self.ballot(ix, None)[warp] & mask
            all_true = true == voters
            out[ix] = {"ballot": true, "any": true != 0, "all": all_true, "uni": all_true | (true == 0)}[mode]

        return step

    def w_redux(self, ins):
        ty = ins.mods[-1]
        op = next(m for m in ins.mods if m in _REDUCE)
        out, values, masks = self.dst(ins.args[0], ty), self.src(ins.args[1], ty), self.src(ins.args[2], "b32")
        f = _REDUCE[op]
        if ty == "f32":
            nan = "NaN" in ins.mods

            def f(a, b):
                return fp.min_max(a, b, op == "max", nan)

        def step(ix):
            value = np.ascontiguousarray(values[ix])
            if "abs" in ins.mods:
                value = np.abs(value)
            key = self.warp_of[ix] << 32 | masks[ix].astype(I64)  # lanes with the same mask reduce together
            order = np.argsort(key, kind="stable")
            key, ordered = key[order], value[order]
            first = np.ones(key.size, bool)
            first[1:] = key[1:] != key[:-1]
            part, start = np.cumsum(first) - 1, np.flatnonzero(first)
            rank = np.arange(key.size) - start[part]
            total = ordered[start].copy()
            for r in range(1, int(rank.max()) + 1):
                j = rank == r
                total[part[j]] = f(total[part[j]], ordered[j])
            result = np.empty(key.size, DT[ty])
            result[order] = total[part]
            out[ix] = result

        return step
