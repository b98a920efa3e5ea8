"""The Triton backend where there is no GPU: its host code unchanged, its launches in the simulator or only compiled.

On a machine with a GPU :func:`device` is the GPU, and the same tests run there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from helpers import Outcome, Path
from losses import Case
from simulated import ARCHITECTURES, DEVICE, check_on, run_on
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from ptxsim.triton_driver import CompileDriver, SimDriver, compiling_triton, patched_triton
from triton.backends.compiler import GPUTarget

NAME = "triton"
FIRST, LAST = ARCHITECTURES[0], ARCHITECTURES[-1]
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


def run(
    case: Case, student: Tensor, teacher: Tensor, path: Path, arch: int, upstream: Tensor | None = None, **options: Any
) -> tuple[Outcome, SimDriver | None]:
    """:func:`simulated.run_on` this backend."""
    return run_on(partial(device, arch), case, student, teacher, path, upstream, **options)


def check(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    path: Path,
    arch: int,
    upstream: Tensor | None = None,
    return_parts: bool = True,
    **options: Any,
) -> SimDriver | None:
    """:func:`simulated.check_on` this backend."""
    return check_on(partial(device, arch), case, student, teacher, path, upstream, return_parts, **options)


def missing() -> str | None:
    """Why nothing of this can run here: it always can."""
    return None
