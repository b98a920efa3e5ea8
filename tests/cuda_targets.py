"""The CUDA backend where there is no GPU: its host code unchanged, its launches in the simulator.

On a machine with a GPU :func:`device` is the GPU, and the same tests run there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from cuda_simulator import Simulator, simulated
from helpers import Outcome, Path
from losses import Case
from ptxsim import nvcc
from simulated import ARCHITECTURES, DEVICE, check_on, run_on
from torch import Tensor

from kdkernels import ops

NAME = "cuda"
FIRST, LAST = ARCHITECTURES[0], ARCHITECTURES[-1]

needs_simulator = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what the simulator does; here is a GPU")


def missing() -> str | None:
    """Why nothing of this can run here, or None."""
    if ops.cuda_unavailable is not None:
        return ops.cuda_unavailable
    if DEVICE.type == "cpu" and not nvcc.available():
        return "there is no nvcc to compile the kernels for the simulator"
    return None


@contextmanager
def device(arch: int, limits: Mapping[str, int] | None = None) -> Iterator[Simulator | None]:
    """Where ``backend="cuda"`` runs on tensors of DEVICE: with all of the simulator's checks, or on a GPU (None)."""
    if DEVICE.type != "cpu":
        yield None
        return
    with simulated(arch, limits, check_races=True, check_uninit=True) as sim:
        yield sim
    warnings = {message for launch in sim.log for message in launch.stats.warnings}
    assert not warnings, "\n".join(warnings)


def run(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    path: Path,
    arch: int,
    upstream: Tensor | None = None,
    limits: Mapping[str, int] | None = None,
    **options: Any,
) -> tuple[Outcome, Simulator | None]:
    """:func:`simulated.run_on` this backend."""
    return run_on(partial(device, arch, limits), case, student, teacher, path, upstream, **options)


def check(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    path: Path,
    arch: int,
    upstream: Tensor | None = None,
    limits: Mapping[str, int] | None = None,
    return_parts: bool = True,
    **options: Any,
) -> Simulator | None:
    """:func:`simulated.check_on` this backend."""
    at = partial(device, arch, limits)
    return check_on(at, case, student, teacher, path, upstream, return_parts, **options)
