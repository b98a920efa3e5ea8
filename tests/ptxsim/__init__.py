"""A functional simulator for PTX: runs compiled GPU kernels on the CPU and checks them. See README.md."""

from .errors import BarrierError, DeadlockError, MemoryFault, RaceError, SimError, TrapError, UninitError
from .module import Module, Struct
from .stats import Access, BufferStats, Stats, device_bytes

__all__ = [
    "Access",
    "BarrierError",
    "BufferStats",
    "DeadlockError",
    "MemoryFault",
    "Module",
    "RaceError",
    "SimError",
    "Stats",
    "Struct",
    "TrapError",
    "UninitError",
    "device_bytes",
]
