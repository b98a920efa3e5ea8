"""The Triton backend's host code: what it asks of torch and how often it launches, with kernels that do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import make_inputs, needed_target
from losses import LOSSES, STANDARDIZED, Case, each
from triton_targets import compiler

# After triton_targets, which skips this file where Triton is missing.
import triton  # isort: skip
from kdkernels.triton_kernels import launch
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that neither read a tensor's values on the host nor copy logits.
HARMLESS = {"empty", "empty_like", "new_empty", "zero_", "ones", "fill_", "view", "_unsafe_view", "reshape", "detach"}
# Below autograd, where the ops run, these are not taken apart; what they copy is counted.
HARMLESS |= {"to", "contiguous", "resolve_conj", "resolve_neg"}
CASES = {name: (LOSSES | STANDARDIZED)[name] for name in ("kd", "dkd", "gdkd", "everything", "pr_gdkd", "ls_gdkd")}
HOST = ("forward", "backward", "class_moments", "class_sums", "scale_")


class Operations(TorchDispatchMode):
    """Collects the operations that run, and the largest tensor that one of them makes by copying."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in ("_to_copy", "clone"):
            assert out.device == args[0].device, "a copy between devices waits for them"
            self.copied = max(self.copied, out.numel())
        return out


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Names and grids of what is launched; nothing is compiled or run."""
    log: list[tuple[str, tuple[int, ...]]] = []

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        log.append((self.fn.__name__, grid))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    with compiler("sm_90"):
        yield log


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Operations:
    """What the host code does in the ops."""
    spy = Operations()

    def watched(original: Any) -> Any:
        def call(*args: Any) -> Any:
            with spy:
                return original(*args)

        return call

    for name in HOST:
        monkeypatch.setattr(launch, name, watched(getattr(launch, name)))
    return spy


def step(case: Case, shape: tuple[int, ...], factor: float = 1.0, **options: Any) -> None:
    """A training step, with the loss times a factor."""
    student, teacher, target = make_inputs(shape)
    options = needed_target(case, target) | options
    loss = case.call(student.requires_grad_(), teacher, backend="triton", **options)
    (factor * loss.sum()).backward()


@pytest.mark.parametrize("mode", ["fused", "recompute"])
@pytest.mark.parametrize("shape", [(6, 29), (2, 70000), (2, 29, 5, 7)], ids=["fused", "split", "pixels"])
@each(CASES)
def test_a_step_waits_for_nothing(
    case: Case, shape: tuple[int, ...], mode: str, launches: list[Any], operations: Operations
) -> None:
    """So it can be captured in a CUDA graph: no value reaches the host, no size depends on one, nothing is copied."""
    samples = (shape[0], *shape[2:])
    target = make_inputs(shape).target
    for options in (
        {},
        {"target": target, "sample_weight": torch.rand(samples), "mode": mode},
        {"target": target.to(torch.int32), "reduction": "none", "mode": mode},
        {"denominator": torch.tensor(3.0), "mode": mode},
    ):
        step(case, shape, **options)
    assert launches
    assert operations.names <= HARMLESS | {"_to_copy", "clone"}
    assert operations.copied <= torch.Size(samples).numel()  # targets and weights


@each({name: LOSSES[name] for name in ("kd", "dkd", "gdkd", "everything")})
def test_launches_of_a_fused_step(case: Case, launches: list[Any]) -> None:
    """One kernel for loss and gradient; the others touch no matrix unless the upstream gradient is not 1.

    They count the samples where targets may be ignored, add up their losses, and look at the upstream gradient.
    """
    step(case, (6, 29), factor=2.0)
    names = [name for name, _ in launches]
    counting = ["weight_sum_kernel"] if case.needs_target else []
    assert names == [*counting, "fused_kernel", "sum_rows_kernel", "scale_kernel"]


@each(CASES)
def test_an_empty_batch_launches_nothing(case: Case, launches: list[Any]) -> None:
    step(case, (0, 29))
    assert launches == []


def test_grids_have_one_dimension(launches: list[Any]) -> None:
    """The others end at 65535."""
    student = torch.zeros(1, 10).expand(200_000, -1).requires_grad_()
    LOSSES["kd"].call(student, torch.zeros(200_000, 10), backend="triton").backward()
    assert max(grid[0] for _, grid in launches) > 1000
    assert all(len(grid) == 1 for _, grid in launches)
