"""A call on a GPU backend's compiled kernels, in the simulator or on the GPU there is, held to the accuracy table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from helpers import Outcome, Path, arithmetic_dtype, assert_same, expected, measured, upstream_like
from losses import Case
from torch import Tensor

#: A GPU, where there is one, or else the CPU's memory, which the simulator works on.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: What the simulator runs; one GPU runs what is built for it.
ARCHITECTURES = (80, 90) if DEVICE.type == "cpu" else (0,)
#: Gives the simulator, or None on a GPU.
Device = Callable[[], AbstractContextManager[Any]]


def moved(value: Any, to: torch.device) -> Any:
    """``value`` on another device if it is a tensor: its whole storage, with the strides and offset it has in it."""
    if not isinstance(value, Tensor) or value.device == to:
        return value
    storage = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
    return storage.to(to).as_strided(value.shape, value.stride(), value.storage_offset())


def run_on(
    device: Device, case: Case, student: Tensor, teacher: Tensor, path: Path, upstream: Tensor | None, **options: Any
) -> tuple[Outcome, Any]:
    """Loss, gradient and parts as a user gets them, on the CPU again, and the simulator that computed them."""
    there = {name: moved(value, DEVICE) for name, value in options.items()}
    with device() as sim:
        got = measured(
            case.call, moved(student, DEVICE), moved(teacher, DEVICE), moved(upstream, DEVICE), **path.options, **there
        )
    cpu = torch.device("cpu")
    return Outcome(got.loss.cpu(), got.gradient.cpu(), {k: moved(part, cpu) for k, part in got.parts.items()}), sim


def check_on(
    device: Device,
    case: Case,
    student: Tensor,
    teacher: Tensor,
    path: Path,
    upstream: Tensor | None,
    return_parts: bool,
    **options: Any,
) -> Any:
    """:func:`run_on`, held to the accuracy table against the float64 reference; the simulator."""
    want = expected(case.objective, student, teacher, upstream, **options)
    if upstream is None and want.loss.dim():
        upstream = upstream_like(want.loss).to(arithmetic_dtype(student, teacher))
    got, sim = run_on(device, case, student, teacher, path, upstream, return_parts=return_parts, **options)
    assert_same(got, want, student, teacher, of_gpu=True)
    assert tuple(got.parts) == (case.parts if return_parts else ())
    return sim
