"""Counters of one launch, or of several of one kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

SECTOR = 32


@dataclass
class Access:
    """Requests of one kind (loads, stores or atomics) to global memory."""

    bytes: int = 0
    instrs: int = 0  # of warps
    sectors: int = 0

    @property
    def efficiency(self) -> float:
        """Requested bytes over those of the 32-byte sectors touched; each warp instruction touches its own."""
        return self.bytes / (SECTOR * self.sectors) if self.sectors else 1.0

    def add(self, other: Access) -> None:
        self.bytes += other.bytes
        self.instrs += other.instrs
        self.sectors += other.sectors

    def __str__(self) -> str:
        return f"{self.bytes} bytes, {self.instrs} warp instructions, {self.sectors} sectors, {self.efficiency:.3f}"


@dataclass
class BufferStats:
    """What a launch did to one allocation, in bytes."""

    name: str
    storage: object = None  # whose bytes these are: the same allocation in other launches has the same
    size: int = 0
    loaded: int = 0
    stored: int = 0
    atomic: int = 0  # not in loaded or stored
    distinct_loaded: int = 0
    distinct_stored: int = 0  # by stores or atomics

    @property
    def unwritten(self) -> int:
        return self.size - self.distinct_stored

    @property
    def reads_per_byte(self) -> float:
        return self.loaded / self.distinct_loaded if self.distinct_loaded else 0.0


@dataclass
class Stats:
    """Counters; PTX instructions count for each warp that issues them, predicated off or not."""

    kernel: str
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    launches: int = 1
    load: Access = field(default_factory=Access)
    store: Access = field(default_factory=Access)
    atomic: Access = field(default_factory=Access)
    shared_bytes: int = 0  # allocated, a block
    shared_load: int = 0  # this and the following in bytes
    shared_store: int = 0
    shared_atomic: int = 0
    local_load: int = 0
    local_store: int = 0
    const_load: int = 0
    shared_instrs: int = 0  # of warps
    shared_wavefronts: int = 0
    shared_ideal_wavefronts: int = 0
    barriers: int = 0  # completed, over all blocks
    seconds: float = 0.0
    warp_instrs: Counter[str] = field(default_factory=Counter)  # class -> warp instructions
    lines: list[tuple[int, str, str, int]] = field(default_factory=list)  # PTX line, text, class, warp instructions
    sectors_of_line: dict[int, Access] = field(default_factory=dict)
    conflicts_of_line: Counter[int] = field(default_factory=Counter)
    buffers: dict[str, BufferStats] = field(default_factory=dict)
    races: list[str] = field(default_factory=list)
    uninit: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # suspicious, but not certainly wrong

    @property
    def bytes(self) -> int:
        """Bytes requested from global memory."""
        return self.load.bytes + self.store.bytes + self.atomic.bytes

    @property
    def bank_conflicts(self) -> int:
        """Extra shared-memory wavefronts over the conflict-free number."""
        return self.shared_wavefronts - self.shared_ideal_wavefronts

    @property
    def thread_instrs(self) -> int:
        """PTX instructions issued, times 32 threads."""
        return 32 * sum(self.warp_instrs.values())

    def count_global(self, kind: str, size: int, instrs: int, sectors: int, line: int) -> None:
        request = Access(size, instrs, sectors)
        getattr(self, kind).add(request)
        self.sectors_of_line.setdefault(line, Access()).add(request)

    def count_shared(self, kind: str, size: int, instrs: int, waves: int, ideal: int, line: int) -> None:
        name = f"shared_{kind}"
        setattr(self, name, getattr(self, name) + size)
        self.shared_instrs += instrs
        self.shared_wavefronts += waves
        self.shared_ideal_wavefronts += ideal
        if waves > ideal:
            self.conflicts_of_line[line] += waves - ideal

    def count_local(self, kind: str, size: int) -> None:
        if kind == "load":
            self.local_load += size
        else:
            self.local_store += size

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def merge(self, other: Stats) -> None:
        """Adds another launch of the same kernel; lines are those of the compiled variant and are not merged."""
        self.load.add(other.load)
        self.store.add(other.store)
        self.atomic.add(other.atomic)
        self.warp_instrs.update(other.warp_instrs)
        for name in ("launches", "barriers", "seconds", *_SUMMED):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, buffer in other.buffers.items():
            mine = self.buffers.setdefault(name, BufferStats(name, buffer.storage))
            for column in fields(BufferStats)[2:]:
                setattr(mine, column.name, getattr(mine, column.name) + getattr(buffer, column.name))
        for message in other.warnings:
            self.warn(message)
        self.races += other.races
        self.uninit += other.uninit

    def report(self) -> str:
        """All of it, for a person."""
        lines = [
            f"kernel {self.kernel}: {self.launches} launch(es), grid {self.grid} block {self.block}, "
            f"shared {self.shared_bytes} B, simulated in {self.seconds:.2f} s",
            f"  global loads:   {self.load}",
            f"  global stores:  {self.store}",
            f"  global atomics: {self.atomic}",
            f"  shared: load {self.shared_load} B, store {self.shared_store} B, {self.shared_instrs} warp instrs, "
            f"{self.bank_conflicts} extra wavefronts; local: load {self.local_load} B, store {self.local_store} B",
            f"  barriers {self.barriers}, warp instructions {dict(self.warp_instrs)}",
        ]
        for b in self.buffers.values():
            if b.loaded or b.stored or b.atomic:
                lines.append(
                    f"  buffer {b.name}: size {b.size}, loaded {b.loaded} (distinct {b.distinct_loaded}), stored "
                    f"{b.stored} (distinct {b.distinct_stored}), atomic {b.atomic}"
                )
        for title, found in (("warning", self.warnings), ("RACE", self.races), ("UNINIT", self.uninit)):
            lines += [f"  {title}: {message}" for message in found]
        return "\n".join(lines)


_SUMMED = tuple(f.name for f in fields(Stats) if f.name.startswith(("shared_", "local_", "const_")))
_SUMMED = tuple(name for name in _SUMMED if name != "shared_bytes")


def device_bytes(launches: Iterable[Stats], matrix_bytes: int) -> int:
    """Bytes that launches after one another move between a chip and its memory: a model of its cache.

    Buffers of ``matrix_bytes`` or more count each time a byte of them is asked for. Smaller ones count once, however
    many launches and threads use them: they are still in the cache.
    """
    matrices, small = 0, {}
    for stats in launches:
        for buffer in stats.buffers.values():
            if buffer.size >= matrix_bytes:
                matrices += buffer.loaded + buffer.stored + buffer.atomic
            else:
                used = max(buffer.distinct_loaded, buffer.distinct_stored)
                small[buffer.storage] = max(small.get(buffer.storage, 0), used)
    return matrices + sum(small.values())
