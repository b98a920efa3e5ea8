"""Races on shared memory: two accesses to a byte, one of them a write, that no barrier puts in an order.

Happens-before at warp granularity with a vector clock a warp. The warps of a cluster's blocks share one clock space,
since they reach each other's shared memory.
"""

import numpy as np

#: In place of a lane's number: an atomic's write; a read by several lanes.
ATOMIC, SEVERAL_LANES = -3, -2


class RaceChecker:
    """``known[cluster, w, v]``: up to which epoch of warp v warp w knows what it did. Epochs end at barriers."""

    def __init__(self, clusters: int, warps: int, size: int) -> None:
        self.known = np.zeros((clusters, warps, warps), np.int32)
        self.published = np.zeros((clusters, warps), np.int32)
        self.writer = np.full(size, -1, np.int16)
        self.writer_lane = np.zeros(size, np.int8)
        self.write_epoch = np.zeros(size, np.int32)
        self.write_pc = np.zeros(size, np.int32)
        self.read_epoch = np.zeros((size, warps), np.int32)
        self.read_lane = np.zeros((size, warps), np.int8)
        self.read_pc = np.zeros((size, warps), np.int32)

    def sync(self, cluster, warps):
        """A barrier over some warps: each knows what any of them knew."""
        known = self.known[cluster]
        known[warps, warps] += 1
        known[warps] = known[warps].max(0)

    def sync_all(self):
        """:meth:`sync` of every warp of every block, where a block is a cluster of its own."""
        warps = np.arange(self.known.shape[1])
        self.known[:, warps, warps] += 1
        self.known[:] = self.known.max(1, keepdims=True)

    def release(self, cluster, warps):
        """Warps go past an arrival: what they have done so far, to be acquired by others."""
        known = self.known[cluster]
        known[warps, warps] += 1
        return known[warps].max(0)

    def acquire(self, cluster, warps, released):
        self.known[cluster, warps] = np.maximum(self.known[cluster, warps], released)

    def arrive(self, cluster, warps):
        """barrier.cluster.arrive."""
        self.published[cluster] = np.maximum(self.published[cluster], self.release(cluster, warps))

    def wait(self, cluster, warps):
        """barrier.cluster.wait, when it completes."""
        self.acquire(cluster, warps, self.published[cluster])

    def check(self, m, ins, lanes, index, size, write, atomic=False, new=None, old=None):
        """Records an access of ``size`` bytes at each shared byte index; a description of the race if it is one.

        ``new`` and ``old`` are the bytes a write puts there and finds there: writing what is there already is benign.
        """
        cluster, warp = m.cluster_of[lanes], m.warp_in_cluster[lanes]
        lane = (lanes & 31).astype(np.int8)
        known = self.known[cluster, warp]
        row = np.arange(lanes.size)
        epoch = known[row, warp] + 1
        for k in range(size):
            byte = index + k
            writer = self.writer[byte]
            unordered = (writer >= 0) & (self.write_epoch[byte] > known[row, np.maximum(writer, 0)])
            unordered &= (writer != warp) | (self.writer_lane[byte] != lane)
            changes = None if old is None else old[:, k] != new[:, k]
            if atomic:
                unordered &= self.writer_lane[byte] != ATOMIC
            if changes is not None:
                unordered &= changes
            if unordered.any():
                j = int(np.argmax(unordered))
                other = (int(writer[j]), int(self.writer_lane[byte[j]]), int(self.write_pc[byte[j]]))
                return self.report(m, ins, lanes[j], byte[j], "write" if write else "read", "write", other)
            if write:
                found = self.unordered_read(byte, known, warp, lane, changes)
                if found is not None:
                    j, v = found
                    other = (v, int(self.read_lane[byte[j], v]), int(self.read_pc[byte[j], v]))
                    return self.report(m, ins, lanes[j], byte[j], "write", "read", other)
                self.writer[byte], self.write_epoch[byte], self.write_pc[byte] = warp, epoch, ins.pc
                self.writer_lane[byte] = ATOMIC if atomic else lane
            else:
                self.note_read(byte, warp, lane, epoch, ins.pc)
        return None

    def unordered_read(self, byte, known, warp, lane, changes):
        """(access, warp) of a read that a write to ``byte`` does not come after."""
        conflict = self.read_epoch[byte] > known
        if not conflict.any():
            return None
        own = np.arange(known.shape[1]) == warp[:, None]
        conflict &= ~(own & (self.read_lane[byte] == lane[:, None]))
        if changes is not None:
            conflict &= changes[:, None]
        if not conflict.any():
            return None
        j, v = np.nonzero(conflict)
        return int(j[0]), int(v[0])

    def note_read(self, byte, warp, lane, epoch, pc):
        # A byte that several lanes read in one epoch has no single reader whose own write would be in order.
        again = (self.read_epoch[byte, warp] == epoch) & (self.read_lane[byte, warp] != lane)
        self.read_lane[byte, warp] = lane
        self.read_lane[byte[again], warp[again]] = SEVERAL_LANES
        lost = self.read_lane[byte, warp] != lane
        self.read_lane[byte[lost], warp[lost]] = SEVERAL_LANES
        self.read_epoch[byte, warp] = epoch
        self.read_pc[byte, warp] = pc

    def unseen(self, cluster, own, first, size):
        """Whether blocks' warps other than ``own`` accessed a block's bytes in a way that none of ``own`` knows of."""
        known = self.known[cluster, own].max(0)
        others = np.setdiff1d(np.arange(known.size), own)
        part = slice(first, first + size)
        writer = self.writer[part]
        wrote = np.isin(writer, others) & (self.write_epoch[part] > known[np.maximum(writer, 0)])
        return bool(wrote.any() or (self.read_epoch[part][:, others] > known[others]).any())

    def report(self, m, ins, lane, byte, kind, other_kind, other):
        warp, other_lane, pc = other
        block, warp = divmod(warp, m.warps)
        who = f"warp {warp} " + (f"lane {other_lane}" if other_lane >= 0 else "(several lanes)")
        where = "the same block" if block == m.rank_of[lane] else f"block {block} of the cluster"
        there = m.code[pc]
        return (
            f"shared-memory race in {m.kernel.name} at shared byte {int(byte) % m.shared_stride}: {kind} by "
            f"{m.where(lane)} at line {ins.line} `{ins.text}` conflicts with the {other_kind} by {who} of {where} "
            f"at line {there.line} `{there.text}`, no barrier in between"
        )
