"""The CPU kernels where arithmetic is hard: infinite, huge, tiny and masked logits, groups of one class, factors of
infinity. Every test runs on every instruction set, and every check in both layouts and both modes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from helpers import (
    CPU_PATHS,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Outcome,
    assert_gradient,
    assert_values,
    expected,
    instruction_sets,
    make_inputs,
    measured,
    name_of,
    require,
)
from torch import Tensor

import kdkernels
from kdkernels import objective
from kdkernels.objective import TARGET, WHOLE, Objective, Partition, Term

INF = float("inf")
LAYOUTS = ["rows", "pixels"]
MASKS = [-INF, torch.finfo(torch.float32).min, -1e10]

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    require("cpu")
    kdkernels.set_cpu_instruction_set(request.param)
    yield request.param
    kdkernels.set_cpu_instruction_set("auto")


def laid_out(logits: Tensor, layout: str) -> Tensor:
    """The same (N, C) logits, as rows or with the samples side by side in memory."""
    return logits.t().contiguous().t() if layout == "pixels" else logits.contiguous()


def results(value: Objective, student: Tensor, teacher: Tensor, **options: Any) -> tuple[list[Outcome], Outcome]:
    """What the kernels give in each layout and mode, and what is expected, for the loss of each sample."""
    options["reduction"] = "none"
    call, got = partial(kdkernels.distillation_loss, objective=value), []
    for layout, path in product(LAYOUTS, CPU_PATHS):
        logits = laid_out(student, layout), laid_out(teacher, layout)
        got.append(measured(call, *logits, **options, **path.options))
    return got, expected(value, student, teacher, **options)


def check(value: Objective, student: Tensor, teacher: Tensor, units: float = 1.0, **options: Any) -> None:
    """Holds the loss of each sample and the gradient to the accuracy table, or to some times that."""
    every, want = results(value, student, teacher, **options)
    finite = want.loss.isfinite()
    for got in every:
        assert_losses(value, got, want, units)
        assert_close(got.gradient[finite], want.gradient[finite], units)


def assert_losses(value: Objective, got: Outcome, want: Outcome, units: float = 1.0) -> None:
    """The table's bound for the losses of single samples."""
    bound = units * LOSS_TOLERANCE[torch.float32] * want.loss.abs().clamp(min=1) + 8 * 2**-24 * weight_of(value)
    error = torch.where(got.loss == want.loss, 0.0, (got.loss - want.loss).abs())
    assert (error <= bound).all(), f"{got.loss}, expected {want.loss}"


def assert_close(got: Tensor, want: Tensor, units: float = 1.0) -> None:
    """The table's bound for a gradient, and what float64 rounds where that should be 0."""
    error, norm = (got - want).norm().item(), want.norm().item()
    assert error <= units * GRADIENT_TOLERANCE[torch.float32] * norm + 1e-12, (
        f"gradient: error {error:.3g} of {norm:.3g}"
    )


def weight_of(value: Objective) -> float:
    """What the roundings of a probability are multiplied by."""
    return value.ce_weight + sum(term.scale * (sum(term.mass) + sum(map(sum, term.groups))) for term in value.terms)


# Groups of one class ------------------------------------------------------------------------------------------------

SINGLES = {
    "dkd": (objective.dkd(), 2),
    "gdkd": (objective.gdkd(k=6), 7),
    "gdkd3": (objective.gdkd3(k=6), 7),
    "gdkd_both": (objective.gdkd(k=6, kl_type="both"), 7),
    "gdkd_k1": (objective.gdkd(k=1), 2),
    "kd": (objective.kd(), 1),
    "dkd_ce": (objective.adjust(objective.dkd(), ce_weight=0.5), 2),
    "two_terms": (
        Objective(
            (
                Term(2.0, TARGET, (1.0, 0.0), ((1.0, 0.0), (8.0, 0.0))),
                Term(4.0, TARGET, (0.5, 0.5), ((0.0, 1.0), (1.0, 1.0))),
            )
        ),
        2,
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    # By sample, two classes are always the same two logits.
    [(name, kind) for name in SINGLES for kind in ("class", "sample") if kind == "class" or SINGLES[name][1] > 2],
)
def test_a_rest_of_one_class_is_standardised(name: str, kind: str) -> None:
    value, classes = SINGLES[name]
    student, teacher, target = make_inputs((32, classes), scale=3.0)
    standardized = objective.adjust(value, standardize=kind)
    check(standardized, student + 2, teacher - 1, target=target)


def test_one_class_far_from_zero_by_class() -> None:
    student = torch.tensor([[-3000.0], [10.0], [1.0], [5.0]])
    check(objective.pr_kd(), student, torch.randn(4, 1))


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("name", ["dkd", "gdkd", "gdkd3", "gdkd_k1", "two_terms"])
def test_groups_of_one_class_far_from_zero(name: str, offset: float) -> None:
    value, classes = SINGLES[name]
    for count in (classes, 19):
        student, teacher, target = make_inputs((64, count), scale=3.0)
        check(value, student + offset, teacher + offset, target=target)


# Masked classes -----------------------------------------------------------------------------------------------------

#: Reverse KL in some of the groups only: the teacher's masked class is in another one.
BESIDE = {
    "dkd": Objective((Term(4.0, TARGET, (1.0, 0.0), ((1.0, 0.0), (0.0, 1.0))),)),
    "gdkd_top": Objective((Term(4.0, Partition("topk", 3, False), (1.0, 0.0), ((1.0, 0.0), (0.0, 1.0))),)),
    "gdkd_rest": Objective((Term(4.0, Partition("topk", 3), (1.0, 0.0), ((0.0, 1.0), (1.0, 0.0))),)),
    "gdkd3": Objective((Term(2.0, Partition("top1_topk", 3), (1.0, 0.0), ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0))),)),
    "squares": Objective(
        (
            Term(2.0, Partition("topk", 3), (1.0, 0.0), ((0.0, 1.0), (1.0, 0.0))),
            Term(4.0, Partition("topk", 3), (1.0, 0.0), ((1.0, 0.5), (0.5, 0.0))),
        )
    ),
    "two_partitions": Objective((Term(4.0, WHOLE), Term(3.0, Partition("topk", 3), groups=((0.0, 1.0), (1.0, 0.0))))),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("classes", [20, 2500])  # transposed; more than a tile
@pytest.mark.parametrize("name", BESIDE)
def test_masked_in_the_teacher_beside_a_reverse_group(name: str, classes: int, mask: float) -> None:
    student, teacher, _ = make_inputs((8, classes), scale=1.0)
    target = torch.arange(8)
    teacher[target, target] = mask
    check(BESIDE[name], student, teacher, target=target)


MASKED = {
    "kd": objective.kd(),
    "reverse_kd": objective.reverse_kd(1.0),
    "bdd": objective.bdd(forward_temperature=4.0, reverse_temperature=2.0),
    "dkd_both": objective.dkd(kl_type="both"),
    "gdkd": objective.gdkd(k=3),
    "dkd_ce": objective.adjust(objective.dkd(temperature=2.0), ce_weight=0.3),
    "lskd": objective.lskd(),
    "ls_dkd": objective.ls_dkd(),
    "pr_dkd": objective.pr_dkd(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MASKED)
def test_masks(name: str, mask: float) -> None:
    student, teacher, target = make_inputs((8, 70), scale=1.0)
    target, classes = target % 30 + 20, torch.arange(70).expand(8, 70)
    scattered = torch.rand(8, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    for others in (classes < 20, classes > 55, scattered, classes >= 0):
        masked = others.scatter(1, target[:, None], False)
        every, want = results(
            MASKED[name], student.masked_fill(masked, mask), teacher.masked_fill(masked, mask), target=target
        )
        for got in every:
            assert_losses(MASKED[name], got, want)
            assert got.gradient.isfinite().all()
            if not MASKED[name].standardize:
                assert_close(got.gradient, want.gradient)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["kd", "bdd", "dkd_both"])
def test_a_finite_mask_on_one_side(name: str, side: str) -> None:
    student, teacher, target = make_inputs((8, 70), scale=1.0)
    (student if side == "student" else teacher)[torch.arange(8), (target + 1) % 70] = -1e10
    check(MASKED[name], student, teacher, target=target)


def test_the_lowest_number_on_one_side_at_a_temperature_of_one() -> None:
    """An exponent, log2(e) times as large, would overflow."""
    student, teacher, _ = make_inputs((8, 70), scale=1.0)
    student[:, 5] = torch.finfo(torch.float32).min
    every, want = results(objective.kd(1.0), student, teacher)
    for got in every:
        assert want.loss.isfinite().all()
        assert_values(got.loss, want.loss, LOSS_TOLERANCE[torch.float32])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("value", [-100.0, 1e4])
@pytest.mark.parametrize("mask", MASKS)
def test_nothing_but_the_target_beside_cross_entropy(mask: float, value: float, temperature: float) -> None:
    logits = torch.full((2, 20), mask)
    logits[:, 0] = value
    target = torch.zeros(2, dtype=torch.int64)
    for of in (objective.dkd(temperature=temperature), objective.gdkd(k=1, temperature=temperature)):
        with_ce = objective.adjust(of, ce_weight=0.3)
        for got in results(with_ce, logits, logits.clone(), target=target)[0]:
            assert torch.equal(got.loss, torch.zeros(2))
            assert torch.equal(got.gradient, torch.zeros(2, 20))


# Huge and tiny logits -----------------------------------------------------------------------------------------------

HUGE = {
    "kd": objective.kd(1.0),
    "kd_ce": objective.adjust(objective.kd(), ce_weight=1.0),
    "dkd": objective.dkd(),
    "gdkd_both": objective.gdkd(k=3, kl_type="both"),
    "bdd": objective.bdd(),
    "gdkd3": objective.gdkd3(),
}


@pytest.mark.parametrize("size", [1e9, 1e10])
@pytest.mark.parametrize("name", HUGE)
def test_huge_logits(name: str, size: float) -> None:
    for classes in (20, 100):
        student, teacher, target = make_inputs((8, classes), scale=1.0)
        check(HUGE[name], student * size, teacher * size, target=target)


@pytest.mark.parametrize("size", [1e10, 1e15, 1e25])
@pytest.mark.parametrize("name", ["kd", "kd_ce", "dkd", "gdkd3"])
def test_huge_logits_of_many_classes(name: str, size: float) -> None:
    """Without a reverse KL, whose gradient is a difference of numbers of this size."""
    student, teacher, target = make_inputs((8, 2500), scale=1.0)
    check(HUGE[name], student * size, teacher * size, target=target)


@pytest.mark.parametrize("size", [1e10, -1e10, 1e20])
@pytest.mark.parametrize("name", HUGE)
def test_constant_rows(name: str, size: float) -> None:
    _, teacher, target = make_inputs((8, 100), scale=1.0)
    student = torch.full((8, 100), size)
    check(HUGE[name], student, student.clone(), target=target)
    check(HUGE[name], student, teacher, target=target)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e10, 1e25])
@pytest.mark.parametrize("kind", ["class", "sample"])
def test_tiny_and_huge_logits_are_standardised(kind: str, size: float) -> None:
    for shape in ((8, 50), (40, 3), (100, 300)):
        student, teacher, target = make_inputs(shape, scale=1.0)
        value = objective.adjust(objective.dkd(temperature=1.0), standardize=kind, eps=0.0)
        check(value, student * size, teacher * size, units=4, target=target)


@pytest.mark.parametrize("temperature", [20.0, 100.0, 1000.0])
@pytest.mark.parametrize("classes", [19, 100, 1000])  # losses in double precision, and in single of short and long rows
def test_single_samples_at_high_temperatures(classes: int, temperature: float) -> None:
    student, teacher, target = make_inputs((64, classes), scale=3.0)
    both = Objective((Term(temperature, WHOLE, groups=((1.0, 1.0),)),))
    for value in (both, objective.dkd(temperature=temperature), objective.gdkd(temperature=temperature)):
        every, want = results(value, student, teacher, target=target)
        for got in every:
            assert_losses(value, got, want)


# Backward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("standardize", [None, "class", "sample"])
def test_an_infinite_factor_of_a_sample_that_does_not_count(standardize: str | None, dtype: torch.dtype) -> None:
    student, teacher, target = make_inputs((6, 9), dtype)
    target = target.clamp(max=6)
    target[2] = -100
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 2.0])
    options: dict[str, Any] = {"sample_weight": weight, "standardize": standardize, "num_classes": 7}
    for layout, path, reduction, factor in product(LAYOUTS, CPU_PATHS, ["none", "mean"], [INF, torch.nan]):
        leaf = laid_out(student, layout).requires_grad_()
        of = partial(kdkernels.dkd_loss, leaf, laid_out(teacher, layout), target, **options, **path.options)
        loss = of(reduction=reduction)
        upstream = torch.ones_like(loss)
        upstream[[2, 4] if loss.dim() else ...] = factor
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        assert torch.equal(gradient[[2, 4]], torch.zeros(2, 9, dtype=dtype))
        assert torch.equal(gradient[:, 7:], torch.zeros(6, 2, dtype=dtype))
        assert gradient.isfinite().all() == bool(loss.dim())


@pytest.mark.parametrize("name", ["kd", "bdd", "dkd_both", "dkd_ce", "gdkd", "lskd", "pr_dkd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_instruction_set_in_backward(name: str, layout: str) -> None:
    student, teacher, target = make_inputs((16, 100), scale=3.0)
    student, teacher = laid_out(student + 2, layout), laid_out(teacher + 2, layout)
    of = partial(kdkernels.distillation_loss, objective=MASKED[name], target=target, mode="recompute")
    for first in instruction_sets():
        for second in instruction_sets():
            gradients = []
            for other in (first, second):
                leaf = student.detach().requires_grad_()
                kdkernels.set_cpu_instruction_set(first)
                loss = of(leaf, teacher)
                kdkernels.set_cpu_instruction_set(other)
                gradients.append(torch.autograd.grad(loss, leaf)[0])
            assert_gradient(gradients[1], gradients[0], GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("standardize", [None, "class"])
@pytest.mark.parametrize("value", [-1, 12, 2**40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_target_changed_behind_autograds_back(value: int, standardize: str | None, layout: str) -> None:
    student, teacher, target = make_inputs((6, 9))
    leaf = laid_out(student, layout).requires_grad_()
    loss = kdkernels.dkd_loss(
        leaf, laid_out(teacher, layout), target, ce_weight=1.0, standardize=standardize, mode="recompute"
    )
    target.numpy()[3] = value
    with pytest.raises(IndexError, match=rf"target must be in \[0, 9\).*got {value} for sample 3"):
        loss.backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_ignored_target_may_change(layout: str) -> None:
    student, teacher, target = make_inputs((6, 9))
    target[3] = -100
    leaf = laid_out(student, layout).requires_grad_()
    loss = kdkernels.dkd_loss(leaf, laid_out(teacher, layout), target, mode="recompute")
    target.numpy()[3] = -7
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[3], torch.zeros(9))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_classes_changed_by_a_hook(layout: str) -> None:
    student, teacher, _ = make_inputs((6, 100))
    leaf = laid_out(student, layout).requires_grad_()

    def packed(tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, 100) if tensor.dtype == torch.int64 else tensor

    with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
        loss = kdkernels.gdkd_loss(leaf, laid_out(teacher, layout), k=3, mode="recompute")
    with pytest.raises(IndexError, match=r"selected must be in \[0, 100\).*got 100 for sample 0"):
        loss.backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selected_classes_of_which_one_tile_is_masked(layout: str) -> None:
    """One class more than a tile of rows holds (2048): the last of them is no group of its own."""
    student, teacher, _ = make_inputs((3, 3000))
    teacher = teacher.sort(1, descending=True).values
    student[:, :2048] = -torch.inf
    got, want = (
        measured(
            partial(kdkernels.gdkd_loss, k=2049, w0=1.0, w1=0.0, w2=0.0),
            laid_out(student, layout),
            laid_out(teacher, layout),
            backend=backend,
        )
        for backend in ("cpu", "reference")
    )
    assert_values(got.loss, want.loss, 1e-5)
    assert_gradient(got.gradient, want.gradient, 1e-5)


# Masks of one side where the other underflows -------------------------------------------------------------------------

#: Classes: few, transposed or in double precision; a tile; tiles whose sums begin at origins far below, and merge;
#: chunks that may be split over threads.
UNDERFLOWING = [7, 40, 600, 5000, 17000]


@pytest.mark.parametrize("classes", UNDERFLOWING)
@pytest.mark.parametrize("masked_side", ["teacher", "student"])
@pytest.mark.parametrize("at", ["first", "last", "alone"])
def test_a_mask_of_one_side_is_infinite_however_little_the_other_side_has(
    classes: int, masked_side: str, at: str
) -> None:
    """Reverse where the teacher masks a class, forward where the student does: also where the other's probability
    underflows, in single or in double precision, or together with the whole group's."""
    student, teacher, _ = make_inputs((4, classes), scale=1.0)
    masked, other = (teacher, student) if masked_side == "teacher" else (student, teacher)
    index = {"first": 0, "last": classes - 1, "alone": classes // 2}[at]
    masked[:3, index] = -INF
    other[0, index], other[1, index], other[2, index] = -5.0, -200.0, -3000.0
    if at == "first":
        other[:, classes // 2] = 50.0  # later tiles leave nothing of what the first ones added
    target = torch.full((4,), index) if at == "alone" else torch.full((4,), (index + 1) % classes)
    direction = (0.0, 1.0) if masked_side == "teacher" else (1.0, 0.0)
    for partition, groups in ((WHOLE, (direction,)), (TARGET, (direction, direction))):
        value = Objective((Term(1.0, partition, direction, groups),))
        every, want = results(value, student, teacher, target=target)
        assert want.loss.isinf().tolist() == [True, True, True, False]
        for got in every:
            assert_losses(value, got, want)
            assert_close(got.gradient[3], want.gradient[3])
            if masked_side == "student":
                assert_close(got.gradient, want.gradient)
