"""The CUDA backend where there is no GPU: its host code unchanged, its launches in the simulator.

On a machine with a GPU :func:`device` is the GPU, and the same tests run there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cuda_simulator import Simulator, simulated
from helpers import Outcome, Path, arithmetic_dtype, assert_same, expected, measured, upstream_like
from losses import Case
from ptxsim import nvcc
from torch import Tensor

from kdkernels import ops

#: A GPU, where there is one, or else the CPU's memory, which the simulator works on.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: What is compiled for the simulator; one GPU runs what is built for it.
ARCHITECTURES = (80, 90) if DEVICE.type == "cpu" else (0,)
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


def moved(value: Any, to: torch.device) -> Any:
    """``value`` on another device if it is a tensor: its whole storage, with the strides and offset it has in it."""
    if not isinstance(value, Tensor) or value.device == to:
        return value
    storage = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
    return storage.to(to).as_strided(value.shape, value.stride(), value.storage_offset())


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
    """Loss, gradient and parts as a user gets them, on the CPU again, and the simulator that computed them."""
    there = {name: moved(value, DEVICE) for name, value in options.items()}
    with device(arch, limits) as sim:
        got = measured(
            case.call, moved(student, DEVICE), moved(teacher, DEVICE), moved(upstream, DEVICE), **path.options, **there
        )
    cpu = torch.device("cpu")
    return Outcome(got.loss.cpu(), got.gradient.cpu(), {k: moved(part, cpu) for k, part in got.parts.items()}), sim


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
    """:func:`run`, held to the accuracy table against the float64 reference."""
    want = expected(case.objective, student, teacher, upstream, **options)
    if upstream is None and want.loss.dim():
        upstream = upstream_like(want.loss).to(arithmetic_dtype(student, teacher))
    got, sim = run(case, student, teacher, path, arch, upstream, limits, return_parts=return_parts, **options)
    assert_same(got, want, student, teacher, of_gpu=True)
    assert tuple(got.parts) == (case.parts if return_parts else ())
    return sim
