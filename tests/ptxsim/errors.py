"""What a simulated program can do wrong."""


class SimError(Exception):
    """Any fault that the simulated program or its launch commits."""


class MemoryFault(SimError):  # noqa: N818 - the hardware's word
    """Out-of-bounds or misaligned access, or one to the shared memory of a block that has exited."""


class UninitError(MemoryFault):
    """Read of memory nobody has written, or of an asynchronous copy nobody has waited for."""


class RaceError(SimError):
    """Unordered conflicting accesses to one location."""


class DeadlockError(SimError):
    """Live threads wait for threads that never come, or the step limit was hit."""


class BarrierError(SimError):
    """A barrier executed by some threads of a warp or block at one place and by others elsewhere."""


class TrapError(SimError):
    """trap, or a failed device assertion."""
