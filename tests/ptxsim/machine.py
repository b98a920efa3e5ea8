"""The executor: a batch of blocks whose threads are lanes of numpy arrays, its scheduler and its barriers.

Groups of lanes at one program counter run together. The lowest counter goes first and groups merge where they meet, so
that divergent code converges again. Warp-synchronous instructions wait for the lanes in their mask; barriers complete
when nothing else can run; a lane that nothing can release is a deadlock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .access import MemoryAccess
from .errors import BarrierError, DeadlockError, MemoryFault, SimError, TrapError
from .fp import I64, U32
from .instructions import BETWEEN_BLOCKS, NO_OPS, WARP_SYNC, check_modifiers
from .memory import Flat
from .operands import Operands
from .ops import Arithmetic
from .parser import TYPE_SIZE
from .races import RaceChecker
from .warps import WarpCollectives

#: Backward branches before another group gets a turn: the loop may be waiting for it.
SPIN = 20_000
#: Bounds on a batch's memory: registers and local memory; the race checker's notes.
MAX_REGISTER_BYTES = 1 << 29
MAX_RACE_BYTES = 1 << 28
#: Hardware's named barriers of a block.
BARRIERS = 16
#: What the scheduler has to do for an instruction.
NORMAL, BRANCH, TABLE, EXIT, BARRIER, WARP, CLUSTER = range(7)


@dataclass(frozen=True)
class Options:
    """How to run a launch.

    Args:
        check_races: races on shared memory, and on global memory between blocks; True raises, "report" collects.
        check_uninit: reads of shared memory that nobody has written; True raises, "report" collects.
        strict: barriers in divergent code are errors.
        collect: count memory accesses.
        max_lanes: threads of a batch of blocks; batches run one after another.
        max_steps: instructions of a batch before it is called an endless loop.
    """

    check_races: bool | str = False
    check_uninit: bool | str = False
    strict: bool = True
    collect: bool = True
    max_lanes: int = 16384
    max_steps: int = 5_000_000


@dataclass
class Barrier:
    """An instruction that waits for threads of its block: kind "sync", "arrive" or "red"."""

    kind: str
    aligned: bool
    id: Any
    count: Any = None
    op: str = ""
    out: Any = None
    predicate: Any = None


class Arrivals:
    """What bar.arrive has brought to one barrier of one block."""

    def __init__(self) -> None:
        self.threads = 0
        self.released: list[Any] = []


class Machine(Operands, Arithmetic, MemoryAccess, WarpCollectives):
    """One kernel launch: builds a step for each instruction, then runs batches of blocks."""

    def __init__(self, module, kernel, grid, block, cluster, mem, stats, dynamic_shared, options):
        self.module, self.kernel, self.mem, self.stats = module, kernel, mem, stats
        self.grid, self.block, self.cluster, self.dynamic, self.options = grid, block, cluster, dynamic_shared, options
        self.check_races, self.check_uninit, self.collect = options.check_races, options.check_uninit, options.collect
        self.code = kernel.instrs
        for pc, ins in enumerate(self.code):
            ins.pc = pc
        self.threads = block[0] * block[1] * block[2]
        self.warps = -(-self.threads // 32)
        self.cluster_size = cluster[0] * cluster[1] * cluster[2]
        self.variables: dict[str, int] = {}
        self.lay_out_variables()
        self.blocks = grid[0] * grid[1] * grid[2]
        self.order = self.cluster_major_order()
        self.batch = self.blocks_of_a_batch()
        self.lay_out_lanes()
        self.regs, self.sregs, self.warned = {}, {}, set()
        self.counts = [0] * len(self.code)
        if self.check_races and not any(ins.base in BETWEEN_BLOCKS for ins in self.code):
            for buffer in mem.buffers:
                if not buffer.const:
                    buffer.track_blocks()
        self.steps = [self.build(ins) for ins in self.code]

    # Layout

    def lay_out_variables(self):
        """Addresses of the shared and local variables; dynamic shared memory follows the static."""
        used = {operand[1] for ins in self.code for operand in walk(ins.args) if operand[0] == "s"}
        shared = local = 0
        dynamic = []
        for var in [*self.kernel.vars.values(), *self.module.parser.globals.values()]:
            align = max(var.align, 1)
            if var.space == "shared" and var.name in used:
                if var.extern or var.size == 0:
                    dynamic.append(var)
                else:
                    shared = round_up(shared, align)
                    self.variables[var.name] = shared
                    shared += var.size
            elif var.space in ("local", "param"):
                local = round_up(local, align)
                self.variables[var.name] = local
                local += var.size
        for var in dynamic:
            shared = round_up(shared, max(var.align, 16))
            self.variables[var.name] = shared
        self.smem_size = self.stats.shared_bytes = shared + self.dynamic
        self.shared_stride = round_up(self.smem_size, 128)
        self.lmem_size = round_up(local, 16)

    def cluster_major_order(self):
        """Linear indices of all blocks, cluster after cluster, so that a batch holds whole clusters."""
        p, c, g = np.arange(self.blocks), self.cluster, self.grid
        q, r = p // self.cluster_size, p % self.cluster_size
        x = q % (g[0] // c[0]) * c[0] + r % c[0]
        y = q // (g[0] // c[0]) % (g[1] // c[1]) * c[1] + r // c[0] % c[1]
        z = q // (g[0] // c[0] * (g[1] // c[1])) * c[2] + r // (c[0] * c[1])
        return x + g[0] * (y + g[1] * z)

    def blocks_of_a_batch(self):
        used = {operand[1] for ins in self.code for operand in walk(ins.args) if operand[0] == "r"}
        lanes = 32 * self.warps
        lane_bytes = sum(TYPE_SIZE[self.kernel.regs[name]] for name in used) + self.lmem_size
        most = min(self.blocks, self.options.max_lanes // lanes, MAX_REGISTER_BYTES // max(1, lane_bytes * lanes))
        if self.check_races and self.smem_size:
            most = min(most, MAX_RACE_BYTES // (self.smem_size * (9 * self.warps * self.cluster_size + 16)))
        return round_up(max(1, most), self.cluster_size)

    def lay_out_lanes(self):
        lanes = 32 * self.warps
        self.L = self.batch * lanes
        self.lanes = np.arange(self.L)
        self.block_of, self.tid = self.lanes // lanes, self.lanes % lanes
        self.rank_of, self.cluster_of = self.block_of % self.cluster_size, self.block_of // self.cluster_size
        self.warp_of, self.warp_in_block, self.lane_id = self.lanes >> 5, self.tid >> 5, self.lanes & 31
        self.warp_in_cluster = self.rank_of * self.warps + self.warp_in_block
        self.linear = np.zeros(self.L, I64)  # the linear index of each lane's block, set for each batch
        self.smem = Flat(np.zeros(self.batch * self.shared_stride, np.uint8))
        self.smem.init = Flat(np.zeros(self.smem.u8.size, np.uint8)) if self.check_uninit else None
        self.smem_base = self.block_of * self.shared_stride
        self.lmem = Flat(np.zeros(self.L * self.lmem_size, np.uint8))
        self.lmem_base = self.lanes * self.lmem_size
        copies = any(ins.base == "cp" for ins in self.code)
        self.in_flight = Flat(np.zeros(self.smem.u8.size, np.uint8)) if copies else None

    def where(self, lane):
        """A lane's block and thread, for messages."""
        lane = int(lane)
        block, thread = int(self.linear[lane]), int(self.tid[lane])
        (gx, gy, _), (bx, by, _) = self.grid, self.block
        return (
            f"CTA ({block % gx},{block // gx % gy},{block // (gx * gy)}) thread "
            f"({thread % bx},{thread // bx % by},{thread // (bx * by)}) [warp {thread >> 5} lane {thread & 31}]"
        )

    # Building

    def build(self, ins):
        """(what the scheduler has to do, the step or what it needs, the predicate register and its negation)."""
        try:
            check_modifiers(ins)
            predicate = None if ins.pred is None else (self.reg(ins.pred[0]).raw, ins.pred[1])
            return *self.build_unpredicated(ins), predicate
        except (NotImplementedError, KeyError, StopIteration, IndexError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise NotImplementedError(f"PTX line {ins.line}: `{ins.text}` ({reason})") from error

    def build_unpredicated(self, ins):  # noqa: PLR0911 - one a kind
        base = ins.base
        if base == "bra":
            return BRANCH, ins.targets[0]
        if base == "brx":
            return TABLE, self.src(ins.args[0], "u32")
        if base in ("ret", "exit"):
            return EXIT, None
        if base in ("bar", "barrier"):
            return self.build_barrier(ins)
        if base in WARP_SYNC:
            return WARP, self.build_warp(ins)
        if base in NO_OPS:
            return NORMAL, lambda ix: None
        method = getattr(self, "b_" + base, None)
        if method is None:
            raise NotImplementedError("unknown instruction")
        return NORMAL, method(ins)

    def build_barrier(self, ins):
        mods, args = ins.mods, ins.args
        if mods[0] == "warp":
            return WARP, (None, *self.member_mask(args[0]))
        if mods[0] == "cluster":
            return CLUSTER, "wait" if "wait" in mods else "arrive"
        kind = next(m for m in mods if m in ("sync", "arrive", "red"))
        barrier = Barrier(kind, aligned=ins.base == "bar" or "aligned" in mods, id=None)
        if kind == "red":
            barrier.op = next(m for m in mods if m in ("popc", "and", "or"))
            barrier.out = self.dst(args[0], "u32" if barrier.op == "popc" else "pred")
            barrier.predicate = self.src(args[-1], "pred")
            args = args[1:-1]
        barrier.id = self.src(args[0], "u32")
        barrier.count = self.src(args[1], "u32") if len(args) > 1 else None
        return BARRIER, barrier

    def b_createpolicy(self, ins):
        out = self.dst(ins.args[0], "b64")

        def step(ix):
            out[ix] = 0

        return step

    def b_trap(self, ins):
        def step(ix):
            where = self.where(self.lanes[ix][0])
            raise TrapError(f"{self.kernel.name}: trap executed by {where} (line {ins.line})")

        return step

    def b_extcall(self, ins):
        name = ins.mods[0]

        def step(ix):
            if "assert" in name:
                where = self.where(self.lanes[ix][0])
                raise TrapError(f"{self.kernel.name}: device assertion failed in {where} (line {ins.line})")
            self.stats.warn(f"call to {name} ignored")

        return step

    # Running

    def run(self):
        with np.errstate(all="ignore"):
            for first in range(0, self.blocks, self.batch):
                self.run_batch(first, min(self.batch, self.blocks - first))

    def pack(self, lanes):
        """Contiguous sorted lanes become a slice."""
        first, last = int(lanes[0]), int(lanes[-1])
        return slice(first, last + 1) if last - first + 1 == lanes.size else lanes

    def push(self, pc, ix):
        self.pending.setdefault(pc, []).append(ix)

    def warps_in(self, ix):
        if isinstance(ix, slice):
            return ((ix.stop - 1) >> 5) - (ix.start >> 5) + 1
        warp = ix >> 5
        return 1 + np.count_nonzero(warp[1:] != warp[:-1])

    def start_batch(self, first, blocks):
        self.linear[:] = self.order[np.minimum(first + self.block_of, self.blocks - 1)]
        self.fill_batch_sregs()
        self.smem.u8.fill(0xFF)  # NaN, should something not written be used
        if self.smem.init is not None:
            self.smem.init.u8.fill(0)
        if self.in_flight is not None:
            self.in_flight.u8.fill(0)
        self.races = None
        if self.check_races and self.smem_size:
            clusters = self.batch // self.cluster_size
            self.races = RaceChecker(clusters, self.warps * self.cluster_size, self.smem.u8.size)
        self.alive = (self.block_of < blocks) & (self.tid < self.threads)
        self.live_mask = self.ballot(np.flatnonzero(self.alive), None)
        self.live_threads = np.bincount(self.block_of[self.alive], minlength=self.batch)
        self.waits_at = np.full(self.L, -1, np.int32)  # the barrier that a lane is parked at
        self.waits_for = np.zeros(self.L, np.int32)  # how many threads it needs, 0 for all of the block
        self.waits_pc = np.zeros(self.L, np.int32)
        self.arrivals = {}  # (block, barrier) -> Arrivals
        self.cluster_arrivals = np.zeros(self.L, np.int32)
        self.cluster_waiting = {}  # pc -> lanes parked at barrier.cluster.wait
        self.parked = {}  # pc -> lanes waiting for others of their warp
        self.copies = []  # asynchronous copies nobody has waited for
        self.commits = np.zeros(self.L, I64)  # groups of them that each lane has committed
        self.pending = {0: [self.pack(np.flatnonzero(self.alive))]}
        self.executed = self.spin = 0

    def run_batch(self, first, blocks):
        self.start_batch(first, blocks)
        while True:
            if not self.pending:
                if not self.release():
                    return
                continue
            if self.spin > SPIN:  # perhaps a loop that waits for others: they go first, even at barriers
                self.spin = 0
                self.release(force=True)
                pc = max(self.pending)
            else:
                pc = min(self.pending)
            parts = self.pending.pop(pc)
            if len(parts) == 1:
                self.run_from(pc, parts[0])
            else:
                self.run_from(pc, self.pack(np.sort(np.concatenate([self.lanes[part] for part in parts]))))

    def run_from(self, pc, ix):  # noqa: PLR0912 - the inner loop
        """Runs one group of lanes until it branches apart, waits, ends or meets another group."""
        steps, counts, pending = self.steps, self.counts, self.pending
        warps = self.warps_in(ix)
        while True:
            kind, step, predicate = steps[pc]
            counts[pc] += warps
            self.executed += 1
            if self.executed > self.options.max_steps:
                limit = f"step limit of {self.options.max_steps} reached (endless loop?) at line {self.code[pc].line}"
                self.raise_deadlock(limit)
            taken, rest = (ix, None) if predicate is None else self.split(ix, predicate)
            if kind == NORMAL:
                if taken is not None:
                    step(taken)
                pc += 1
            elif taken is None:
                pc += 1
            elif kind == BRANCH:
                self.spin += step <= pc
                if rest is not None:
                    self.push(step, taken)
                    self.push(pc + 1, rest)
                    return
                pc = step
                if self.spin > SPIN or (pending and pc > min(pending)):
                    self.push(pc, ix)
                    return
            else:
                if rest is not None:
                    self.push(pc + 1, rest)
                if kind != WARP:
                    self.leave(pc, taken, kind, step)
                    return
                went = self.warp_op(pc, taken, step)
                if went is not ix:
                    if went is not None:
                        self.push(pc + 1, went)
                    return
                pc += 1
            if pc in pending:
                self.push(pc, ix)
                return

    def split(self, ix, predicate):
        """(lanes for which a predicate holds, the others); None for no lanes."""
        register, negated = predicate
        holds = ~register[ix] if negated else register[ix]
        count = np.count_nonzero(holds)
        if count == 0:
            return None, ix
        if count == holds.size:
            return ix, None
        lanes = self.lanes[ix]
        return self.pack(lanes[holds]), self.pack(lanes[~holds])

    def leave(self, pc, ix, kind, step):
        """An instruction after which the group's lanes wait, end or go separate ways."""
        lanes = self.lanes[ix]
        if kind == EXIT:
            self.retire(lanes)
        elif kind == BARRIER:
            if self.arrive(pc, ix, step):
                self.push(pc + 1, ix)
        elif kind == CLUSTER:
            if step == "wait":
                self.cluster_waiting.setdefault(pc, []).append(lanes)
                return
            self.cluster_arrivals[ix] += 1
            if self.races is not None:
                for cluster, warps in self.warps_by(self.cluster_of, self.warp_in_cluster, lanes):
                    self.races.arrive(cluster, warps)
            self.push(pc + 1, ix)
        elif kind == TABLE:
            targets = np.array(self.code[pc].targets)[step[ix]]
            for target in np.unique(targets):
                self.push(int(target), self.pack(lanes[targets == target]))

    def retire(self, lanes):
        self.alive[lanes] = False
        self.live_mask &= ~self.ballot(lanes, None)
        self.live_threads -= np.bincount(self.block_of[lanes], minlength=self.batch)
        if self.races is None or self.cluster_size == 1:
            return
        for block in np.unique(self.block_of[lanes]):
            if self.live_threads[block]:
                continue
            cluster, rank = divmod(int(block), self.cluster_size)
            own = np.arange(rank * self.warps, (rank + 1) * self.warps)
            if self.races.unseen(cluster, own, int(block) * self.shared_stride, self.smem_size):
                last = self.where(lanes[self.block_of[lanes] == block][-1])
                raise MemoryFault(
                    f"{self.kernel.name}: block {rank} of a cluster exits and nothing orders that after another "
                    f"block's access to its shared memory (last: {last})"
                )

    @staticmethod
    def warps_by(group_of, warp_in_group, lanes):
        """(group, its warps among the lanes) for each group."""
        for group in np.unique(group_of[lanes]):
            yield int(group), np.unique(warp_in_group[lanes[group_of[lanes] == group]])

    # Warp-synchronous instructions

    def warp_op(self, pc, ix, operation):
        """Runs one for the warps whose lanes are all here, parks the others; the lanes that ran (ix itself if all)."""
        step, masks, full = operation
        whole = full and isinstance(ix, slice) and ix.start % 32 == 0 and (ix.stop - ix.start) % 32 == 0
        if not whole or pc in self.parked:
            ix = self.complete_warps(pc, ix, masks)
            if ix is None:
                return None
        if step is not None:
            step(ix)
        elif self.races is not None:  # bar.warp.sync orders shared memory within the warp
            for cluster, warps in self.warps_by(self.cluster_of, self.warp_in_cluster, self.lanes[ix]):
                self.races.known[cluster, warps, warps] += 1
        return ix

    def complete_warps(self, pc, ix, masks):
        old = self.parked.pop(pc, None)
        lanes = self.lanes[ix]
        if old is not None:
            lanes = np.sort(np.concatenate([lanes, old]))
        warp, ins = lanes >> 5, self.code[pc]
        mask = masks[lanes]
        outside = ((mask >> (lanes & 31).astype(U32)) & U32(1)) == 0
        if self.options.strict and outside.any():
            j = int(np.argmax(outside))
            raise BarrierError(
                f"{self.kernel.name}: {self.where(lanes[j])} executes line {ins.line}: `{ins.text}` but is not in its "
                f"own member mask {int(mask[j]):#010x}"
            )
        missing = mask & self.live_mask[warp] & ~self.ballot(lanes, None)[warp]
        wait = missing != 0
        if wait.any():
            self.parked[pc] = lanes[wait]
            lanes = lanes[~wait]
            if not lanes.size:
                return None
        if (mask & ~self.live_mask[warp]).any() and ins.mods[:1] != ("warp",):
            self.stats.warn(f"line {ins.line}: `{ins.text}` names lanes that have exited")
        return self.pack(lanes) if old is not None or wait.any() else ix

    def release_warps(self):
        """Tries parked warp operations again (lanes may have exited); bar.warp.sync meets at different places."""
        places = [pc for pc in self.parked if self.code[pc].mods[:1] == ("warp",)]
        if places:
            here = self.ballot(np.sort(np.concatenate([self.parked[pc] for pc in places])), None)
            moved = False
            for pc in places:
                lanes = self.parked[pc]
                ready = (self.steps[pc][1][1][lanes] & self.live_mask[lanes >> 5] & ~here[lanes >> 5]) == 0
                if ready.any():
                    moved = True
                    self.push(pc + 1, self.pack(lanes[ready]))
                    self.park_rest(self.parked, pc, lanes[~ready])
            if moved:
                return True
        for pc, lanes in list(self.parked.items()):
            warp, mask = lanes >> 5, self.steps[pc][1][1][lanes]
            if ((mask & self.live_mask[warp] & ~self.ballot(lanes, None)[warp]) == 0).any():
                del self.parked[pc]
                self.push(pc, self.pack(lanes))
                return True
        return False

    @staticmethod
    def park_rest(places, pc, rest):
        if rest.size:
            places[pc] = rest
        else:
            del places[pc]

    # Barriers

    def arrive(self, pc, ix, barrier):
        """Parks lanes at a barrier of their block; True where they need not wait."""
        lanes, ids = self.lanes[ix], barrier.id[ix]
        if barrier.kind == "arrive":
            self.arrive_only(lanes, ids)
            return True
        if (self.waits_at[lanes] >= 0).any():
            raise SimError("lane already waiting at a barrier")
        self.waits_at[ix], self.waits_pc[ix] = ids, pc
        self.waits_for[ix] = 0 if barrier.count is None else barrier.count[ix]
        return False

    def arrive_only(self, lanes, ids):
        for block, number in sorted(set(zip(self.block_of[lanes].tolist(), ids.tolist(), strict=True))):
            some = lanes[(self.block_of[lanes] == block) & (ids == number)]
            arrived = self.arrivals.setdefault((block, number), Arrivals())
            warps = np.unique(self.warp_in_cluster[some])
            arrived.threads += 32 * warps.size
            if self.races is not None:
                arrived.released.append(self.races.release(block // self.cluster_size, warps))

    def release(self, force=False):
        """Nothing can run: completes the barriers whose threads are all there. False: the batch is finished."""
        moved = False
        waiting = np.flatnonzero(self.waits_at >= 0)
        if waiting.size:
            if waiting.size == np.count_nonzero(self.alive) and self.complete_everywhere(waiting):
                return True
            key = self.block_of[waiting] * BARRIERS + self.waits_at[waiting]
            for one in np.unique(key):
                moved |= self.try_complete(*divmod(int(one), BARRIERS), waiting[key == one])
        for pc, parts in list(self.cluster_waiting.items()):
            moved |= self.try_cluster(pc, np.sort(np.concatenate(parts)))
        if self.parked and not moved:
            moved = self.release_warps()
        if force or moved:
            return True
        if self.alive.any():
            self.raise_deadlock("deadlock")
        return False

    def try_complete(self, block, number, lanes):
        count = int(self.waits_for[lanes].max())
        arrived = self.arrivals.get((block, number), Arrivals())
        need = count or int(self.live_threads[block])
        have = 32 * np.unique(lanes >> 5).size + arrived.threads if count else lanes.size
        if have < need:
            return False
        self.complete(block, number, lanes, count, arrived)
        return True

    def try_cluster(self, pc, lanes):
        """barrier.cluster.wait ends when every live thread of the cluster has arrived as often as the waiting one."""
        least = np.full(self.batch, 1 << 30)
        np.minimum.at(least, self.cluster_of[self.alive], self.cluster_arrivals[self.alive])
        ready = least[self.cluster_of[lanes]] >= self.cluster_arrivals[lanes]
        if not ready.any():
            return False
        done = lanes[ready]
        self.push(pc + 1, self.pack(done))
        if self.races is not None:
            for cluster, warps in self.warps_by(self.cluster_of, self.warp_in_cluster, done):
                self.races.wait(cluster, warps)
        del self.cluster_waiting[pc]
        if not ready.all():
            self.cluster_waiting[pc] = [lanes[~ready]]
        return True

    def complete_everywhere(self, waiting):
        """The common case: every live thread of every block waits at the same plain barrier."""
        pc, number = int(self.waits_pc[waiting[0]]), self.waits_at[waiting[0]]
        same = (self.waits_pc[waiting] == pc).all() and (self.waits_at[waiting] == number).all()
        if not same or self.waits_for[waiting].any() or self.arrivals or self.steps[pc][1].kind != "sync":
            return False
        blocks = np.flatnonzero(self.live_threads)
        self.stats.barriers += blocks.size
        self.warn_of_exits(pc, blocks)
        if self.races is not None:
            if waiting.size == self.batch * self.threads and self.cluster_size == 1:
                self.races.sync_all()
            else:
                for block, warps in self.warps_by(self.block_of, self.warp_in_cluster, waiting):
                    self.races.sync(block // self.cluster_size, warps)
        self.waits_at[waiting] = -1
        self.push(pc + 1, self.pack(waiting))
        return True

    def warn_of_exits(self, pc, blocks):
        if (self.live_threads[blocks] < self.threads).any():
            line = self.code[pc].line
            self.stats.warn(f"barrier at line {line} completed after some threads of the block had exited")

    def complete(self, block, number, lanes, count, arrived):
        pcs = self.waits_pc[lanes]
        self.stats.barriers += 1
        if self.options.strict:
            self.check_aligned(number, lanes, pcs, count)
        if not count:
            self.warn_of_exits(int(pcs[0]), block)
        if self.races is not None:
            cluster, warps = block // self.cluster_size, np.unique(self.warp_in_cluster[lanes])
            self.races.sync(cluster, warps)
            for released in arrived.released:
                self.races.acquire(cluster, warps, released)
        self.arrivals.pop((block, number), None)
        for pc in np.unique(pcs):
            barrier = self.steps[pc][1]
            if barrier.kind == "red":
                votes = barrier.predicate[lanes]
                result = {"popc": votes.sum(), "and": votes.all(), "or": votes.any()}[barrier.op]
                barrier.out[lanes[pcs == pc]] = result
            self.push(int(pc) + 1, self.pack(lanes[pcs == pc]))
        self.waits_at[lanes] = -1

    def check_aligned(self, number, lanes, pcs, count):
        if not count and (pcs != pcs[0]).any():
            j = int(np.argmax(pcs != pcs[0]))
            here, there = self.code[int(pcs[0])], self.code[int(pcs[j])]
            raise BarrierError(
                f"{self.kernel.name}: barrier {number} of one block is executed at different places: "
                f"{self.where(lanes[0])} at line {here.line}, {self.where(lanes[j])} at line {there.line}"
            )
        if self.steps[int(pcs[0])][1].aligned:
            partial = self.ballot(lanes, None) ^ self.live_mask
            warps = np.unique(lanes >> 5)
            if partial[warps].any():
                warp = int(warps[np.argmax(partial[warps] != 0)]) % self.warps
                raise BarrierError(
                    f"{self.kernel.name}: aligned barrier {number} at line {self.code[int(pcs[0])].line} is executed "
                    f"by part of a warp only (warp {warp} of {self.where(lanes[0])})"
                )

    def raise_deadlock(self, why):
        out = [f"{self.kernel.name}: {why}"]
        for block in np.unique(self.block_of[self.alive])[:3]:
            inside = np.flatnonzero(self.alive & (self.block_of == block))
            waiting = inside[self.waits_at[inside] >= 0]
            key = self.waits_pc[waiting] * BARRIERS + self.waits_at[waiting]
            for one in np.unique(key):
                pc, number = divmod(int(one), BARRIERS)
                lanes = waiting[key == one]
                need = int(self.waits_for[lanes].max()) or int(self.live_threads[block])
                out.append(
                    f"  {lanes.size} threads (first {self.where(lanes[0])}) wait at barrier {number}, line "
                    f"{self.code[pc].line} `{self.code[pc].text}`, which needs {need} threads"
                )
            others = {**self.parked, **{pc: np.concatenate(parts) for pc, parts in self.cluster_waiting.items()}}
            for pc, lanes in others.items():
                some = lanes[self.block_of[lanes] == block]
                if some.size:
                    ins = self.code[pc]
                    first = self.where(some[0])
                    out.append(f"  {some.size} threads (first {first}) wait at line {ins.line} `{ins.text}`")
        raise DeadlockError("\n".join(out))


def round_up(value, unit):
    return -(-value // unit) * unit


def walk(operands):
    """All operands, also those inside others."""
    for operand in operands:
        yield operand
        if operand[0] in ("v", "t"):
            yield from walk(operand[1])
        elif operand[0] in ("m", "n"):
            yield from walk([operand[1]])
        elif operand[0] == "pair":
            yield from walk(operand[1:])
