"""Runs @triton.jit kernels on CPU tensors through the simulator.

Triton's own launch path stays as it is (specialisation of the arguments, heuristics, compilation); only its driver is
replaced, by one that reports a GPU and "launches" into the simulator.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from .module import Allocation, Module
from .stats import Stats

#: Shared memory that a block may have, in bytes, by compute capability.
MAX_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
#: Functions that return memory nobody has written yet.
_ALLOCATORS = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
_ALLOCATORS += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]


@functools.lru_cache(maxsize=16)  # a parsed module takes tens of megabytes
def _module_of(ptx: str) -> Module:
    return Module(ptx)


class Launch(NamedTuple):
    """One launch that ran."""

    name: str
    grid: tuple[int, ...]
    metadata: Any  # Triton's, of the compiled kernel
    stats: Stats


class _Driver:
    """The slice of Triton's driver that launching needs; nothing of it touches a device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = SimpleNamespace(unload_module=lambda module: None, get_device_properties=self.properties)

    def properties(self, device: Any = 0) -> dict[str, int]:
        shared = MAX_SHARED.get(self.target.arch, 65536)
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> Any:
        return self.target.arch  # a device a target, so that kernels compiled for another one are not taken for its own

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> SimpleNamespace:
        return SimpleNamespace(current_device=self.get_current_device, synchronize=lambda *args: None)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def launch(self, compiled: CompiledKernel, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        raise NotImplementedError


class CompileDriver(_Driver):
    """Launches run nothing: ``compiled`` collects the kernels that would have run, by the hash of their source."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.compiled: dict[str, CompiledKernel] = {}

    def launch(self, compiled: CompiledKernel, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        self.compiled[compiled.metadata.hash] = compiled


class SimDriver(_Driver):
    """Launches run in the simulator. ``log`` has an entry a launch, ``stats`` their totals by kernel."""

    def __init__(self, arch: int, options: dict[str, Any]) -> None:
        super().__init__(GPUTarget("cuda", arch, 32))
        self.arch = arch
        self.options = options
        self.stats: dict[str, Stats] = {}
        self.log: list[Launch] = []
        self.fresh: dict[Any, tuple[torch.Tensor, np.ndarray]] = {}

    def get_current_device(self) -> Any:
        return "simulated", self.arch  # such kernels have no binary: see _without_binaries

    def allocated(self, tensor: torch.Tensor) -> None:
        """Takes note of memory that may not be read before it is written."""
        there = Allocation(tensor)
        # The tensor is kept, lest its address be that of another before the driver is done.
        self.fresh[there.key] = (tensor, np.zeros(there.u8.size, np.uint8))

    def launch(self, compiled: CompiledKernel, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        metadata, name = compiled.metadata, compiled.metadata.name
        if 0 in grid:
            return
        module = _module_of(compiled.asm["ptx"])
        values, names = [], []
        source = compiled.src
        for parameter, signature, value in zip(source.fn.arg_names, source.signature.values(), args, strict=True):
            _flatten(value, signature, parameter, values, names)
        parameters = len(module.kernel(name).params)
        programs = grid[0] * grid[1] * grid[2] * metadata.num_ctas
        for size in (metadata.global_scratch_size, metadata.profile_scratch_size):
            if len(values) < parameters:
                values.append(torch.zeros(size * programs, dtype=torch.uint8) if size else None)
                names.append("scratch")
        cluster = (metadata.num_ctas, 1, 1)
        stats = module.launch(
            name,
            (grid[0] * metadata.num_ctas, *grid[1:]),
            32 * metadata.num_warps,
            values,
            metadata.shared,
            cluster=cluster,
            arg_names=names,
            written={key: marks for key, (_, marks) in self.fresh.items()},
            **self.options,
        )
        self.log.append(Launch(name, stats.grid, metadata, stats))
        if name not in self.stats:
            self.stats[name] = Stats(name, stats.grid, stats.block, launches=0, shared_bytes=stats.shared_bytes)
        self.stats[name].merge(stats)


class _Launcher:
    """Stands where Triton keeps a compiled kernel's launcher."""

    def __init__(self, compiled: CompiledKernel) -> None:
        self.compiled = compiled

    def __call__(self, gx, gy, gz, stream, function, packed, metadata, enter_hook, exit_hook, *args):
        if enter_hook is not None:
            enter_hook(metadata)
        driver.active.launch(self.compiled, (gx, gy, gz), args)
        if exit_hook is not None:
            exit_hook(metadata)


def _init_handles(compiled: CompiledKernel) -> None:
    """In place of CompiledKernel's: nothing is loaded."""
    if compiled._run is None:
        most = driver.active.properties()["max_shared_mem"]
        if compiled.metadata.shared > most:
            raise OutOfResources(compiled.metadata.shared, most, "shared memory")
        compiled._run = _Launcher(compiled)


def _flatten(value, signature, name, values, names):
    """Appends what of an argument exists at run time."""
    if isinstance(signature, tuple):
        for k, (part, part_signature) in enumerate(zip(value, signature, strict=True)):
            _flatten(part, part_signature, f"{name}.{k}", values, names)
    elif isinstance(signature, str) and signature.startswith("tensordesc"):
        raise NotImplementedError("tensor descriptors (TMA) are not simulated")
    elif signature != "constexpr":
        values.append(value.base if isinstance(value, triton.runtime.jit.TensorWrapper) else value)
        names.append(name)


def _noting(allocate, sim):
    def allocator(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if type(tensor) is torch.Tensor and tensor.is_cpu:
            sim.allocated(tensor)
        return tensor

    return allocator


@contextlib.contextmanager
def _active(new: _Driver) -> Iterator[None]:
    before = driver._active
    driver.set_active(new)
    init_handles, CompiledKernel._init_handles = CompiledKernel._init_handles, _init_handles
    try:
        yield
    finally:
        driver._active, CompiledKernel._init_handles = before, init_handles


@contextlib.contextmanager
def _without_binaries() -> Iterator[None]:
    """PTX is all that the simulator needs: Triton compiles no further, and caches what it has in a place of its own."""
    make_cubin, folder = CUDABackend.make_cubin, triton.knobs.cache.dir
    CUDABackend.make_cubin = lambda *args: b""
    try:
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(Path(folder) / "ptxsim")
            yield
    finally:
        CUDABackend.make_cubin = make_cubin


@contextlib.contextmanager
def compiling_triton(target: GPUTarget) -> Iterator[CompileDriver]:
    """Within this context Triton's launches on CPU tensors compile for ``target`` and do not run.

    What host code does between launches sees tensors that no kernel has written.
    """
    compiler = CompileDriver(target)
    with _active(compiler):
        yield compiler


@contextlib.contextmanager
def patched_triton(arch: int = 90, *, fresh: bool = False, **options: Any) -> Iterator[SimDriver]:
    """Within this context Triton's launches on CPU tensors run in the simulator.

    Args:
        arch: compute capability to compile for, 90 for sm_90.
        fresh: what ``torch.empty`` and its kin return meanwhile may not be read by a kernel before one has written it.
            (Kernels write it: what torch writes into it, ``fill_`` say, is not seen.)
        options: of :class:`~ptxsim.machine.Options`.
    """
    sim = SimDriver(arch, options)
    allocators = [getattr(owner, name) for owner, name in _ALLOCATORS] if fresh else []
    try:
        for (owner, name), allocate in zip(_ALLOCATORS, allocators, strict=False):
            setattr(owner, name, _noting(allocate, sim))
        with _without_binaries(), _active(sim):
            yield sim
    finally:
        for (owner, name), allocate in zip(_ALLOCATORS, allocators, strict=False):
            setattr(owner, name, allocate)


def triton_run(
    kernel: Any,
    args: tuple[Any, ...] = (),
    constexprs: dict[str, Any] | None = None,
    grid: tuple[int, ...] = (1,),
    *,
    arch: int = 90,
    sim_options: dict[str, Any] | None = None,
    **launch_options: Any,
) -> Stats:
    """Compiles and runs one @triton.jit function on CPU tensors, changed in place.

    ``triton_run(kernel, (x, y, n), {"BLOCK": 1024}, (rows,), num_warps=8, arch=90)``; ``sim_options`` go to
    :meth:`Module.launch`.
    """
    with patched_triton(arch, **(sim_options or {})) as sim:
        kernel[grid](*args, **(constexprs or {}), **launch_options)
    return sim.log[-1].stats
