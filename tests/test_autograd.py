"""Gradients as autograd uses them: any upstream gradient, repeated, accumulated, under autocast, and without waste."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import (
    GRADIENT_TOLERANCE,
    NATIVE_BACKENDS,
    Path,
    allocations,
    assert_gradient,
    assert_same,
    assert_values,
    check,
    expected,
    make_inputs,
    measured,
    name_of,
    needed_target,
)
from losses import LOSSES, SOME_LOSSES, Case, each
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import kdkernels
from kdkernels import objective

HALF = [torch.float16, torch.bfloat16]


@each(LOSSES)
def test_gradcheck(case: Case, double_path: Path) -> None:
    """Against finite differences, for any upstream gradient, with weights and an ignored sample."""
    student, teacher, target = make_inputs((3, max(case.smallest, 7)), torch.float64, scale=1.5)
    target[1] = -100
    weight = torch.tensor([0.5, 1.0, 2.0])
    assert torch.autograd.gradcheck(
        lambda z: case.call(z, teacher, target=target, sample_weight=weight, reduction="none", **double_path.options),
        (student.requires_grad_(),),
    )


@each(SOME_LOSSES)
def test_gradcheck_of_pixels(case: Case, double_path: Path) -> None:
    student, teacher, target = make_inputs((2, 7, 2, 1), torch.float64, scale=1.5)
    student = student.contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: case.call(z, teacher, reduction="mean", **double_path.options, **needed_target(case, target)),
        (student,),
    )


@pytest.mark.parametrize("shape", [(6, 23), (2, 23, 3, 1)], ids=name_of)
@each(LOSSES)
def test_gradient_of_weighted_samples(case: Case, shape: tuple[int, ...], path: Path) -> None:
    """What gradcheck is for, in float32: any upstream gradient, with weights and an ignored sample."""
    student, teacher, target = make_inputs(shape)
    weight = torch.linspace(0.5, 2.0, 6).view(target.shape)
    target.view(-1)[1] = -100
    upstream = torch.linspace(-1.0, 2.0, 6).view(target.shape)
    check(case, student, teacher, path, upstream, target=target, sample_weight=weight, reduction="none")


# Upstream gradients -------------------------------------------------------------------------------------------------

SAMPLES, CLASSES = 6, 23
#: What autograd may send into the backward of one loss a sample.
UPSTREAM = {
    "ones": torch.ones(SAMPLES),
    "expanded": torch.tensor(0.7).expand(SAMPLES),  # what loss.sum() sends: strides of 0
    "distinct": torch.linspace(-1.0, 2.0, SAMPLES),
    "strided": torch.linspace(-1.0, 2.0, 2 * SAMPLES)[::2],
    "zero": torch.zeros(SAMPLES),
    "some": torch.tensor([0.0, 1.0, 0.0, 0.0, 3.0, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name_of)
@pytest.mark.parametrize("upstream", UPSTREAM)
@each(SOME_LOSSES)
def test_upstream_of_each_sample(case: Case, upstream: str, dtype: torch.dtype, path: Path) -> None:
    student, teacher, target = make_inputs((SAMPLES, CLASSES), dtype)
    factors = UPSTREAM[upstream]
    if student.is_cuda:
        factors = factors.cuda()
    check(case, student, teacher, path, factors, reduction="none", **needed_target(case, target))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
@each(SOME_LOSSES)
def test_upstream_of_pixels(case: Case, layout: str, path: Path) -> None:
    student, teacher, target = make_inputs((2, CLASSES, 3, 4))
    upstream = {
        "contiguous": torch.linspace(0.5, 2.0, 24).view(2, 3, 4),
        "transposed": torch.linspace(0.5, 2.0, 24).view(4, 3, 2).permute(2, 1, 0),
        "expanded": torch.tensor([0.5, 1.5]).view(2, 1, 1).expand(2, 3, 4),
    }[layout]
    check(case, student, teacher, path, upstream, reduction="none", **needed_target(case, target))


@pytest.mark.parametrize("factor", [0.0, -3.0, 0.7, 1e-3, 2.0**16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@each(SOME_LOSSES)
def test_upstream_scalar(case: Case, reduction: str, factor: float, path: Path) -> None:
    student, teacher, target = make_inputs((SAMPLES, CLASSES))
    options = needed_target(case, target) | {"reduction": reduction}
    check(case, student, teacher, path, torch.tensor(factor), **options)


@pytest.mark.parametrize("factor", [-3.0, 0.7, 0.9])
@pytest.mark.parametrize("samples", [1, SAMPLES])
@each(SOME_LOSSES)
def test_upstream_scalar_of_bfloat16(case: Case, samples: int, factor: float, path: Path) -> None:
    """A weight on the loss: recomputed gradients are rounded once, fused ones also when they were written."""
    student, teacher, target = make_inputs((samples, CLASSES), torch.bfloat16)
    options = needed_target(case, target)
    upstream = torch.tensor(factor)
    got = measured(case.call, student, teacher, upstream, **path.options, **options)
    want = expected(case.objective, student, teacher, upstream, **options)
    roundings = 2 if path.backend in NATIVE_BACKENDS and path.mode == "fused" else 1
    assert_gradient(got.gradient, want.gradient, roundings * GRADIENT_TOLERANCE[torch.bfloat16])


@each(SOME_LOSSES)
def test_expressions_of_the_loss(case: Case, path: Path) -> None:
    """The upstream gradient comes from what the user does with the loss."""
    student, teacher, target = make_inputs((SAMPLES, CLASSES))
    options = needed_target(case, target) | {"reduction": "none"}
    weight = torch.linspace(0.1, 1.0, SAMPLES)
    leaf = student.clone().requires_grad_()
    rows = case.call(leaf, teacher, **path.options, **options)
    for value, upstream in [
        (rows.sum(), torch.ones(SAMPLES)),
        ((rows * weight).sum(), weight),
        (3 * rows.mean(), torch.full((SAMPLES,), 3 / SAMPLES)),
        (rows[2], torch.eye(SAMPLES)[2]),
    ]:
        (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
        assert_gradient(gradient, expected(case.objective, student, teacher, upstream, **options).gradient, 2e-6)


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
def test_a_broken_upstream_is_not_hidden(upstream: float, path: Path) -> None:
    """NaN and inf reach the gradient, as a loss scaler needs to see them."""
    student, teacher, _ = make_inputs((SAMPLES, CLASSES))
    got = measured(kdkernels.kd_loss, student, teacher, torch.tensor(upstream), **path.options)
    assert not got.gradient.isfinite().any()


# More than one backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each(SOME_LOSSES)
def test_a_second_backward_over_a_kept_graph(case: Case, reduction: str, dtype: torch.dtype, path: Path) -> None:
    """Gives what the first gave, whatever was sent into either, and the last one may free the graph."""
    student, teacher, target = make_inputs((SAMPLES, CLASSES), dtype)
    leaf = student.clone().requires_grad_()
    loss = case.call(leaf, teacher, reduction=reduction, **path.options, **needed_target(case, target))
    one = torch.ones_like(loss)
    (first,) = torch.autograd.grad(loss, leaf, one, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, 2 * one, retain_graph=True)
    (third,) = torch.autograd.grad(loss, leaf, one)
    assert torch.equal(first, kept), "a later backward changed a gradient that was already handed out"
    assert torch.equal(third, kept)
    assert_gradient(second, 2 * kept, GRADIENT_TOLERANCE[dtype])


def test_a_second_backward_over_a_freed_graph_raises(path: Path) -> None:
    student, teacher, _ = make_inputs((SAMPLES, CLASSES))
    loss = kdkernels.kd_loss(student.requires_grad_(), teacher, **path.options)
    (3 * loss).backward(inputs=[student])
    assert student.grad is not None
    before = student.grad.clone()
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time|already been freed"):
        loss.backward()
    assert torch.equal(student.grad, before)


def test_two_paths_through_one_loss(path: Path) -> None:
    """A loss used twice in one graph is scaled once, by the sum."""
    student, teacher, _ = make_inputs((SAMPLES, CLASSES))
    leaf = student.clone().requires_grad_()
    loss = kdkernels.kd_loss(leaf, teacher, **path.options)
    (loss + 2 * loss + loss**2).backward()
    want = expected(objective.kd(), student, teacher)
    assert leaf.grad is not None
    assert_gradient(leaf.grad, (3 + 2 * want.loss) * want.gradient, 2e-6)


# Accumulation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["this", "other"])
def test_accumulation_into_grad(first: str, path: Path) -> None:
    """.grad is a sum of steps, also where it began as this loss's own buffer."""
    student, teacher, target = make_inputs((SAMPLES, CLASSES))
    leaf = student.clone().requires_grad_()
    steps = [
        lambda: kdkernels.kd_loss(leaf, teacher, **path.options),
        lambda: torch.nn.functional.cross_entropy(leaf, target),
        lambda: 2 * kdkernels.dkd_loss(leaf, teacher, target, **path.options),
    ]
    losses = [step() for step in steps]
    order = (0, 1, 2) if first == "this" else (1, 2, 0)
    total = torch.zeros_like(student, dtype=torch.float64)
    for index in order:
        losses[index].backward()
        single = student.double().requires_grad_()
        if index == 1:
            torch.nn.functional.cross_entropy(single, target).backward()
            assert single.grad is not None
            total += single.grad
        else:
            value = objective.kd() if index == 0 else objective.dkd()
            total += (1, 0, 2)[index] * expected(value, student, teacher, target=target).gradient
        assert leaf.grad is not None
        assert_gradient(leaf.grad, total, 2e-6)


def test_grad_is_the_users_to_change(path: Path) -> None:
    """Writing into .grad, as clipping does, leaves a later backward over the kept graph right."""
    student, teacher, _ = make_inputs((SAMPLES, CLASSES))
    leaf = student.clone().requires_grad_()
    loss = kdkernels.kd_loss(leaf, teacher, **path.options)
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    want = leaf.grad.clone()
    leaf.grad.mul_(1e-3)
    leaf.grad = None
    loss.backward()
    assert torch.equal(leaf.grad, want)


def test_the_upstream_gradient_is_left_alone(path: Path) -> None:
    student, teacher, _ = make_inputs((SAMPLES, CLASSES))
    upstream = torch.linspace(0.5, 2.0, SAMPLES)
    before = upstream.clone()
    measured(kdkernels.kd_loss, student, teacher, upstream, reduction="none", **path.options)
    assert torch.equal(upstream, before)


@each(SOME_LOSSES)
def test_student_used_elsewhere_in_the_graph(case: Case, path: Path) -> None:
    """Logits of a network that feed this loss, another one and a penalty."""
    features = make_inputs((SAMPLES, 5)).student
    weight = make_inputs((CLASSES, 5), scale=0.5, seed=1).student
    _, teacher, target = make_inputs((SAMPLES, CLASSES))

    def gradient_of(loss_of: object) -> Tensor:
        leaf = weight.clone().requires_grad_()
        logits = features @ leaf.t()
        total = loss_of(logits) + torch.nn.functional.cross_entropy(logits, target) + logits.square().mean()
        total.backward()
        assert leaf.grad is not None
        return leaf.grad

    got = gradient_of(lambda z: case.call(z, teacher, **path.options, **needed_target(case, target)))
    distillation = expected(case.objective, features @ weight.t(), teacher, **needed_target(case, target)).gradient
    want = gradient_of(lambda z: (z * distillation).sum())
    assert_gradient(got, want, 4e-6)


def test_students_logits_changed_after_the_loss(path: Path) -> None:
    """Where they are needed again backward says that they have changed; otherwise the gradient is right."""
    student, teacher, _ = make_inputs((SAMPLES, CLASSES))
    want = expected(objective.kd(), student, teacher).gradient
    leaf = student.clone().requires_grad_()
    logits = leaf * 1.0
    loss = kdkernels.kd_loss(logits, teacher, **path.options)
    with torch.no_grad():
        logits.zero_()
    if path.mode == "recompute":
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.backward()
    else:
        loss.backward()
        assert leaf.grad is not None
        assert_gradient(leaf.grad, want, 2e-6)


# Mixed precision ----------------------------------------------------------------------------------------------------


def test_autocast_leaves_the_arithmetic_alone(path: Path) -> None:
    """Float32 logits under bfloat16 autocast: the float32 result, to the last bit."""
    student, teacher, target = make_inputs((SAMPLES, CLASSES))
    want = measured(kdkernels.dkd_loss, student, teacher, target=target, **path.options)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        got = measured(kdkernels.dkd_loss, student, teacher, target=target, **path.options)
    assert got.loss.dtype == torch.float32
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradient, want.gradient)


def test_logits_of_an_autocast_network(path: Path) -> None:
    features = make_inputs((SAMPLES, 16)).student
    weight = make_inputs((CLASSES, 16), seed=1).student.requires_grad_()
    _, teacher, _ = make_inputs((SAMPLES, CLASSES))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        logits = features @ weight.t()
        assert logits.dtype == torch.bfloat16
        loss = kdkernels.kd_loss(logits, teacher, **path.options)
    loss.backward()
    assert_values(loss.detach(), expected(objective.kd(), logits, teacher).loss, 2e-6)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


@each({name: LOSSES[name] for name in ("kd", "dkd", "gdkd3")})
def test_a_loss_scaler_rescues_float16(case: Case, path: Path) -> None:
    """The mean over many samples has a gradient below float16's range; the scaled loss has it within.

    So the gradient may not be rounded to float16 before the scale is known.
    """
    student, teacher, target = make_inputs((32768, 12), torch.float16, scale=0.5)
    options = needed_target(case, target)
    scale = torch.tensor(65536.0)
    tolerance = GRADIENT_TOLERANCE[torch.float16]
    want = expected(case.objective, student, teacher, scale, **options).gradient
    underflowed = (want / scale).half().double() * scale.double()
    assert (underflowed - want).norm() > 2 * tolerance * want.norm(), "nothing underflows: the test tests nothing"
    scaled = measured(case.call, student, teacher, scale, **path.options, **options).gradient
    assert_gradient(scaled, want, tolerance)


# Nothing more than asked for ----------------------------------------------------------------------------------------

BIG = (64, 2000)
LOGIT_BYTES = 64 * 2000 * 4


@pytest.mark.parametrize("without", ["requires_grad", "no_grad", "inference_mode"])
@each(SOME_LOSSES)
def test_no_gradient_no_graph_no_memory(case: Case, without: str, native_path: Path) -> None:
    student, teacher, target = make_inputs(BIG)
    student.requires_grad_(without != "requires_grad")
    guard = {"requires_grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    losses = []

    def run() -> None:
        with guard[without]():
            losses.append(case.call(student, teacher, **native_path.options, **needed_target(case, target)))

    sizes = allocations(run)
    assert losses[0].grad_fn is None
    assert not losses[0].requires_grad
    assert sizes
    assert sum(sizes) < LOGIT_BYTES / 4


@pytest.mark.parametrize("without", ["requires_grad", "no_grad"])
def test_the_loss_is_the_same_without_a_gradient(without: str, path: Path) -> None:
    student, teacher, target = make_inputs((SAMPLES, CLASSES))
    for case in LOSSES.values():
        options = {**path.options, **needed_target(case, target)}
        want = measured(case.call, student, teacher, **options).loss
        with torch.no_grad() if without == "no_grad" else torch.enable_grad():
            got = case.call(student.clone().requires_grad_(without == "no_grad"), teacher, **options)
        assert got.grad_fn is None
        assert torch.equal(got, want), case.name


def test_a_teacher_that_requires_grad_is_fine_without_grad_mode(path: Path) -> None:
    student, teacher, _ = make_inputs((SAMPLES, CLASSES))
    want = kdkernels.kd_loss(student, teacher, **path.options)
    with torch.no_grad():
        got = kdkernels.kd_loss(student, teacher.requires_grad_(), **path.options)
    assert torch.equal(got, want)


def near(sizes: list[int], target: int) -> int:
    """How many allocations are about ``target`` bytes or more."""
    return sum(size > 0.9 * target for size in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("upstream", [1.0, 0.5])
@each(SOME_LOSSES)
def test_one_buffer_of_the_logits_size(case: Case, upstream: float, dtype: torch.dtype, native_path: Path) -> None:
    """Forward and backward together allocate the gradient, and nothing else of that size."""
    student, teacher, target = make_inputs(BIG, dtype)
    student.requires_grad_()
    factor = torch.tensor(upstream)

    def run() -> None:
        loss = case.call(student, teacher, **native_path.options, **needed_target(case, target))
        loss.backward(factor)

    sizes = allocations(run)
    assert near(sizes, student.numel() * student.element_size()) == 1
    assert sum(sizes) < 1.5 * student.numel() * student.element_size()


def retained_by(case: Case, path: Path) -> tuple[Tensor, StorageWeakRef]:
    """A loss of logits that the caller has forgotten, and whether anyone still holds them."""
    student, teacher, target = make_inputs(BIG)
    logits = student.requires_grad_() * 1.0
    watched = StorageWeakRef(logits.untyped_storage())
    return case.call(logits, teacher, **path.options, **needed_target(case, target)), watched


@each(SOME_LOSSES)
def test_fused_mode_lets_the_logits_go(case: Case, native_backend: str) -> None:
    """With the gradient at hand nothing needs them: their memory is free before backward."""
    loss, logits = retained_by(case, Path(native_backend, "fused"))
    gc.collect()
    assert logits.expired()
    loss.backward()


@each(SOME_LOSSES)
def test_recompute_mode_keeps_the_logits_and_nothing_else_of_their_size(case: Case, native_backend: str) -> None:
    path = Path(native_backend, "recompute")
    loss, logits = retained_by(case, path)
    assert not logits.expired()
    loss.backward()
    del loss
    gc.collect()
    assert logits.expired()

    student, teacher, target = make_inputs(BIG)
    student.requires_grad_()
    losses = []
    sizes = allocations(
        lambda: losses.append(case.call(student, teacher, **path.options, **needed_target(case, target)))
    )
    assert sum(sizes) < LOGIT_BYTES / 4
    saved = [node_tensor for node_tensor in _saved(losses[0]) if node_tensor.numel() * 4 > LOGIT_BYTES / 4]
    assert {tensor.data_ptr() for tensor in saved} == {student.data_ptr(), teacher.data_ptr()}


def _saved(loss: Tensor) -> tuple[Tensor, ...]:
    tensors = getattr(loss.grad_fn, "saved_tensors", ())
    return tuple(tensor for tensor in tensors if tensor is not None)


def test_parts_are_detached(path: Path) -> None:
    student, teacher, target = make_inputs((SAMPLES, CLASSES))
    leaf = student.clone().requires_grad_()
    loss, parts = kdkernels.dkd_loss(leaf, teacher, target, return_parts=True, **path.options)
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts.values())
    loss.backward()
    want = expected(objective.dkd(), student, teacher, target=target)
    assert leaf.grad is not None
    assert_same(type(want)(loss.detach(), leaf.grad, parts), want, student, teacher)


def test_a_loss_that_only_forwards_through_parts_has_no_gradient(path: Path) -> None:
    """Nothing flows where only the parts are used."""
    student, teacher, _ = make_inputs((SAMPLES, CLASSES))
    _, parts = kdkernels.kd_loss(student.requires_grad_(), teacher, return_parts=True, **path.options)
    with pytest.raises(RuntimeError, match="does not require grad"):
        parts["whole"].backward()
