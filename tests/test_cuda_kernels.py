"""Every CUDA kernel of the library, run at least once: each step, for each type of logits and both layouts.

test_simulator.py and test_cuda_sim.py have what they are to do with more shapes and losses, most of it in one type.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

import pytest
import torch
from cuda_simulator import SMALL, TYPES, module_of, recorded
from cuda_targets import FIRST, LAST, check, device, missing, needs_simulator
from helpers import (
    DTYPES,
    LOSS_TOLERANCE,
    Path,
    assert_values,
    expected,
    make_inputs,
    measured,
    must_have_native,
    name_of,
)
from losses import LOSSES, STANDARDIZED
from simulated import DEVICE, moved

ALL = LOSSES | STANDARDIZED


@pytest.fixture(autouse=True)
def backend_is_there() -> None:
    reason = missing()
    if reason is not None:
        (pytest.fail if must_have_native() else pytest.skip)(reason)


class Step(NamedTuple):
    """A training step, and the device it is for."""

    name: str
    shape: tuple[int, ...]
    mode: str = "fused"
    arch: int = LAST
    limits: Mapping[str, int] | None = None
    parts: bool = True


#: Between them, for each type, these launch all kernels but those that scale a gradient.
STEPS = {
    "rows": Step("gdkd3", (9, 100)),
    "rows without ranks": Step("dkd", (9, 100)),
    "rows by sample": Step("ls_gdkd", (9, 100)),
    "pixels without ranks": Step("dkd", (2, 19, 5, 8)),
    "pixels with ranks": Step("gdkd", (2, 19, 5, 8)),
    "pixels by sample": Step("ls_dkd", (2, 19, 5, 8)),
    "pixels a thread each": Step("dkd", (2, 19, 15, 10), parts=False),
    "pixels a thread each, with ranks": Step("gdkd3", (2, 19, 15, 10), parts=False),
    "rows in backward": Step("everything", (9, 101), "recompute"),
    "rows over clusters": Step("gdkd", (3, 3100), limits=SMALL),
    "split rows": Step("ls_gdkd", (3, 3100), arch=FIRST, limits=SMALL),
    "pixels": Step("everything", (2, 19, 5, 8)),
    "pixels in backward": Step("dkd", (2, 21, 5, 7), "recompute"),
    "split pixels": Step("ls_gdkd", (1, 300, 2, 4), arch=FIRST, limits=SMALL),
    "rows by class": Step("pr_gdkd", (21, 100)),
    "rows by class without ranks": Step("pr_dkd", (21, 100)),
    "pixels by class": Step("pr_dkd", (2, 70, 8, 18)),  # enough of them for two stretches
    "pixels by class, a thread each": Step("pr_gdkd", (2, 19, 15, 20), parts=False),
}
SCALED = [(3, 1001), (2, 7, 5, 6)]
EVALUATED = ("dkd", "gdkd3"), (2, 19, 15, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_training_step(step: Step, dtype: torch.dtype) -> None:
    inputs = make_inputs(step.shape, dtype)
    path = Path("cuda", step.mode)
    check(
        ALL[step.name],
        inputs.student,
        inputs.teacher,
        path,
        step.arch,
        limits=step.limits,
        return_parts=step.parts,
        target=inputs.target,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", EVALUATED[0])
def test_evaluation(name: str, dtype: torch.dtype) -> None:
    """A loss without a gradient: float16 students have theirs in backward only, by other kernels."""
    inputs, case = make_inputs(EVALUATED[1], dtype), ALL[name]
    with torch.no_grad(), device(LAST):
        student, teacher, target = (moved(tensor, DEVICE) for tensor in inputs)
        loss = case.call(student, teacher, target=target, backend="cuda")
    want = expected(case.objective, inputs.student, inputs.teacher, target=inputs.target)
    assert_values(loss.cpu(), want.loss, LOSS_TOLERANCE[loss.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SCALED, ids=name_of)
def test_scaling(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What backward launches with an upstream gradient: 1 touches no memory, and the host does not know it is."""
    kept = make_inputs(shape, dtype).student
    gradient = moved(kept.clone(), DEVICE)
    scale = torch.ops.kdkernels_cuda.scale_.default
    with device(LAST) as sim:
        scale(gradient, torch.ones((), device=DEVICE), 1)
        assert torch.equal(gradient.cpu(), kept)
        scale(gradient, torch.full((), 3.0, device=DEVICE), 1)
    assert torch.equal(gradient.cpu(), 3 * kept)
    if sim is not None:
        one, other = (launch.stats.buffers["student"] for launch in sim.log)
        assert one.loaded == one.stored == 0
        assert other.loaded == other.stored == kept.nbytes


@needs_simulator
def test_no_kernel_is_left_out() -> None:
    """The launches of this file's tests, noted without running them, are of all kernels that there are."""
    launched = set()
    for step, dtype in product(STEPS.values(), DTYPES):
        inputs = make_inputs(step.shape, dtype)
        with recorded(step.arch, step.limits) as recorder:
            measured(
                ALL[step.name].call,
                *inputs[:2],
                return_parts=step.parts,
                **Path("cuda", step.mode).options,
                target=inputs.target,
            )
        launched |= {launch.name for launch in recorder.log}
    for name, dtype in product(EVALUATED[0], DTYPES):
        student, teacher, target = make_inputs(EVALUATED[1], dtype)
        with torch.no_grad(), recorded(LAST) as recorder:
            ALL[name].call(student, teacher, target=target, backend="cuda")
        launched |= {launch.name for launch in recorder.log}
    for shape, dtype in product(SCALED, DTYPES):
        with recorded(LAST) as recorder:
            torch.ops.kdkernels_cuda.scale_.default(torch.zeros(shape, dtype=dtype), torch.ones(()), 1)
        launched |= {launch.name for launch in recorder.log}
    assert launched == {kernel for name in (*TYPES, "common") for kernel in module_of(name, LAST).kernels}
