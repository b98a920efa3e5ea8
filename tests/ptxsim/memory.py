"""Device memory: global buffers at made-up addresses, with what is known about each of their bytes."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

from .ops import UINT

#: A generic address names its memory space by its upper bits.
WINDOW = 44
SHARED_WINDOW, LOCAL_WINDOW, GLOBAL_WINDOW = 1, 2, 4
SPACES = ("global", "shared", "local", "const", "param")
#: Between two buffers: an index that is off by a whole buffer still hits no other one.
GAP = 1 << 20
ALIGNMENT = 512
#: Who wrote or read an element of global memory: nobody, or blocks more than one.
NOBODY, SEVERAL = -1, -2


class Flat:
    """An array of bytes with aligned views of 1, 2, 4 and 8 bytes an element: ``view[size]``."""

    def __init__(self, u8: np.ndarray) -> None:
        self.u8 = u8
        self.view = {size: u8[: u8.size // size * size].view(dtype) for size, dtype in UINT.items()}

    def mark(self, index: np.ndarray, size: int) -> None:
        """Sets the ``size`` bytes at each byte index to 1."""
        step = min(size, 8)
        for k in range(0, size, step):
            self.view[step][(index + k) // step] = _ones(step)

    def unmarked(self, index: np.ndarray, size: int) -> int | None:
        """The first position of ``index`` that has a byte other than 1 among its ``size``; None if there is none."""
        step = min(size, 8)
        for k in range(0, size, step):
            marked = self.view[step][(index + k) // step] == _ones(step)
            if not marked.all():
                return int(np.argmin(marked))
        return None


def _ones(size: int) -> Any:
    return UINT[size](int.from_bytes(b"\1" * size, "little"))


class Buffer(Flat):
    """One allocation.

    ``init`` marks the bytes that may be read, where some may not yet; ``reach`` the bytes that the kernel's arguments
    can address by their shapes and strides, where those are not all. None stands for all.
    """

    def __init__(self, name: str, u8: np.ndarray, base: int, const: bool = False) -> None:
        super().__init__(u8)
        self.name, self.base, self.size, self.const = name, base, u8.size, const
        self.loaded = self.stored = self.atomic = 0
        self.touched = Flat(np.zeros(u8.size, np.uint8))
        self.written = Flat(np.zeros(u8.size, np.uint8))
        self.storage: object = None
        self.init: Flat | None = None
        self.reach: Flat | None = None
        self.writer: np.ndarray | None = None
        self.reader: np.ndarray | None = None

    def track_blocks(self) -> None:
        """Starts to remember which block wrote and which read each element."""
        self.writer = np.full(self.size, NOBODY, np.int32)
        self.reader = np.full(self.size, NOBODY, np.int32)


class DeviceMemory:
    """The global, constant and parameter buffers of one launch."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.bases: list[int] = []
        self.next = GLOBAL_WINDOW << WINDOW

    def add(self, name: str, u8: np.ndarray, const: bool = False) -> Buffer:
        base = self.next
        self.next = (base + u8.size + GAP + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        buffer = Buffer(name, u8, base, const)
        self.buffers.append(buffer)
        self.bases.append(base)
        return buffer

    def find(self, address: int) -> Buffer | None:
        """The buffer at or below an address."""
        k = bisect.bisect_right(self.bases, address) - 1
        return self.buffers[k] if k >= 0 else None

    def describe(self, address: int, size: int) -> str:
        """What a bad address is near to."""
        below = self.find(address)
        if below is None:
            return f"address {address:#x} is in no buffer"
        offset = address - below.base
        if offset < below.size:
            return f"bytes {offset}..{offset + size - 1} of buffer {below.name!r} (size {below.size}) run past its end"
        above = next((b for b in self.buffers if b.base > address), None)
        if above is not None and above.base - address < offset - below.size:
            return f"address is {above.base - address} bytes before buffer {above.name!r}"
        return f"address is {offset - below.size} bytes past the end of buffer {below.name!r} (size {below.size})"
