"""The Triton backend where there is no GPU: its host code unchanged, its launches in the simulator or only compiled.

On a machine with a GPU :func:`device` is the GPU, and the same tests run there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import Outcome, Path, arithmetic_dtype, assert_same, expected, measured, upstream_like
from losses import Case
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from ptxsim.triton_driver import CompileDriver, SimDriver, compiling_triton, patched_triton
from triton.backends.compiler import GPUTarget

#: A GPU, where there is one, or else the CPU's memory, which the simulator works on.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: What the simulator compiles for; one GPU compiles for itself.
ARCHITECTURES = (80, 90) if DEVICE.type == "cpu" else (0,)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
needs_simulator = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what the simulator does; here is a GPU")


@contextmanager
def takes_cpu_tensors() -> Iterator[None]:
    """Lets ``backend="triton"`` take CPU tensors."""
    before = os.environ.get("KDKERNELS_TRITON_CPU")
    os.environ["KDKERNELS_TRITON_CPU"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KDKERNELS_TRITON_CPU"]
        else:
            os.environ["KDKERNELS_TRITON_CPU"] = before


@contextmanager
def device(arch: int) -> Iterator[SimDriver | None]:
    """Where ``backend="triton"`` runs on tensors of DEVICE: with all of the simulator's checks, or on a GPU (None)."""
    if DEVICE.type != "cpu":
        yield None
        return
    with takes_cpu_tensors(), patched_triton(arch, check_races=True, check_uninit=True, fresh=True) as sim:
        yield sim
    warnings = {message for launch in sim.log for message in launch.stats.warnings}
    assert not warnings, "\n".join(warnings)


@contextmanager
def compiler(target: str) -> Iterator[CompileDriver]:
    """Where ``backend="triton"`` on CPU tensors compiles for one of TARGETS and runs nothing."""
    with takes_cpu_tensors(), compiling_triton(TARGETS[target]) as compiled:
        yield compiled


def moved(value: Any, to: torch.device) -> Any:
    """``value`` on another device if it is a tensor: its whole storage, with the strides and offset it has in it."""
    if not isinstance(value, Tensor) or value.device == to:
        return value
    storage = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
    return storage.to(to).as_strided(value.shape, value.stride(), value.storage_offset())


def run(
    case: Case, student: Tensor, teacher: Tensor, path: Path, arch: int, upstream: Tensor | None = None, **options: Any
) -> tuple[Outcome, SimDriver | None]:
    """Loss, gradient and parts as a user gets them, on the CPU again, and the simulator that computed them."""
    there = {name: moved(value, DEVICE) for name, value in options.items()}
    with device(arch) as sim:
        got = measured(
            case.call, moved(student, DEVICE), moved(teacher, DEVICE), moved(upstream, DEVICE), **path.options, **there
        )
    cpu = torch.device("cpu")
    return Outcome(got.loss.cpu(), got.gradient.cpu(), {k: moved(part, cpu) for k, part in got.parts.items()}), sim


def check(
    case: Case, student: Tensor, teacher: Tensor, path: Path, arch: int, upstream: Tensor | None = None, **options: Any
) -> SimDriver | None:
    """:func:`run`, held to the accuracy table against the float64 reference."""
    want = expected(case.objective, student, teacher, upstream, **options)
    if upstream is None and want.loss.dim():
        upstream = upstream_like(want.loss).to(arithmetic_dtype(student, teacher))
    got, sim = run(case, student, teacher, path, arch, upstream, return_parts=True, **options)
    assert_same(got, want, student, teacher, of_gpu=True)
    assert tuple(got.parts) == case.parts
    return sim
