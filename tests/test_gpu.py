"""What only a GPU can show: streams, graphs, a host that waits for nothing, memory, a compiler that writes kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Path, assert_same, expected, make_inputs, measured, needed_target
from losses import LOSSES, STANDARDIZED, Case, each

pytestmark = pytest.mark.gpu

CASES = {name: (LOSSES | STANDARDIZED)[name] for name in ("kd", "dkd", "gdkd", "everything", "pr_gdkd", "ls_gdkd")}
#: Short rows, rows for a block, rows for several, pixels.
SHAPES = {"short": (64, 100), "block": (32, 4099), "long": (3, 70001), "pixels": (2, 21, 16, 24)}
SIZES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def step(case: Case, path: Path, *inputs: torch.Tensor, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a training step."""
    student, teacher, target = inputs
    student.grad = None
    loss = case.call(student, teacher, **path.options, **needed_target(case, target))
    (factor * loss).backward()
    assert student.grad is not None
    return loss.detach(), student.grad


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """torch raises where its own code waits for the GPU."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@SIZES
@each(CASES)
@pytest.mark.usefixtures("waiting_is_an_error")
def test_the_host_does_not_wait(case: Case, shape: tuple[int, ...], native_path: Path) -> None:
    student, teacher, target = make_inputs(shape)
    step(case, native_path, student.requires_grad_(), teacher, target)  # compiles and loads
    torch.cuda.set_sync_debug_mode("error")
    step(case, native_path, student, teacher, target, factor=2.0)


@SIZES
@each(CASES)
def test_a_step_in_a_graph(case: Case, shape: tuple[int, ...], native_path: Path) -> None:
    """Captured once and replayed with other logits and targets, it gives what a call gives."""
    first, second = make_inputs(shape), make_inputs(shape, seed=1)
    inputs = [first.student.requires_grad_(), first.teacher, first.target]
    fresh = torch.utils.deterministic.fill_uninitialized_memory
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(case, native_path, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    inputs[0].grad = None
    with torch.cuda.graph(graph):
        loss, gradient = step(case, native_path, *inputs)
    with torch.no_grad():
        for tensor, value in zip(inputs, second, strict=True):
            tensor.copy_(value)
    for _ in range(2):
        graph.replay()
    want_loss, want_gradient = step(case, native_path, second.student.requires_grad_(), *second[1:])
    assert torch.equal(loss, want_loss)
    assert torch.equal(gradient, want_gradient)
    assert torch.utils.deterministic.fill_uninitialized_memory == fresh


@each(CASES)
def test_the_current_stream_is_used(case: Case, native_path: Path) -> None:
    """Logits that are still being written on a stream are waited for by what is called on it."""
    inputs = make_inputs((64, 4099))
    want = step(case, native_path, inputs.student.clone().requires_grad_(), *inputs[1:])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        student = torch.full_like(inputs.student, torch.nan)
        torch.cuda._sleep(20_000_000)
        student.copy_(inputs.student)
        got = step(case, native_path, student.requires_grad_(), *inputs[1:])
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@SIZES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["dkd", "gdkd"])
def test_the_same_result_every_time(name: str, dtype: torch.dtype, shape: tuple[int, ...], native_path: Path) -> None:
    student, teacher, target = make_inputs(shape, dtype)
    student.requires_grad_()
    first = step(CASES[name], native_path, student, teacher, target)
    for _ in range(5):
        again = step(CASES[name], native_path, student, teacher, target)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("shape", [(4096, 1000), (256, 32000), (2, 150, 128, 128)], ids=str)
@each({name: CASES[name] for name in ("dkd", "gdkd", "pr_gdkd")})
def test_memory(case: Case, shape: tuple[int, ...], native_path: Path) -> None:
    """One buffer of the student's size in training, and little beside it."""
    student, teacher, target = make_inputs(shape, scale=2.0)
    student.requires_grad_()
    step(case, native_path, student, teacher, target)
    student.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(case, native_path, student, teacher, target)
    assert torch.cuda.max_memory_allocated() - before <= 1.25 * student.nbytes


@SIZES
@each({name: CASES[name] for name in ("dkd", "everything", "pr_gdkd")})
def test_compiled(case: Case, shape: tuple[int, ...], native_path: Path) -> None:
    """By torch.compile's own compiler, with a layer before and arithmetic after the loss in the same graph."""
    torch._dynamo.reset()
    student, teacher, target = make_inputs(shape)
    options = needed_target(case, target)

    def call(student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> torch.Tensor:
        return 2.0 * case.call(0.5 * student, teacher, **options)

    got = measured(torch.compile(call, fullgraph=True), student, teacher, **native_path.options, **options)
    want = expected(case.objective, 0.5 * student, teacher, **options)
    assert_same(got._replace(loss=0.5 * got.loss), want, student, teacher)
