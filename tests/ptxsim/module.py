"""A parsed PTX module, and its launches: arguments become device memory, the kernel runs, counters come back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .errors import SimError
from .fp import F16, F32, F64, U64
from .instructions import classify
from .machine import Machine, Options, round_up
from .memory import Buffer, DeviceMemory, Flat
from .ops import DT, UINT
from .parser import TYPE_SIZE, Param, Parser
from .stats import BufferStats, Stats

Size = int | Sequence[int]


class Allocation:
    """The storage behind a torch tensor or numpy array, and the part of it that the tensor can address."""

    def __init__(self, value: torch.Tensor | np.ndarray) -> None:
        self.value = value
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            self.key = ("torch", storage.data_ptr())
            self.u8 = torch.empty(0, dtype=torch.uint8).set_(storage).numpy() if storage.nbytes() else _NO_BYTES
            self.offset = value.storage_offset() * value.element_size()
            return
        base = value
        while isinstance(base.base, np.ndarray):
            base = base.base
        if not base.flags.c_contiguous:
            raise ValueError("numpy arguments must come from a C-contiguous array")
        start = base.__array_interface__["data"][0]
        self.key, self.u8 = ("numpy", start), base.reshape(-1).view(np.uint8)
        self.offset = value.__array_interface__["data"][0] - start

    def mark_reach(self, marks: np.ndarray) -> None:
        """Sets the bytes of the elements that shape and strides lead to."""
        value = self.value
        if not isinstance(value, torch.Tensor):
            marks[:] = 1
            return
        if value.numel() == 0:
            return
        size = value.element_size()
        strides = [stride * size for stride in value.stride()]
        torch.from_numpy(marks).as_strided([*value.shape, size], [*strides, 1], self.offset).fill_(1)

    def contiguous_part(self) -> slice:
        value = self.value
        contiguous = value.is_contiguous() if isinstance(value, torch.Tensor) else value.flags.c_contiguous
        if not contiguous:
            raise ValueError("poison needs contiguous tensors")
        return slice(self.offset, self.offset + value.nbytes)


_NO_BYTES = np.zeros(0, np.uint8)


class Struct(NamedTuple):
    """A structure passed by value, and its pointers: ``(offset, tensor, name)``, null where no tensor is named."""

    data: bytes
    pointers: Sequence[tuple[int, torch.Tensor | np.ndarray, str]]


class Module:
    """The kernels of a PTX text; module-scope variables keep their values between launches."""

    def __init__(self, ptx: str) -> None:
        self.text, self.parser = ptx, Parser(ptx)
        self.parsed: dict[str, Any] = {}
        self.globals: dict[str, np.ndarray] = {}
        self.global_addr: dict[str, int] = {}
        self.param_addr: dict[str, int] = {}

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels."""
        return list(self.parser.kernels)

    def kernel(self, name: str) -> Any:
        """The parsed kernel; KeyError if there is none of that name."""
        if name not in self.parsed:
            if name not in self.parser.kernels:
                raise KeyError(f"no kernel {name!r}; there are {self.kernels}")
            self.parsed[name] = self.parser.kernel(name)
        return self.parsed[name]

    def global_array(self, name: str) -> np.ndarray:
        """The bytes of a module-scope .global or .const variable."""
        if name not in self.globals:
            self.globals[name] = np.zeros(self.parser.globals[name].size, np.uint8)
        return self.globals[name]

    def launch(
        self,
        name: str,
        grid: Size,
        block: Size,
        args: Sequence[Any],
        shared_bytes: int = 0,
        *,
        cluster: Size | None = None,
        arg_names: Sequence[str] | None = None,
        poison: Sequence[torch.Tensor | np.ndarray] = (),
        written: Mapping[Any, np.ndarray] | None = None,
        **options: Any,
    ) -> Stats:
        """Runs a kernel.

        Args:
            name, grid, block: which kernel, on how many blocks of how many threads.
            args: torch CPU tensors or numpy arrays (passed by address, changed in place), ints, floats, None (null),
                bytes, ctypes structures or Struct (by value). Missing trailing pointers are null.
            shared_bytes: dynamic shared memory of a block.
            cluster: blocks of a cluster, if the kernel does not say.
            arg_names: what to call the arguments' buffers, by default arg0, arg1, ...
            poison: contiguous tensors that hold nothing yet: it is an error to read a byte that was not written.
            written: the same across launches: for the keys of some allocations, a byte each that is 1 where the
                allocation's may be read; updated by the launch.
            options: of :class:`~ptxsim.machine.Options`.

        Raises:
            SimError: the launch's arguments do not fit, or the program is faulty (its subclasses).
            NotImplementedError: the kernel has an instruction that is not simulated.
        """
        start = time.perf_counter()
        kernel = self.kernel(name)
        grid, block = _three(grid), _three(block)
        cluster = _three(cluster or kernel.cluster or 1)
        if kernel.reqntid and _three(kernel.reqntid) != block:
            raise SimError(f"kernel {name} requires block {kernel.reqntid}, launched with {block}")
        if any(g % c for g, c in zip(grid, cluster, strict=True)):
            raise SimError(f"grid {grid} is not a multiple of the cluster {cluster}")
        missing = kernel.params[len(args) :]
        if len(args) > len(kernel.params) or any(param.type not in ("u64", "b64") for param in missing):
            raise SimError(f"kernel {name} takes {len(kernel.params)} parameters, got {len(args)}")
        mem = DeviceMemory()
        self.map_globals(mem)
        values = self.map_tensors(mem, args, arg_names, poison, written or {})
        values += [None] * len(missing)
        self.map_params(mem, kernel.params, values)
        stats = Stats(name, grid, block)
        machine = Machine(self, kernel, grid, block, cluster, mem, stats, shared_bytes, Options(**options))
        try:
            machine.run()
        finally:
            self.finish(machine)
            stats.seconds = time.perf_counter() - start
        return stats

    def map_tensors(self, mem, args, names, poison, written):
        """The arguments, with addresses in place of tensors."""
        values, seen = [], {}

        def address(tensor, name):
            there = Allocation(tensor)
            if there.key not in seen:
                buffer = seen[there.key] = mem.add(name, there.u8)
                buffer.storage, buffer.reach = there.key, Flat(np.zeros(buffer.size, np.uint8))
                if there.key in written:
                    buffer.init = Flat(written[there.key])
            buffer = seen[there.key]
            there.mark_reach(buffer.reach.u8)
            return buffer.base + there.offset

        for j, arg in enumerate(args):
            if isinstance(arg, Struct):
                data = bytearray(arg.data)
                for offset, tensor, name in arg.pointers:
                    data[offset : offset + 8] = address(tensor, name).to_bytes(8, "little")
                values.append(bytes(data))
            elif isinstance(arg, torch.Tensor) or (isinstance(arg, np.ndarray) and np.ndim(arg)):
                values.append(address(arg, names[j] if names else f"arg{j}"))
            else:
                values.append(arg)
        for buffer in seen.values():
            if buffer.reach.u8.all():
                buffer.reach = None
        for tensor in poison:
            there = Allocation(tensor)
            if there.key in seen:
                _poison(seen[there.key], there.contiguous_part())
        return values

    def map_params(self, mem, params, values):
        blob, self.param_addr = bytearray(), {}
        for param, value in zip(params, values, strict=True):
            blob += bytes(round_up(len(blob), param.align) - len(blob))
            self.param_addr[param.name] = len(blob)
            blob += encode(value, param)
        base = mem.add("<params>", np.frombuffer(bytes(blob) or b"\0", np.uint8).copy(), const=True).base
        self.param_addr = {name: base + offset for name, offset in self.param_addr.items()}

    def map_globals(self, mem: DeviceMemory) -> None:
        self.global_addr = {}
        fresh = []
        for name, var in self.parser.globals.items():
            if var.space in ("global", "const") and not (var.extern and var.size == 0):
                if name not in self.globals and var.init:
                    fresh.append((var, name))
                buffer = mem.add(name, self.global_array(name), const=var.space == "const")
                self.global_addr[name] = buffer.base
        for var, name in fresh:
            offset = 0
            for ty, value in var.init:
                size = TYPE_SIZE[ty]
                raw = self.initial_value(ty, value).astype(UINT[size]).reshape(1).view(np.uint8)
                self.globals[name][offset : offset + size] = raw
                offset += size

    def initial_value(self, ty, value):
        if isinstance(value, tuple):
            return np.array(self.global_addr[value[1]] + value[2] if value[0] == "sym" else value[1], U64)
        size = TYPE_SIZE[ty]
        if isinstance(value, float):
            return np.array(value, F32 if size == 4 else F64).view(UINT[size])
        return np.array(value & ((1 << 8 * size) - 1), U64)

    @staticmethod
    def finish(machine: Machine) -> None:
        stats = machine.stats
        for ins, count in zip(machine.code, machine.counts, strict=True):
            if count:
                stats.warp_instrs[classify(ins)] += count
                stats.lines.append((ins.line, ins.text, classify(ins), count))
        for b in machine.mem.buffers:
            if b.name != "<params>":
                touched, written = int(np.count_nonzero(b.touched.u8)), int(np.count_nonzero(b.written.u8))
                stats.buffers[b.name] = BufferStats(
                    b.name, b.storage, b.size, b.loaded, b.stored, b.atomic, touched, written
                )


def _poison(buffer: Buffer, part: slice) -> None:
    if buffer.init is None:
        buffer.init = Flat(np.ones(buffer.size, np.uint8))
    buffer.u8[part], buffer.init.u8[part] = 0xFF, 0


def _three(size: Size) -> tuple[int, int, int]:
    sizes = size if isinstance(size, Sequence) else (size,)
    return tuple([*(int(s) for s in sizes), 1, 1][:3])


def encode(value: Any, param: Param) -> bytes:
    """The bytes of one kernel argument."""
    if isinstance(value, (bytes, bytearray)) or (param.array and value is not None):
        raw = value.tobytes() if isinstance(value, (np.generic, np.ndarray)) else bytes(value)
        if len(raw) != param.size:
            raise SimError(f"parameter {param.name} needs {param.size} bytes, got {len(raw)}")
        return raw
    if value is None:
        return bytes(param.size)
    if hasattr(value, "item"):
        value = value.item()
    if param.type in ("f32", "f64"):
        return np.array(value, DT[param.type]).tobytes()
    if isinstance(value, float):
        return np.array(value, {2: F16, 4: F32, 8: F64}[param.size]).tobytes()
    return (int(value) & ((1 << 8 * param.size) - 1)).to_bytes(param.size, "little")
