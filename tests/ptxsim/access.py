"""Loads, stores, atomics and asynchronous copies: addresses, the checks of each access, and the bookkeeping."""

import numpy as np

from .errors import MemoryFault, RaceError, UninitError
from .fp import I64, U16, U32, U64
from .memory import GLOBAL_WINDOW, LOCAL_WINDOW, NOBODY, SEVERAL, SHARED_WINDOW, SPACES, WINDOW
from .ops import DT, FLOATS, PACKED, UINT, float_function, packed
from .parser import TYPE_SIZE

ATOMIC_OPS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
IN_PLACE = {"add": np.add, "min": np.minimum, "max": np.maximum}
IN_PLACE |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
#: A shared address of another block of the cluster has the block's rank + 1 above these bits.
RANK_SHIFT = 24
#: Reports kept of each kind where faults are collected instead of raised.
MAX_REPORTS = 100


class MemoryAccess:
    """Mixin of Machine."""

    # Addresses

    def space_of(self, ins):
        """The memory space that the modifiers name."""
        heads = (m.split("::")[0] for m in ins.mods)
        return next((head for head in heads if head in SPACES), "generic")

    def address(self, operand):
        """Function ix -> int64 addresses of a memory operand (32-bit registers wrap at 32 bits)."""
        base, offset = operand[1], operand[2]
        if base[0] == "r":
            raw = self.reg(base[1]).raw
            if raw.itemsize == 4:
                offset32 = U32(offset & 0xFFFFFFFF)
                return lambda ix: (raw[ix] + offset32).astype(I64)
            wide = raw.view(I64)
            return lambda ix: wide[ix] + offset
        value = self.symbol(base) if base[0] in ("s", "kp") else base[1]
        fixed = np.broadcast_to(np.array(value + offset, I64), (self.L,))
        return lambda ix: fixed[ix]

    def mem_operand(self, operand, space):
        if space == "param":  # slots of calls live in local memory, the kernel's parameters in a buffer
            space = "local" if operand[1][0] == "s" else "global"
        return space, self.address(operand)

    def fault(self, ins, lane, message, error=MemoryFault):
        raise error(f"{self.kernel.name}: {message}; {self.where(lane)}; line {ins.line}: `{ins.text}`")

    def segments(self, ins, space, address, size, lanes, write):
        """Checks the addresses; [(memory, byte indices, which of the lanes or None for all)]."""
        if size > 1:
            off = address & (size - 1)
            if off.any():
                j = int(np.argmax(off != 0))
                message = f"misaligned {size}-byte access at {space} address {int(address[j]):#x}"
                self.fault(ins, lanes[j], message)
        if space == "generic":
            return self.generic_segments(ins, address, size, lanes, write)
        if space == "shared":
            return [(self.smem, self.shared_index(ins, address, size, lanes), None)]
        if space == "local":
            bad = (address < 0) | (address + size > self.lmem_size)
            if bad.any():
                j = int(np.argmax(bad))
                message = f"local access at {int(address[j]):#x} outside {self.lmem_size} bytes"
                self.fault(ins, lanes[j], message)
            return [(self.lmem, self.lmem_base[lanes] + address, None)]
        return self.global_segments(ins, address, size, lanes, write)

    def generic_segments(self, ins, address, size, lanes, write):
        window = address >> WINDOW
        spaces = {SHARED_WINDOW: "shared", LOCAL_WINDOW: "local"}
        first = int(window[0])
        if (window == first).all():
            if first in spaces:
                return self.segments(ins, spaces[first], address - (first << WINDOW), size, lanes, write)
            return self.segments(ins, "global", address, size, lanes, write)
        out = []
        for one in np.unique(window):
            chosen = np.flatnonzero(window == one)
            for flat, index, some in self.generic_segments(ins, address[chosen], size, lanes[chosen], write):
                out.append((flat, index, chosen if some is None else chosen[some]))
        return out

    def shared_index(self, ins, address, size, lanes):
        rank, offset = address >> RANK_SHIFT, address & ((1 << RANK_SHIFT) - 1)
        bad = (offset + size > self.smem_size) | (address < 0) | (rank > self.cluster_size)
        if bad.any():
            j = int(np.argmax(bad))
            where = f"{size}-byte access at shared address {int(address[j]):#x}"
            self.fault(ins, lanes[j], f"{where} is outside the block's {self.smem_size} bytes of shared memory")
        if not rank.any():
            return self.smem_base[lanes] + offset
        own = self.block_of[lanes]
        block = np.where(rank > 0, own // self.cluster_size * self.cluster_size + rank - 1, own)
        gone = self.live_threads[block] == 0
        if gone.any():
            j = int(np.argmax(gone))
            message = f"access to the shared memory of block {int(rank[j]) - 1} of the cluster, which has exited"
            self.fault(ins, lanes[j], message)
        return block * self.shared_stride + offset

    def global_segments(self, ins, address, size, lanes, write):
        low, high = int(address.min()), int(address.max())
        buffer = self.mem.find(low)
        if buffer is not None and high + size <= buffer.base + buffer.size:
            parts = [(buffer, address - buffer.base, None)]
        else:
            parts = self.several_buffers(ins, address, size, lanes, write)
        for buffer, index, some in parts:
            if write and buffer.const:
                self.fault(ins, lanes[0], f"write to constant buffer {buffer.name!r}")
            if buffer.reach is not None:
                j = buffer.reach.unmarked(index, size)
                if j is not None:
                    lane = lanes[j if some is None else some[j]]
                    kind = "write" if write else "read"
                    message = f"{size}-byte global {kind} at byte {int(index[j])} of buffer {buffer.name!r} is inside "
                    self.fault(ins, lane, message + "the allocation, but outside the tensors that were passed")
        return parts

    def several_buffers(self, ins, address, size, lanes, write):
        k = np.searchsorted(np.array(self.mem.bases, I64), address, side="right") - 1
        buffers = self.mem.buffers
        ends = np.array([b.base + b.size for b in buffers], I64)
        bad = (k < 0) | (address + size > ends[k])
        if bad.any():
            j = int(np.argmax(bad))
            kind = "write" if write else "read"
            near = self.mem.describe(int(address[j]), size)
            self.fault(ins, lanes[j], f"out-of-bounds {size}-byte global {kind} at {int(address[j]):#x}: {near}")
        out = []
        for one in np.unique(k):
            chosen = np.flatnonzero(k == one)
            out.append((buffers[one], address[chosen] - buffers[one].base, chosen))
        return out

    # Checks and counters of an access

    def account(self, ins, flat, index, size, lanes, kind):
        """Counts an access; kind is "load", "store" or "atomic"."""
        stats, total = self.stats, index.size * size
        if flat is self.smem:
            stats.count_shared(kind, total, *self.bank_waves(index, size, lanes), ins.line)
        elif flat is self.lmem:
            stats.count_local(kind, total)
        elif flat.const:
            stats.const_load += total
        else:
            if kind == "load":
                flat.touched.mark(index, size)
            warps = lanes >> 5
            place = (warps << WINDOW) | (index + (flat.base & ((1 << WINDOW) - 1)))
            if (place[1:] < place[:-1]).any():
                place = np.sort(place)
            if kind != "atomic":  # what several lanes of a warp ask for at once is one request
                total = (1 + np.count_nonzero(place[1:] != place[:-1])) * size
            sector = place >> 5
            sectors = (1 + np.count_nonzero(sector[1:] != sector[:-1])) * max(1, size // 32)
            instructions = 1 + np.count_nonzero(warps[1:] != warps[:-1])
            stats.count_global(kind, total, instructions, sectors, ins.line)
            if kind == "load":
                flat.loaded += total
            elif kind == "store":
                flat.stored += total
            else:
                flat.atomic += total

    def bank_waves(self, index, size, lanes):
        """(warp instructions, wavefronts, their least number) of a shared access: distinct words a bank."""
        phases = {8: 2, 16: 4}.get(size, 1)
        part = (lanes >> 5) * phases + ((lanes & 31) // (32 // phases))
        key = (part << 32) | (index >> 2)
        if size > 4:
            key = (key[:, None] + np.arange(size // 4)).ravel()
        if (key[1:] < key[:-1]).any():
            key = np.sort(key)
        first = np.ones(key.size, bool)
        first[1:] = key[1:] != key[:-1]
        key = key[first]
        part = key >> 32
        number = np.zeros(part.size, I64)
        np.cumsum(part[1:] != part[:-1], out=number[1:])
        parts = int(number[-1]) + 1
        most = np.bincount(number * 32 + (key & 31), minlength=parts * 32).reshape(parts, 32).max(1)
        warps = lanes >> 5
        return 1 + np.count_nonzero(warps[1:] != warps[:-1]), int(most.sum()), parts

    def check_init(self, ins, flat, index, size, lanes):
        """Reads of bytes that nobody has written, or that an asynchronous copy is still writing."""
        if flat is self.smem and self.in_flight is not None:
            late = self.in_flight.u8[index[:, None] + np.arange(size)].any(1)
            if late.any():
                j = int(np.argmax(late))
                message = "read of shared memory that a cp.async is still writing: its thread has not waited for it"
                self.fault(ins, lanes[j], message, UninitError)
        if flat is self.lmem or flat.init is None:
            return
        j = flat.init.unmarked(index, size)
        if j is None:
            return
        shared = flat is self.smem
        name = "shared memory" if shared else f"buffer {flat.name!r}"
        offset = int(index[j]) % self.shared_stride if shared else int(index[j])
        message = f"read of never-written {name} at byte {offset}"
        if self.check_uninit != "report":
            self.fault(ins, lanes[j], message, UninitError)
        if len(self.stats.uninit) < MAX_REPORTS:
            self.stats.uninit.append(f"{message}; {self.where(lanes[j])}; line {ins.line}: `{ins.text}`")

    def mark_written(self, flat, index, size):
        if flat is self.lmem:
            return
        if flat.init is not None:
            flat.init.mark(index, size)
        if flat is not self.smem:
            flat.written.mark(index, size)

    def check_race(self, ins, flat, index, size, lanes, write, atomic=False, new=None):
        """Conflicts with accesses that nothing orders before this one; ``new`` are the bytes about to be written."""
        if flat is self.smem:
            if self.races is not None:
                old = None if new is None else flat.u8[index[:, None] + np.arange(size)]
                self.report_race(self.races.check(self, ins, lanes, index, size, write, atomic, new, old))
        elif flat is not self.lmem and flat.writer is not None:
            self.check_blocks(ins, flat, index, size, lanes, new)

    def check_blocks(self, ins, buffer, index, size, lanes, new):
        """Blocks run in any order: what one writes no other may read or write in the same launch.

        The same value written by several blocks is benign. Elements are told apart by their first byte.
        """
        block = self.linear[lanes]
        element = self.element_size(ins)
        for k in range(0, size, element):
            at = index + k
            writer, reader = buffer.writer[at], buffer.reader[at]
            bad = (writer != NOBODY) & (writer != block)
            if new is not None:
                bad |= (reader != NOBODY) & (reader != block)
                found = buffer.u8[at[:, None] + np.arange(element)]
                bad &= (found != new[:, k : k + element]).any(1)
            if bad.any():
                j = int(np.argmax(bad))
                other = int(writer[j]) if writer[j] not in (NOBODY, block[j]) else int(reader[j])
                who = "several blocks" if other == SEVERAL else f"the block with linear index {other}"
                done = "wrote" if writer[j] not in (NOBODY, block[j]) else "read"
                kind = "read" if new is None else "write"
                self.report_race(
                    f"race between blocks in {self.kernel.name} on byte {int(at[j])} of buffer {buffer.name!r}: {kind} "
                    f"by {self.where(lanes[j])} at line {ins.line} `{ins.text}` of what {who} {done} in this launch"
                )
            if new is not None:
                buffer.writer[at] = block
            else:
                buffer.reader[at] = np.where((reader == NOBODY) | (reader == block), block, SEVERAL)
                mixed = buffer.reader[at] != block
                buffer.reader[at[mixed]] = SEVERAL

    def report_race(self, report):
        if report is None:
            return
        if self.check_races != "report":
            raise RaceError(report)
        if len(self.stats.races) < MAX_REPORTS and report not in self.stats.races:
            self.stats.races.append(report)

    # Loads and stores

    def element_size(self, ins):
        return TYPE_SIZE.get(ins.mods[-1], 4)  # a cp.async names no type

    def elements(self, ins):
        """(element type, elements a lane), e.g. of .v4.b32."""
        ty = ins.mods[-1]
        if TYPE_SIZE[ty] > 8:
            raise NotImplementedError(ins.text)
        return ty, next((int(m[1:]) for m in ins.mods if m in ("v2", "v4", "v8")), 1)

    def b_ld(self, ins):
        ty, count = self.elements(ins)
        targets = ins.args[0][1] if ins.args[0][0] == "v" else [ins.args[0]]
        outs = [self.dst(operand, ty) for operand in targets]
        space, address = self.mem_operand(ins.args[1], self.space_of(ins))
        one, dtype = TYPE_SIZE[ty], DT[ty]
        size = one * count

        def step(ix):
            lanes = self.lanes[ix]
            for flat, index, some in self.segments(ins, space, address(ix), size, lanes, False):
                these = lanes if some is None else lanes[some]
                self.check_init(ins, flat, index, size, these)
                self.check_race(ins, flat, index, size, these, False)
                if self.collect:
                    self.account(ins, flat, index, size, these, "load")
                element = index // one
                # All elements before any register: the address register may be one of them.
                values = [flat.view[one][element + k] for k in range(count)]
                to = ix if some is None else these
                for out, value in zip(outs, values, strict=True):
                    out[to] = value.view(dtype)

        return step

    b_ldu = b_ld

    def b_st(self, ins):
        if "async" in ins.mods or "bulk" in ins.mods:
            raise NotImplementedError(ins.text)
        ty, count = self.elements(ins)
        operands = ins.args[1][1] if ins.args[1][0] == "v" else [ins.args[1]]
        sources = [self.src(operand, ty) for operand in operands]
        space, address = self.mem_operand(ins.args[0], self.space_of(ins))
        one = TYPE_SIZE[ty]

        def step(ix):
            lanes = self.lanes[ix]
            values = [np.ascontiguousarray(s[ix]).view(UINT[one]) for s in sources]
            for flat, index, some in self.segments(ins, space, address(ix), one * count, lanes, True):
                if some is None:
                    self.store(ins, flat, index, one, values, lanes)
                else:
                    self.store(ins, flat, index, one, [v[some] for v in values], lanes[some])

        return step

    def store(self, ins, flat, index, one, values, lanes):
        """Writes one or more elements of ``one`` bytes a lane."""
        size = one * len(values)
        checked = self.races is not None if flat is self.smem else flat is not self.lmem and flat.writer is not None
        if checked:
            self.check_race(ins, flat, index, size, lanes, True, new=np.stack(values, 1).view(np.uint8))
        if self.collect:
            self.account(ins, flat, index, size, lanes, "store")
        view, element = flat.view[one], index // one
        for k, value in enumerate(values):
            view[element + k] = value
        if checked:
            self.check_same_slot(ins, flat, index, one, values, lanes)
        self.mark_written(flat, index, size)

    def check_same_slot(self, ins, flat, index, one, values, lanes):
        """Lanes that wrote different values to one place in one instruction.

        Within a warp exactly one of the writes lands, but it is undefined which; between warps it is a race.
        """
        view, element = flat.view[one], index // one
        lost = np.zeros(index.size, bool)
        for k, value in enumerate(values):
            lost |= view[element + k] != value
        if not lost.any():
            return
        shared = flat is self.smem
        winner = self.races.writer[index] if shared else flat.writer[index]
        other = lost & (winner != (self.warp_in_cluster[lanes] if shared else self.linear[lanes]))
        j = int(np.argmax(other if other.any() else lost))
        place = (
            f"shared byte {int(index[j]) % self.shared_stride}" if shared else f"byte {int(index[j])} of {flat.name!r}"
        )
        message = (
            f"write different values to {place} in one instruction, e.g. {self.where(lanes[j])}; line {ins.line}: "
            f"`{ins.text}`"
        )
        if other.any():
            who = "shared-memory race in {}: several warps" if shared else "race between blocks in {}: several blocks"
            self.report_race(f"{who.format(self.kernel.name)} {message}")
        elif ins.pc not in self.warned:
            self.warned.add(ins.pc)
            self.stats.warn(f"several lanes of one {'warp' if shared else 'block'} {message}")

    # Atomics

    def b_atom(self, ins):
        op = next(m for m in ins.mods if m in ATOMIC_OPS)
        ty = next(m for m in reversed(ins.mods) if m in TYPE_SIZE)
        count = next((int(m[1:]) for m in ins.mods if m in ("v2", "v4", "v8")), 1)
        one, dtype = TYPE_SIZE[ty], DT.get(ty)
        if one > 8:
            raise NotImplementedError(ins.text)
        args = list(ins.args)
        target = ("_",) if ins.base == "red" else args.pop(0)
        outs = [] if target[0] == "_" else [self.dst(operand, ty) for operand in _each(target)]
        space, address = self.mem_operand(args[0], self.space_of(ins))
        sources = [self.src(operand, ty) for operand in _each(args[1])]
        swap = self.src(args[2], ty) if op == "cas" else None
        size, f = one * count, _atomic_function(op, ty)
        # Without a result the order of the lanes shows only in the rounding, and one call does.
        exact = (ty not in FLOATS and ty not in PACKED) or (op == "add" and ty in ("f32", "f64"))
        in_place = IN_PLACE.get(op) if exact and not outs else None

        def step(ix):
            lanes = self.lanes[ix]
            values = [np.ascontiguousarray(s[ix]) for s in sources]
            swaps = None if swap is None else np.ascontiguousarray(swap[ix])
            for flat, index, some in self.segments(ins, space, address(ix), size, lanes, True):
                chosen = slice(None) if some is None else some
                these = lanes[chosen]
                self.check_init(ins, flat, index, size, these)
                self.check_race(ins, flat, index, size, these, True, atomic=True)
                if self.collect:
                    self.account(ins, flat, index, size, these, "atomic")
                view = flat.view[one].view(dtype)
                for k in range(count):
                    if in_place is not None:
                        in_place.at(view, index // one + k, values[k][chosen])
                        continue
                    old = _one_after_another(view, index // one + k, f, values[k][chosen], _at(swaps, chosen))
                    if outs:
                        outs[k][these] = old
                self.mark_written(flat, index, size)

        return step

    b_red = b_atom

    # Address arithmetic

    def b_cvta(self, ins):
        space, ty = self.space_of(ins), "u" + ins.mods[-1][1:]
        base = {"shared": SHARED_WINDOW << WINDOW, "local": LOCAL_WINDOW << WINDOW}.get(space, 0)
        if TYPE_SIZE[ty] == 4 and base:
            raise NotImplementedError("32-bit generic addresses: " + ins.text)
        base = np.array(base).astype(DT[ty])
        return self.simple(ins, (lambda a: a - base) if "to" in ins.mods else (lambda a: a + base), ty, [ty])

    def b_isspacep(self, ins):
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(self.space_of(ins))
        if self.space_of(ins) == "const":
            raise NotImplementedError(ins.text)
        if window is None:
            return self.simple(ins, lambda a: (a >> U64(WINDOW)) >= GLOBAL_WINDOW, "pred", ["u64"])
        return self.simple(ins, lambda a: (a >> U64(WINDOW)) == window, "pred", ["u64"])

    def b_mapa(self, ins):
        """The shared address of the same variable in another block of the cluster."""
        ty = ins.mods[-1]
        dtype = DT[ty]
        base = dtype(SHARED_WINDOW << WINDOW) if self.space_of(ins) == "generic" else dtype(0)
        low = dtype((1 << RANK_SHIFT) - 1)

        def f(a, rank):
            return base | (a & low) | ((rank.astype(dtype) + dtype(1)) << dtype(RANK_SHIFT))

        return self.simple(ins, f, ty, [ty, "u32"])

    def b_getctarank(self, ins):
        dtype = DT[ins.mods[-1]]
        own = self.sreg("%cluster_ctarank")
        out, read = self.dst(ins.args[0], "u32"), self.src(ins.args[1], ins.mods[-1])

        def step(ix):
            rank = ((read[ix] >> dtype(RANK_SHIFT)) & dtype(0xFFFF)).astype(U32)
            out[ix] = np.where(rank == 0, own[ix], rank - U32(1))

        return step

    # Matrix moves: Triton changes layouts of 16-bit elements with them

    def b_ldmatrix(self, ins):
        operands, address = self.matrix_operands(ins, ins.args[1])
        outs = [self.dst(operand, "b32") for operand in _each(ins.args[0])]

        def step(ix):
            lanes = self.lanes[ix]
            for k, out in enumerate(outs):
                index, rows = self.matrix_rows(ins, address(ix), lanes, k, write=False)
                self.check_init(ins, self.smem, index, 16, rows)
                self.check_race(ins, self.smem, index, 16, rows, False)
                if self.collect:
                    self.account(ins, self.smem, index, 16, rows, "load")
                tiles = self.smem.u8[index[:, None] + np.arange(16)].view(U16).reshape(-1, 64)
                halves = np.ascontiguousarray(tiles[:, operands])
                out[ix] = halves.view(U32).ravel()

        return step

    def b_stmatrix(self, ins):
        operands, address = self.matrix_operands(ins, ins.args[0])
        sources = [self.src(operand, "b32") for operand in _each(ins.args[1])]

        def step(ix):
            lanes = self.lanes[ix]
            for k, source in enumerate(sources):
                index, rows = self.matrix_rows(ins, address(ix), lanes, k, write=True)
                tiles = np.empty((lanes.size // 32, 64), U16)
                tiles[:, operands] = np.ascontiguousarray(source[ix]).view(U16).reshape(-1, 64)
                values = tiles.reshape(-1, 8).view(U64)
                self.store(ins, self.smem, index, 8, [values[:, 0].copy(), values[:, 1].copy()], rows)

        return step

    def matrix_operands(self, ins, operand):
        """(which elements of an 8 x 8 tile of 16 bits each lane holds, lane by lane, the rows' addresses)."""
        if "m8n8" not in ins.mods or "b16" not in ins.mods:
            raise NotImplementedError(ins.text)
        row, column = np.divmod(np.arange(64), 8)  # lane t has row t / 4, columns 2 (t % 4) and the next
        places = column * 8 + row if "trans" in ins.mods else row * 8 + column
        _, address = self.mem_operand(operand, "shared")
        return places, address

    def matrix_rows(self, ins, address, lanes, k, write):
        """The shared byte indices of the rows of each warp's tile k, and the lanes that gave them: 8 k to 8 k + 7."""
        if lanes.size % 32 or (lanes[::32] & 31).any():
            self.fault(ins, lanes[0], "matrix move by part of a warp")
        part = slice(8 * k, 8 * k + 8)
        rows = lanes.reshape(-1, 32)[:, part].ravel()
        starts = address.reshape(-1, 32)[:, part].ravel()
        ((_, index, _),) = self.segments(ins, "shared", starts, 16, rows, write)
        return index, rows

    # Asynchronous copies

    def b_cp(self, ins):
        mods = ins.mods
        if mods[0] != "async" or "bulk" in mods or "mbarrier" in mods:
            raise NotImplementedError(ins.text)
        if "commit_group" in mods:
            return self.commit_copies
        if "wait_all" in mods or "wait_group" in mods:
            keep = ins.args[0][1] if "wait_group" in mods else None
            return lambda ix: self.wait_copies(ins, self.lanes[ix], keep)
        _, to = self.mem_operand(ins.args[0], "shared")
        _, source = self.mem_operand(ins.args[1], "global")
        most = ins.args[2][1]
        length = self.copy_length(ins.args[3:], most)

        def step(ix):
            lanes = self.lanes[ix]
            counts = length(ix)
            data = np.zeros((lanes.size, most), np.uint8)  # what lies past the source's length becomes zero
            start = source(ix)
            for count in np.unique(counts[counts > 0]).tolist():
                chosen = np.flatnonzero(counts == count)
                # A shorter source need not be aligned to the whole copy.
                unit = most if count == most else count & -count
                for k in range(0, count, unit):
                    for flat, index, some in self.segments(
                        ins, "global", start[chosen] + k, unit, lanes[chosen], False
                    ):
                        these = chosen if some is None else chosen[some]
                        self.check_init(ins, flat, index, unit, lanes[these])
                        self.check_race(ins, flat, index, unit, lanes[these], False)
                        if self.collect:
                            self.account(ins, flat, index, unit, lanes[these], "load")
                        data[these[:, None], np.arange(k, k + unit)] = flat.u8[index[:, None] + np.arange(unit)]
            index = self.shared_index(ins, to(ix), most, lanes)
            one = min(most, 8)
            values = [np.ascontiguousarray(data[:, k : k + one]).view(UINT[one]).ravel() for k in range(0, most, one)]
            self.store(ins, self.smem, index, one, values, lanes)
            self.in_flight.mark(index, most)
            self.copies.append((lanes, index, most, self.commits[lanes]))

        return step

    def copy_length(self, extra, most):
        """Function ix -> bytes to copy: the optional source size, or none where the ignore predicate holds."""
        kind = self.kernel.regs[extra[0][1]] if extra and extra[0][0] == "r" else None
        if kind == "pred":
            ignore = self.src(extra[0], "pred")
            return lambda ix: np.where(ignore[ix], 0, most)
        if extra and (kind is None or TYPE_SIZE[kind] == 4):
            length = self.src(extra[0], "u32")
            return lambda ix: np.minimum(length[ix].astype(I64), most)
        return lambda ix: np.full(self.lanes[ix].size, most, I64)

    def commit_copies(self, ix):
        self.commits[ix] += 1

    def wait_copies(self, ins, lanes, keep):
        """Completes the lanes' copies but those of their last ``keep`` groups; all of them for None."""
        left = []
        for owners, index, size, group in self.copies:
            mine = np.isin(owners, lanes)
            done = mine if keep is None else mine & (group < self.commits[owners] - keep)
            if done.any():
                self.in_flight.u8[index[done][:, None] + np.arange(size)] = 0
                # The write is ordered by what comes after the wait, not by what came after the copy's start.
                self.check_race(ins, self.smem, index[done], size, owners[done], True)
            if not done.all():
                left.append((owners[~done], index[~done], size, group[~done]))
        self.copies = left


def _each(operand):
    return operand[1] if operand[0] == "v" else [operand]


def _at(values, chosen):
    return None if values is None else values[chosen]


def _atomic_function(op, ty):
    """(value in memory, operand, value to swap in) -> new value."""
    if op == "exch":
        return lambda old, x, c: x
    if op == "cas":
        bits = UINT[TYPE_SIZE[ty]]
        return lambda old, x, c: np.where(np.ascontiguousarray(old).view(bits) == x.view(bits), c, old)
    if op == "inc":
        return lambda old, x, c: np.where(old >= x, x.dtype.type(0), old + x.dtype.type(1))
    if op == "dec":
        return lambda old, x, c: np.where((old == 0) | (old > x), x, old - x.dtype.type(1))
    if ty in PACKED and op in ("add", "min", "max"):
        f = packed(float_function(op, PACKED[ty], ()), ty)
    elif ty in FLOATS:
        f = float_function(op, ty, ())
    else:
        f = IN_PLACE[op]
    return lambda old, x, c: f(old, x)


def _one_after_another(view, index, f, x, swap):
    """Applies f to view[index] lane by lane, in order; what each lane found there."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    first = np.ones(ordered.size, bool)
    first[1:] = ordered[1:] != ordered[:-1]
    turn = np.arange(ordered.size) - np.flatnonzero(first)[np.cumsum(first) - 1]
    by_turn = order[np.argsort(turn, kind="stable")]
    found = np.empty_like(x)
    for some in np.split(by_turn, np.cumsum(np.bincount(turn))[:-1]):
        old = view[index[some]]
        found[some] = old
        view[index[some]] = f(old, x[some], None if swap is None else swap[some])
    return found
