"""Stands in the CUDA driver's place: launches of ``backend="cuda"`` on CPU tensors run in tests/ptxsim, or are noted.

The extension's own host code calls what is registered here with each launch's configuration, its parameters, and the
memory that these point at. It needs no GPU. What runs is the PTX of the build or, where that is not of these sources or
not for this architecture, what nvcc makes of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from ptxsim import Module, Struct, nvcc
from torch import Tensor

import kdkernels

SOURCES = Path(__file__).parent.parent / "csrc"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = ("f32", "f64", "f16", "bf16")


class Limits(NamedTuple):
    """What launches depend on of a GPU: shared memory of a block, and of a multiprocessor, in bytes, and how many of
    these there are."""

    shared_bytes: int
    shared_bytes_of_all: int
    multiprocessors: int


#: By compute capability.
DEVICES = {
    80: Limits(166912, 167936, 108),
    86: Limits(101376, 102400, 84),
    90: Limits(232448, 233472, 132),
    100: Limits(232448, 233472, 148),
}
#: Devices with so little shared memory that rows of some thousand classes are shared out, as long ones otherwise are.
SMALL = {"shared_bytes": 12288, "shared_bytes_of_all": 3 * (12288 + 1024)}


class Launch(NamedTuple):
    """One launch."""

    name: str
    grid: int
    cluster: int
    threads: int
    shared_bytes: int
    stats: Any  # ptxsim.Stats; None if it did not run


class _Buffer(ctypes.Structure):
    """``Buffer`` of csrc/cuda/driver.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("offset", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("element_bytes", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 9),
        ("strides", ctypes.c_int64 * 9),
        ("fresh", ctypes.c_int64),
    ]


_INT64 = ctypes.c_int64
_SIMULATE = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    *[_INT64] * 4,
    ctypes.c_void_p,
    _INT64,
    ctypes.POINTER(_Buffer),
    _INT64,
)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _tensor_at(buffer: _Buffer) -> Tensor | None:
    """The memory of a buffer, with its strides and its alignment; None if there is none."""
    sizes, strides = list(buffer.sizes[: buffer.dims]), list(buffer.strides[: buffer.dims])
    if not buffer.data or 0 in sizes:
        return None
    size = buffer.element_bytes
    skipped = buffer.data % 64
    last = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    there = (ctypes.c_uint8 * (skipped + (last + 1) * size)).from_address(buffer.data - skipped)
    flat = torch.from_numpy(np.frombuffer(there, np.uint8))
    usable = flat[: flat.numel() // size * size]
    if skipped % size:
        raise ValueError("a tensor that is not aligned to its elements")
    return usable.view(_INTEGERS[size]).as_strided(sizes, strides, skipped // size)


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.h"), *(SOURCES / "cuda").glob("*.*h"), *(SOURCES / "cuda").glob("*.cu")])


@cache
def _digest() -> str:
    """Of all that kernels are compiled from."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _built(name: str, arch: int) -> str | None:
    """PTX of a file of kernels as the build compiled it; None if it did not for this architecture, or not since."""
    image = SOURCES.parent / f"build/cuda/{name}.fatbin"
    if not image.exists() or image.stat().st_mtime < max(path.stat().st_mtime for path in _sources()):
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [CUOBJDUMP, "-xptx", f".sm_{arch}.ptx", image.resolve()]
        subprocess.run(command, cwd=folder, capture_output=True, check=False)
        return next((file.read_text() for file in Path(folder).glob("*.ptx")), None)


@lru_cache(maxsize=2)  # those of one type and the common ones: parsed, a file takes a quarter of a gigabyte or more
def module_of(name: str, arch: int) -> Module:
    """The kernels of a file for an architecture: those of the build or compiled now, and kept for other processes."""
    folder = Path(tempfile.gettempdir()) / f"kdkernels-ptx-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-{arch}-{_digest()}.ptx"
    if not file.exists():
        source = SOURCES / f"cuda/kernels_{name}.cu"
        text = _built(name, arch) or nvcc.compile_to_ptx(source, f"sm_{arch}", include=[SOURCES])
        own = file.with_suffix(f".{os.getpid()}")
        own.write_text(text)
        own.replace(file)
    return Module(file.read_text())


class Simulator:
    """Stands in the CUDA driver's place, on a GPU with the usual limits but for those given. ``log`` has an entry a
    launch."""

    def __init__(self, arch: int, limits: Mapping[str, int] | None = None, **options: Any) -> None:
        self.device = DEVICES[arch]._replace(**limits or {})
        self.arch, self.options = arch, options
        self.log: list[Launch] = []
        self.error: BaseException | None = None
        self.written: dict[Any, np.ndarray] = {}
        self.held: list[Tensor] = []
        self.callback = _SIMULATE(self.launch)

    def launch(self, name, blocks, threads, cluster, shared, parameters, size, buffers, count) -> None:
        if self.error is not None:
            return
        try:
            self._launch(name.decode(), blocks, threads, cluster, shared, parameters, size, buffers[:count])
        except BaseException as error:  # it must not go through C++
            self.error = error

    def _launch(self, name, blocks, threads, cluster, shared, parameters, size, buffers) -> None:
        module = module_of(name.rsplit("_", 1)[1] if name.rsplit("_", 1)[1] in TYPES else "common", self.arch)
        pointers = []
        for buffer in buffers:
            tensor = _tensor_at(buffer)
            if tensor is None:
                continue
            storage = tensor.untyped_storage()
            key = ("torch", storage.data_ptr())
            if buffer.fresh or (key in self.written and self.written[key].size != storage.nbytes()):
                self.written.pop(key, None)
            if buffer.fresh:
                self.written[key] = np.zeros(storage.nbytes(), np.uint8)
            pointers.append((buffer.offset, tensor, buffer.name.decode()))
        struct = Struct(ctypes.string_at(parameters, size), pointers)
        assert shared <= self.device.shared_bytes
        stats = module.launch(
            name, blocks, threads, [struct], shared, cluster=cluster, written=self.written, **self.options
        )
        # The driver is asked for all of a device's shared memory then: there is none left for the kernel's own.
        assert not shared or stats.shared_bytes == shared, f"{name} takes shared memory and has some of its own"
        self.log.append(Launch(name, blocks, cluster, threads, shared, stats))


@cache
def _library() -> ctypes.CDLL:
    (path,) = Path(kdkernels.__file__).parent.glob("_C*.so")
    library = ctypes.CDLL(str(path))
    library.kdk_simulate.argtypes = [ctypes.c_void_p, *[_INT64] * 4]
    library.kdk_simulate.restype = None
    return library


class Recorder(Simulator):
    """Runs nothing: ``log`` has the launches that would be, and new memory that they were to write holds zeros."""

    def _launch(self, name, blocks, threads, cluster, shared, parameters, size, buffers) -> None:
        for tensor in (_tensor_at(buffer) for buffer in buffers if buffer.fresh):
            if tensor is not None:
                tensor.zero_()
        self.log.append(Launch(name, blocks, cluster, threads, shared, None))


@contextmanager
def _in_place_of_the_driver(sim: Simulator) -> Iterator[Any]:
    _library().kdk_simulate(ctypes.cast(sim.callback, ctypes.c_void_p), sim.arch, *sim.device)
    try:
        yield sim
    finally:
        _library().kdk_simulate(None, 0, 0, 0, 0)
    if sim.error is not None:
        raise sim.error


def recorded(arch: int, limits: Mapping[str, int] | None = None) -> Any:
    """Within this context ``backend="cuda"`` takes CPU tensors and nothing is run: gives a Recorder."""
    return _in_place_of_the_driver(Recorder(arch, limits))


def simulated(arch: int, limits: Mapping[str, int] | None = None, **options: Any) -> Any:
    """Within this context ``backend="cuda"`` takes CPU tensors, and its launches run in the Simulator it gives."""
    return _in_place_of_the_driver(Simulator(arch, limits, **options))
