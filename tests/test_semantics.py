"""What every backend does at the edges: masks, ties, NaN, empty and ignored samples, layouts, extreme logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import literal
import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    INTERPRETED,
    Inputs,
    Outcome,
    Path,
    allocations,
    arithmetic_dtype,
    assert_gradient,
    assert_same,
    assert_values,
    check,
    check_size,
    expected,
    loss_tolerance,
    make_inputs,
    measured,
    name_of,
    needed_target,
)
from losses import LOSSES, SOME_LOSSES, STANDARDIZED, Case, each
from torch import Tensor

import kdkernels
from kdkernels import dispatch, objective, validation
from kdkernels.modules import LOSSES as LOSS_ROWS

INF = torch.inf

#: Losses whose every direction is forward, or reverse.
FORWARD = {name: LOSSES[name] for name in ("kd", "dkd", "dkd_top1", "gdkd", "gdkd3")}
REVERSE = {name: LOSSES[name] for name in ("reverse_kd", "gdkd_reverse", "reverse_mass")}
#: Losses that take the teacher's largest logits, not the smallest, so that a masked class never leads.
BEST = {name: case for name, case in LOSSES.items() if all(term.partition.largest for term in case.objective.terms)}


def without_cross_entropy(cases: dict[str, Case]) -> dict[str, Case]:
    return {name: case for name, case in cases.items() if case.objective.ce_weight == 0}


# Reductions and denominators ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True], ids=["all", "some"])
@each(SOME_LOSSES)
def test_mean_over_pixels(case: Case, mask: bool, path: Path) -> None:
    """The mean counts valid pixels; batchmean divides by the size of dimension 0, whatever is ignored."""
    student, teacher, target = make_inputs((2, 23, 3, 4))
    if mask:
        target[0, 1:] = -100
    options = {"target": target, **path.options}
    rows = measured(case.call, student, teacher, reduction="none", **options).loss
    assert rows.shape == (2, 3, 4)
    count = int((target != -100).sum())
    for reduction, divisor in [("sum", 1), ("mean", count), ("batchmean", 2)]:
        got = measured(case.call, student, teacher, reduction=reduction, **options).loss
        assert_values(got, rows.double().sum() / divisor, 2e-6, reduction)


@pytest.mark.parametrize(
    "denominator",
    [
        37,
        2.5,
        torch.tensor(37),
        torch.tensor(2.5),
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor(3, dtype=torch.int32),
    ],
    ids=repr,
)
@each(SOME_LOSSES)
def test_denominator_replaces_the_count(case: Case, denominator: float | Tensor, path: Path) -> None:
    student, teacher, target = make_inputs((5, 23))
    target[2] = -100
    if isinstance(denominator, Tensor):
        denominator = denominator.to(student.device)
    got = check(case, student, teacher, path, target=target, denominator=denominator)
    total = expected(case.objective, student, teacher, target=target, reduction="sum")
    assert_values(got.loss, total.loss / float(denominator), 2e-6)
    assert_gradient(got.gradient, total.gradient / float(denominator), 2e-6)


def test_micro_batches_add_up(path: Path) -> None:
    """With the whole batch's count as denominator, accumulated micro-batches give the whole batch's gradient."""
    student, teacher, target = make_inputs((8, 23))
    target[[1, 2, 6]] = -100
    count = (target != -100).sum()
    whole = measured(kdkernels.dkd_loss, student, teacher, target=target, **path.options)
    leaf = student.clone().requires_grad_()
    losses = []
    for chunk in (slice(0, 3), slice(3, 8)):
        loss = kdkernels.dkd_loss(leaf[chunk], teacher[chunk], target[chunk], denominator=count, **path.options)
        loss.backward()
        losses.append(loss.detach())
    assert leaf.grad is not None
    assert_values(sum(losses), whole.loss, 4e-6)
    assert_gradient(leaf.grad, whole.gradient, 4e-6)


def test_a_denominator_tensor_gets_no_gradient(path: Path) -> None:
    student, teacher, _ = make_inputs((5, 23))
    denominator = torch.tensor(3.0, requires_grad=True)
    kdkernels.kd_loss(student.requires_grad_(), teacher, denominator=denominator, **path.options).backward()
    assert denominator.grad is None


# Samples that do not count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [torch.nan, INF], ids=str)
@pytest.mark.parametrize("how", ["ignore_index", "weight"])
@each(LOSSES)
def test_samples_that_do_not_count_may_hold_anything(case: Case, how: str, garbage: float, path: Path) -> None:
    """Loss and gradient are those of the batch without them; their own gradient is exactly 0."""
    student, teacher, target = make_inputs((6, 23))
    out = [1, 4]
    kept = [0, 2, 3, 5]
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])
    want = expected(case.objective, student[kept], teacher[kept], target=target[kept], sample_weight=weight[kept])
    student[out] = garbage
    teacher[out] = garbage
    if how == "ignore_index":
        target[out] = -100
        weight[out] = 1.0
    got = measured(case.call, student, teacher, target=target, sample_weight=weight, return_parts=True, **path.options)
    assert not got.gradient[out].any()
    assert_same(got._replace(gradient=got.gradient[kept]), want, student, teacher)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("how", ["ignore_index", "weight"])
@each(SOME_LOSSES)
def test_no_valid_sample(case: Case, how: str, reduction: str, path: Path) -> None:
    student, teacher, target = make_inputs((3, 23))
    student[1], teacher[2] = torch.nan, torch.nan
    options: dict[str, object] = {"reduction": reduction, "target": target, **path.options}
    if how == "ignore_index":
        target[:] = -100
    else:
        options["sample_weight"] = torch.zeros(3)
    got = measured(case.call, student, teacher, return_parts=True, **options)
    for value in (got.loss, got.gradient, *got.parts.values()):
        assert value.eq(0).all()


def test_no_valid_sample_and_a_denominator_of_zero(path: Path) -> None:
    """The sum over all processes of a count that is 0 everywhere: 0 / 0 is 0 here."""
    student, teacher, _ = make_inputs((3, 23))
    options = {"target": torch.full((3,), -100), "denominator": torch.tensor(0), **path.options}
    got = measured(kdkernels.kd_loss, student, teacher, **options)
    assert got.loss == 0
    assert not got.gradient.any()


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), 1e-320], ids=repr)
def test_a_denominator_of_zero_as_a_number(zero: float, path: Path) -> None:
    """As that of a window whose tokens are all ignored; the same as a tensor."""
    student, teacher, target = make_inputs((5, 23))
    for some in (torch.full_like(target, -100), target):
        got, want = (
            measured(kdkernels.kd_loss, student, teacher, target=some, denominator=denominator, **path.options)
            for denominator in (zero, torch.tensor(0))
        )
        for outcome in (got, want):
            assert outcome.loss == 0
            assert torch.equal(outcome.gradient, torch.zeros_like(student))


@pytest.mark.parametrize("ignore_index", [-1, 255, 4])
def test_any_ignore_index(ignore_index: int, path: Path) -> None:
    """Also one that is a class."""
    student, teacher, target = make_inputs((5, 9))
    target[1] = ignore_index
    target[3] = 4
    counts = target != ignore_index
    got = measured(kdkernels.dkd_loss, student, teacher, target=target, ignore_index=ignore_index, **path.options)
    want = expected(objective.dkd(), student[counts], teacher[counts], target=target[counts])
    assert_values(got.loss, want.loss, 2e-6)
    assert_gradient(got.gradient[counts], want.gradient, 2e-6)
    assert not got.gradient[~counts].any()


def test_a_target_marks_ignored_samples_of_losses_that_need_none(path: Path) -> None:
    student, teacher, target = make_inputs((5, 23))
    want = measured(kdkernels.kd_loss, student, teacher, **path.options)
    got = measured(kdkernels.kd_loss, student, teacher, target=target, **path.options)
    assert torch.equal(got.loss, want.loss)
    target[0] = -100
    got = measured(kdkernels.kd_loss, student, teacher, target=target, **path.options)
    assert_values(got.loss, expected(objective.kd(), student[1:], teacher[1:]).loss, 2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 0, 45, 2**62, -(2**63)])
@pytest.mark.parametrize("name", ["kd", "gdkd", "pr_kd", "lskd", "bdd_two_temperatures"])
def test_a_target_that_is_only_a_mask_may_hold_anything(
    name: str, ignore_index: int, reduction: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels beyond the compared classes, special tokens, other negative numbers."""
    monkeypatch.setattr(dispatch, "debug", True)
    case = (LOSSES | STANDARDIZED)[name]
    student, teacher, _ = make_inputs((8, 23))
    labels = torch.tensor([0, 45, ignore_index, 22, -7, 2**40, ignore_index, 3])
    valid = labels != ignore_index
    options = {"reduction": reduction, "num_classes": 20}
    want = expected(case.objective, student, teacher, sample_weight=valid.double(), **options)
    got = measured(case.call, student, teacher, target=labels, ignore_index=ignore_index, **options, **path.options)
    assert_same(got, want, student, teacher)


@pytest.mark.parametrize("name", ["dkd", "kd_ce"])
def test_a_target_of_classes_is_checked_beside_a_mask(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "debug", True)
    student, teacher, target = make_inputs((5, 23))
    target[3] = 21
    with pytest.raises(IndexError, match=r"target must be in \[0, 20\).*got 2[012] for sample"):
        LOSSES[name].call(student, teacher, target=target, num_classes=20, **path.options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64], ids=name_of)
def test_weights_of_any_real_dtype(dtype: torch.dtype, path: Path) -> None:
    student, teacher, target = make_inputs((4, 23))
    weight = torch.tensor([1, 0, 3, 1]).to(dtype)
    check(LOSSES["dkd"], student, teacher, path, target=target, sample_weight=weight)


def test_weights_of_pixels(path: Path) -> None:
    """In the sample dimensions' shape, with any strides, or flat."""
    student, teacher, target = make_inputs((2, 23, 3, 4))
    weight = torch.arange(24.0).reshape(4, 3, 2).permute(2, 1, 0)
    got = check(LOSSES["dkd"], student, teacher, path, target=target, sample_weight=weight)
    flat = measured(kdkernels.dkd_loss, student, teacher, target=target, sample_weight=weight.flatten(), **path.options)
    assert torch.equal(got.loss, flat.loss)
    assert torch.equal(got.gradient, flat.gradient)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=name_of)
def test_targets_of_any_integer_dtype(dtype: torch.dtype, path: Path) -> None:
    student, teacher, target = make_inputs((4, 23))
    strided = torch.stack([target, target + 1], 1).to(dtype)[:, 0]
    check(LOSSES["everything"], student, teacher, path, target=strided)


@pytest.mark.parametrize("value", [-1, 23, 2**40])
@pytest.mark.parametrize("name", ["dkd", "kd_ce"])
def test_target_out_of_range(name: str, value: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "debug", True)
    student, teacher, target = make_inputs((4, 23))
    target[2] = value
    with pytest.raises(IndexError, match=rf"target must be in \[0, 23\).*got {value} for sample 2"):
        LOSSES[name].call(student.requires_grad_(), teacher, target=target, **path.options)


def test_target_beyond_num_classes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that are not compared are no targets."""
    monkeypatch.setattr(dispatch, "debug", True)
    student, teacher, target = make_inputs((4, 23))
    target[:] = 3
    target[1] = 20
    with pytest.raises(IndexError, match=r"target must be in \[0, 20\).*got 20 for sample 1"):
        kdkernels.dkd_loss(student, teacher, target, num_classes=20, **path.options)


@pytest.mark.of_gpus
@pytest.mark.parametrize("value", [-1, 23, 2**40])
@pytest.mark.parametrize("name", ["dkd", "kd_ce"])
def test_target_out_of_range_unchecked(
    name: str, value: int, native_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nobody waits for a check: the sample's loss and gradient are NaN, and nothing else is touched."""
    monkeypatch.setattr(dispatch, "debug", False)
    student, teacher, target = make_inputs((4, 23))
    options = {"reduction": "none", **native_path.options}
    clean = measured(LOSSES[name].call, student, teacher, target=target, **options)
    target[2] = value
    got = measured(LOSSES[name].call, student, teacher, target=target, **options)
    others = [0, 1, 3]
    assert got.loss.isnan().tolist() == [False, False, True, False]
    assert got.gradient[2].isnan().all()
    assert torch.equal(got.loss[others], clean.loss[others])
    assert torch.equal(got.gradient[others], clean.gradient[others])
    assert measured(LOSSES[name].call, student, teacher, target=target, **options | {"reduction": "mean"}).loss.isnan()


@pytest.mark.parametrize("value", [-0.5, torch.nan], ids=str)
def test_negative_weight(value: float, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "debug", True)
    student, teacher, _ = make_inputs((4, 23))
    weight = torch.tensor([1.0, 1.0, value, 1.0])
    with pytest.raises(ValueError, match=rf"sample_weight must be >= 0, got {value} for sample 2"):
        kdkernels.kd_loss(student, teacher, sample_weight=weight, **path.options)


def test_a_missing_target(path: Path) -> None:
    student, teacher, _ = make_inputs((4, 23))
    with pytest.raises(TypeError, match=r"target is required by ce_weight, got None"):
        kdkernels.kd_loss(student, teacher, ce_weight=0.5, **path.options)
    with pytest.raises(TypeError, match=r"target is required by the loss's target partition, got None"):
        kdkernels.distillation_loss(student, teacher, objective.dkd(), **path.options)


# Ties and groups ----------------------------------------------------------------------------------------------------


@cache
def tied(name: str, classes: int) -> tuple[Inputs, Outcome]:
    """Teachers of few distinct logits, and what the oracle says of them."""
    inputs = make_inputs((4, classes), scale=2.0)
    student, teacher, _ = inputs
    teacher[0] = 1.5
    teacher[1] = (teacher[1] > 0).float()
    teacher[2] = torch.where(teacher[2] > 0, 0.0, -0.0)
    teacher[3] = teacher[3].round()
    return inputs, expected(LOSSES[name].objective, student, teacher)


@pytest.mark.parametrize(
    "classes",
    [
        23,
        3000,  # ties between vectors and tiles
        40000,  # ties between the threads that share a row
    ],
)
@pytest.mark.parametrize("name", ["dkd_top1", "gdkd", "gdkd_worst", "gdkd_k20", "gdkd3", "gdkd3_worst_both"])
def test_ties_go_to_the_lowest_class(name: str, classes: int, path: Path) -> None:
    """All logits equal, two values, zeros of both signs, many ties at the k-th place."""
    (student, teacher, _), want = tied(name, classes)
    assert_same(measured(LOSSES[name].call, student, teacher, **path.options), want, student, teacher)


@pytest.mark.parametrize("largest", [True, False], ids=["best", "worst"])
def test_ties_by_hand(largest: bool, path: Path) -> None:
    """Among equals the leaders are the first classes: only they get a gradient of the leaders' divergence."""
    student, _, _ = make_inputs((2, 40))
    teacher = torch.zeros(2, 40)
    teacher[1, 5] = 1.0 if largest else -1.0
    strategy = "best" if largest else "worst"
    got = measured(
        kdkernels.gdkd_loss, student, teacher, k=3, w0=0.0, w1=1.0, w2=0.0, strategy=strategy, **path.options
    )
    assert [row.nonzero().flatten().tolist() for row in got.gradient] == [[0, 1, 2], [0, 1, 5]]


@pytest.mark.parametrize(
    "value",
    [
        objective.dkd(0.0, 1.0),
        objective.gdkd(1, 0.0, 1.0, 1.0),
        objective.gdkd(1, 0.0, 1.0, 1.0, kl_type="both"),
        objective.gdkd3(2, 0.0, 1.0, 0.0),
    ],
    ids=["dkd", "gdkd", "gdkd_both", "gdkd3"],
)
def test_a_group_of_one_class_has_no_divergence(value: objective.Objective, path: Path) -> None:
    """Exactly 0, and its gradient too: with two classes no group has more (with three, gdkd3's second)."""
    classes = 3 if value.terms[0].partition.kind == "top1_topk" else 2
    student, teacher, target = make_inputs((5, classes), scale=30.0)
    got = measured(
        kdkernels.distillation_loss, student, teacher, objective=value, target=target, return_parts=True, **path.options
    )
    assert got.loss == 0
    assert not got.gradient.any()
    for group in value.terms[0].partition.groups:
        assert got.parts[group] == 0


def test_a_group_of_one_masked_class_has_no_divergence_either(path: Path) -> None:
    """All of the disagreement about the target is in the masses."""
    student, teacher, target = make_inputs((4, 23))
    student.scatter_(1, target[:, None], -INF)
    options = {"target": target, "return_parts": True, **path.options}
    got = measured(kdkernels.dkd_loss, student, teacher, alpha=0.0, **options)
    assert got.parts["target"] == 0
    assert got.parts["mass"] == INF
    _, rest = literal.target_groups(teacher, target)
    want = literal.kl(literal.only(student, rest).double(), literal.only(teacher, rest).double(), 4.0).mean()
    assert_values(got.parts["rest"], want, 2e-6)
    assert_values(got.loss, 8 * want, 2e-6)


@each({name: case for name, case in LOSSES.items() if case.smallest <= 4})
def test_groups_of_equal_mass(case: Case, path: Path) -> None:
    """Logits that are all 0, as a network's may be before its first step: no group is the largest."""
    _, teacher, target = make_inputs((3, case.smallest if case.smallest > 1 else 2))
    student = torch.zeros_like(teacher)
    check(case, student, teacher, path, return_parts=True, **needed_target(case, target))
    check(case, teacher, student, path, return_parts=True, **needed_target(case, target))


@pytest.mark.parametrize("k", [1, 22])
@pytest.mark.parametrize("strategy", ["best", "worst"])
def test_the_extreme_k(k: int, strategy: str, path: Path) -> None:
    """One class leads, or all but one."""
    student, teacher, _ = make_inputs((4, 23))
    call = LOSSES["gdkd"].call
    value = objective.gdkd(k, 1.0, 2.0, 3.0, 2.0, strategy)
    got = measured(
        call, student, teacher, k=k, w0=1.0, w1=2.0, w2=3.0, temperature=2.0, strategy=strategy, **path.options
    )
    assert_same(got, expected(value, student, teacher), student, teacher)


@pytest.mark.parametrize("strategy", ["best", "worst"])
@pytest.mark.parametrize(
    ("k", "classes"),
    [
        (40, 1000),  # more than an insertion sort is for
        (500, 1000),
        (999, 1000),
        (2500, 3000),  # more leaders than a tile has classes
        (300, 40000),  # leaders from every part of a split row
    ],
)
def test_many_leaders(k: int, classes: int, strategy: str, path: Path) -> None:
    if path.backend == "cuda" and k > 1024:
        pytest.skip("it ranks up to 1024 leading classes")
    student, teacher, _ = make_inputs((2, classes))
    got = measured(kdkernels.gdkd_loss, student, teacher, k=k, strategy=strategy, **path.options)
    want = expected(objective.gdkd(k, strategy=strategy), student, teacher)
    assert_same(got, want, student, teacher)


# Masked classes -----------------------------------------------------------------------------------------------------


@each(BEST)
def test_classes_masked_on_both_sides(case: Case, path: Path) -> None:
    """As if they were not there: the loss is that of the other classes, their gradient exactly 0."""
    student, teacher, target = make_inputs((4, 40))
    masked = [0, 7, 8, 31, 39]
    kept = [i for i in range(40) if i not in masked]
    target %= len(kept)
    want = expected(case.objective, student[:, kept], teacher[:, kept], target=target)
    student[:, masked] = -INF
    teacher[:, masked] = -INF
    options = {"target": torch.tensor(kept)[target], **path.options}
    got = measured(case.call, student, teacher, return_parts=True, **options)
    assert not got.gradient[:, masked].any()
    assert_same(got._replace(gradient=got.gradient[:, kept]), want, student, teacher)


@pytest.mark.parametrize(
    ("masked", "target"),
    [
        ([3], [3, 0, 3, 0]),  # a target group without a class
        ([i for i in range(23) if i != 3], [3, 3, 3, 3]),  # the only class left is the target
        (list(range(21)), [21, 22, 21, 22]),  # fewer classes than k
    ],
    ids=["target", "rest", "most"],
)
@each(without_cross_entropy(LOSSES))
def test_groups_whose_classes_are_all_masked(case: Case, masked: list[int], target: list[int], path: Path) -> None:
    student, teacher, _ = make_inputs((4, 23))
    student[:, masked] = -INF
    teacher[:, masked] = -INF
    options = needed_target(case, torch.tensor(target))
    if len(masked) < 22:
        check(case, student, teacher, path, return_parts=True, **options)
        return
    # One class is left: neither a loss nor a gradient but what rounding leaves of their terms.
    got = measured(case.call, student, teacher, **path.options, **options)
    size = sum(term.scale * (sum(term.mass) + sum(map(sum, term.groups))) for term in case.objective.terms)
    assert got.loss.abs() <= 2e-6 * max(1.0, size)
    assert (got.gradient.abs() <= 2e-6 * size).all()
    assert got.gradient[:, masked].eq(0).all()


@pytest.mark.parametrize("classes", [3000, 40000])  # two tiles; several chunks, which threads share
@each(without_cross_entropy(SOME_LOSSES))
def test_a_vocabulary_that_is_nearly_all_masked(case: Case, classes: int, path: Path) -> None:
    """Whole vectors, tiles and chunks without a finite class, at either end and between the others."""
    student, teacher, target = make_inputs((2, classes), scale=2.0)
    kept = torch.tensor([classes // 2 + 1, classes // 2 + 9, classes - 40])
    masked = torch.ones(classes, dtype=torch.bool).scatter_(0, kept, False)
    student[:, masked] = -INF
    teacher[:, masked] = -INF
    check(case, student, teacher, path, **needed_target(case, kept[target % 3]))


@pytest.mark.parametrize("classes", [50, 5000])  # within a tile; tiles whose sums merge
@pytest.mark.parametrize("shape", ["low start", "rise", "fall"])
@each(SOME_LOSSES)
def test_a_maximum_far_from_the_first_classes(case: Case, shape: str, classes: int, path: Path) -> None:
    """Exponents must not be counted for good from what a row begins with: sums would overflow, or vanish."""
    student, teacher, target = make_inputs((3, classes), scale=2.0)
    if shape == "low start":
        student[:, :20] -= 1e4
        teacher[:, :20] -= 1e4
    else:
        ramp = torch.linspace(0, 2000, classes)
        ramp = ramp if shape == "rise" else ramp.flip(0)
        student += ramp
        teacher += ramp
    check_size(case, student, teacher, path, target)


@pytest.mark.parametrize("place", ["target", "other"])
@each(FORWARD)
def test_masked_in_the_teacher_only_forward(case: Case, place: str, path: Path) -> None:
    """The class adds nothing to a forward KL; its gradient is that of any class the teacher gives no chance."""
    student, teacher, target = make_inputs((4, 23))
    teacher.scatter_(1, (target if place == "target" else (target + 1) % 23)[:, None], -INF)
    got = check(case, student, teacher, path, **needed_target(case, target))
    assert got.loss.isfinite()


@each(REVERSE)
def test_masked_in_the_teacher_only_reverse(case: Case, path: Path) -> None:
    """The student gives a chance to what the teacher excludes: +inf, for that sample alone."""
    student, teacher, _ = make_inputs((4, 23))
    clean = measured(case.call, student, teacher, reduction="none", **path.options)
    teacher[2, 6] = -INF
    got = measured(case.call, student, teacher, reduction="none", **path.options)
    others = [0, 1, 3]
    assert got.loss[2] == INF
    assert torch.equal(got.loss[others], clean.loss[others])
    assert torch.equal(got.gradient[others], clean.gradient[others])
    assert measured(case.call, student, teacher, **path.options).loss == INF


@pytest.mark.parametrize("place", ["target", "other", "leader"])
@each(FORWARD)
def test_masked_in_the_student_only_forward(case: Case, place: str, path: Path) -> None:
    """The student excludes what the teacher gives a chance: +inf, and no NaN for the other classes."""
    student, teacher, target = make_inputs((4, 23), scale=2.0)
    clean = measured(case.call, student, teacher, reduction="none", **path.options, **needed_target(case, target))
    at = {"target": int(target[2]), "other": int(target[2] + 1) % 23, "leader": int(teacher[2].argmax())}[place]
    student[2, at] = -INF
    options = {"reduction": "none", **path.options, **needed_target(case, target)}
    got = measured(case.call, student, teacher, **options)
    assert got.loss[2] == INF
    others = [0, 1, 3]
    assert torch.equal(got.loss[others], clean.loss[others])
    assert torch.equal(got.gradient[others], clean.gradient[others])
    assert got.gradient[2, [i for i in range(23) if i != at]].isfinite().all()


def test_the_gradient_beside_a_class_that_only_the_student_masks(path: Path) -> None:
    """An infinite loss still has the forward KL's gradient, T * (p_student - p_teacher), for all other classes."""
    student, teacher, _ = make_inputs((4, 23))
    student[:, 6] = -INF
    got = measured(kdkernels.kd_loss, student, teacher, temperature=2.0, reduction="sum", **path.options)
    want = 2.0 * ((student.double() / 2).softmax(1) - (teacher.double() / 2).softmax(1))
    others = [i for i in range(23) if i != 6]
    assert_gradient(got.gradient[:, others], want[:, others], 2e-6)


@each(REVERSE)
def test_masked_in_the_student_only_reverse(case: Case, path: Path) -> None:
    """The class adds nothing to a reverse KL: finite loss, finite gradient."""
    student, teacher, _ = make_inputs((4, 23))
    student[:, 6] = -INF
    got = check(case, student, teacher, path)
    assert got.loss.isfinite()
    assert not got.gradient[:, 6].any()


def test_a_weight_of_zero_drops_an_infinite_direction(path: Path) -> None:
    student, teacher, _ = make_inputs((4, 23))
    student[:, 6] = -INF
    got = measured(kdkernels.bdd_loss, student, teacher, forward_weight=0.0, **path.options)
    assert_same(got, expected(objective.reverse_kd(4.0), student, teacher), student, teacher)
    student, teacher = teacher, student
    got = measured(kdkernels.bdd_loss, student, teacher, reverse_weight=0.0, **path.options)
    assert_same(got, expected(objective.kd(4.0), student, teacher), student, teacher)


# NaN ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "at"), [("student", 0), ("teacher", 22)])
@each(LOSSES)
def test_nan_stays_in_its_sample(case: Case, at: int, side: str, path: Path) -> None:
    student, teacher, target = make_inputs((4, 23))
    options = {"reduction": "none", **path.options, **needed_target(case, target)}
    clean = measured(case.call, student, teacher, **options)
    (student if side == "student" else teacher)[1, at] = torch.nan
    got = measured(case.call, student, teacher, **options)
    others = [0, 2, 3]
    assert got.loss.isnan().tolist() == [False, True, False, False]
    assert torch.equal(got.loss[others], clean.loss[others])
    assert torch.equal(got.gradient[others], clean.gradient[others])
    mean = measured(case.call, student, teacher, **options | {"reduction": "mean"})
    assert mean.loss.isnan()
    assert mean.gradient[others].isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_a_row_split_over_threads(side: str, path: Path) -> None:
    student, teacher, _ = make_inputs((1, 40000))
    (student if side == "student" else teacher)[0, 30001] = torch.nan
    for name in ("kd", "gdkd"):
        assert measured(LOSSES[name].call, student, teacher, **path.options).loss.isnan()


# Empty and single ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 23), (2, 23, 0, 4)], ids=name_of)
@each(SOME_LOSSES)
def test_no_sample(case: Case, shape: tuple[int, ...], reduction: str, path: Path) -> None:
    student, teacher, target = make_inputs(shape)
    options = {"reduction": reduction, **path.options, **needed_target(case, target)}
    got = measured(case.call, student, teacher, return_parts=True, **options)
    samples = (shape[0], *shape[2:])
    for value in (got.loss, *got.parts.values()):
        assert value.shape == (samples if reduction == "none" else ())
        assert value.eq(0).all()
    assert got.gradient.shape == shape


@each({name: case for name, case in LOSSES.items() if case.smallest == 1})
def test_one_class(case: Case, path: Path) -> None:
    """There is nothing to disagree about: exactly 0."""
    student, teacher, target = make_inputs((3, 1), scale=5.0)
    got = measured(case.call, student, teacher, return_parts=True, **path.options, **needed_target(case, target))
    for value in (got.loss, got.gradient, *got.parts.values()):
        assert value.eq(0).all()


@each(SOME_LOSSES)
def test_one_sample_without_a_batch_dimension(case: Case, path: Path) -> None:
    """1-d logits are one sample; its target is a 0-d tensor."""
    student, teacher, target = make_inputs((1, 23))
    options = {"reduction": "none", **needed_target(case, target[0])}
    want = expected(case.objective, student, teacher, torch.ones(1), reduction="none", **needed_target(case, target))
    got = measured(case.call, student[0], teacher[0], class_dim=0, **path.options, **options)
    assert got.loss.shape == ()
    assert_values(got.loss, want.loss[0], 2e-6)
    assert_gradient(got.gradient, want.gradient[0], 2e-6)


# Different class counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 23), (2, 23, 3)], ids=name_of)
@pytest.mark.parametrize(("student_extra", "teacher_extra"), [(0, 9), (9, 0), (3, 9), (9, 3)])
@each(SOME_LOSSES)
def test_num_classes(case: Case, shape: tuple[int, ...], student_extra: int, teacher_extra: int, path: Path) -> None:
    """Padding of a vocabulary is not read, not even if it holds NaN or leads the teacher; its gradient is 0."""
    student, teacher, target = make_inputs(shape)
    want = expected(case.objective, student, teacher, **needed_target(case, target))

    def padded(logits: Tensor, extra: int, value: float) -> Tensor:
        return torch.cat([logits, torch.full((shape[0], extra, *shape[2:]), value)], 1)

    student = padded(student, student_extra, torch.nan)
    teacher = padded(teacher, teacher_extra, 1e6)
    got = measured(
        case.call, student, teacher, num_classes=23, return_parts=True, **path.options, **needed_target(case, target)
    )
    assert got.gradient.shape == student.shape
    assert not got.gradient[:, 23:].any()
    assert_same(got._replace(gradient=got.gradient[:, :23]), want, student, teacher)


def test_num_classes_of_all_classes_changes_nothing(path: Path) -> None:
    student, teacher, _ = make_inputs((5, 23))
    want = measured(kdkernels.gdkd_loss, student, teacher, **path.options)
    got = measured(kdkernels.gdkd_loss, student, teacher, num_classes=23, **path.options)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradient, want.gradient)


# Extreme logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@each(LOSSES)
def test_logits_of_ten_thousand(case: Case, dtype: torch.dtype, path: Path) -> None:
    student, teacher, target = make_inputs((4, 23), dtype, scale=3000.0)
    got = measured(case.call, student, teacher, **path.options, **needed_target(case, target))
    assert got.loss.isfinite()
    assert got.gradient.isfinite().all()
    check_size(case, student, teacher, path, target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize(("up", "down"), [(1e4, 0.0), (-1e4, 1e4)])
@each(LOSSES)
def test_offsets_between_student_and_teacher(
    case: Case, up: float, down: float, dtype: torch.dtype, path: Path
) -> None:
    """A softmax does not see a constant added to all logits, so neither may the loss.

    The logits are multiples of 1/64, so that adding the constant is exact.
    """
    student, teacher, target = make_inputs((4, 23), torch.float64)
    student, teacher = ((logits * 64).round() / 64 for logits in (student, teacher))
    want = expected(case.objective, student, teacher, **needed_target(case, target))
    student, teacher = (student + up).to(dtype), (teacher + down).to(dtype)
    got = measured(case.call, student, teacher, **path.options, **needed_target(case, target))
    # The float64 reference itself rounds at 1e4 * 2^-53 * T^2 here.
    assert_values(got.loss, want.loss, loss_tolerance(got.loss, want.weight) if dtype == torch.float32 else 1e-9)
    assert_gradient(got.gradient, want.gradient, 2e-6 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("both", [False, True], ids=["student", "both"])
@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each(without_cross_entropy({name: case for name, case in LOSSES.items() if case.needs_target}))
def test_a_target_far_from_the_rest(case: Case, dtype: torch.dtype, gap: float, both: bool, path: Path) -> None:
    """The other group's mass underflows; its inner divergence must not. Known to give 0 * inf and log(0)."""
    student, teacher, target = make_inputs((4, 23), dtype, scale=2.0)
    for logits in (student, teacher) if both else (student,):
        logits.scatter_(1, target[:, None], gap)
    got = check(case, student, teacher, path, target=target, return_parts=True)
    assert got.loss.isfinite()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("dtype", "gap"), [(torch.float16, 18.0), (torch.bfloat16, 100.0), (torch.float32, 110.0)], ids=name_of
)
def test_log_of_an_underflowed_mass(dtype: torch.dtype, gap: float, temperature: float, sign: int, path: Path) -> None:
    """Where the pasted formula takes log(0) in the logits' precision."""
    student, teacher, target = make_inputs((4, 23), dtype, scale=1.0)
    student.scatter_(1, target[:, None], sign * gap * temperature)
    value = objective.dkd(1.0, 8.0, temperature)
    got = measured(
        kdkernels.dkd_loss, student, teacher, target=target, temperature=temperature, return_parts=True, **path.options
    )
    assert_same(got, expected(value, student, teacher, target=target), student, teacher)


@pytest.mark.parametrize("target_logit", [-4e4, -1e3, 1e3, 4e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_mask_leaks_into_the_rest(dtype: torch.dtype, target_logit: float, path: Path) -> None:
    """NCKD does not depend on the target's logit. A mask of -1000 does, once the gap / T passes 1000."""
    student, teacher, target = make_inputs((4, 23), dtype, scale=2.0)
    _, rest = literal.target_groups(teacher, target)
    want = literal.kl(literal.only(student, rest).double(), literal.only(teacher, rest).double(), 1.0).mean()
    for logits in (student, teacher):
        logits.scatter_(1, target[:, None], target_logit)
    got = measured(
        kdkernels.dkd_loss, student, teacher, target=target, alpha=0.0, beta=1.0, temperature=1.0, **path.options
    )
    assert_values(got.loss, want, 2e-6 if arithmetic_dtype(student, teacher) == torch.float32 else 1e-12)
    assert not got.gradient[~rest].any()


@each(FORWARD)
def test_half_precision_sums_over_65504(case: Case, path: Path) -> None:
    student, teacher, target = make_inputs((300, 23), torch.float16, scale=40.0)
    got = check(case, student, teacher, path, reduction="sum", **needed_target(case, target))
    assert 65504 < got.loss < INF


# Layouts ------------------------------------------------------------------------------------------------------------

SAMPLES = 24


def _nchw(logits: Tensor) -> Tensor:
    return logits.view(2, 3, 4, -1).permute(0, 3, 1, 2)


def _inside(logits: Tensor, storage: Tensor, *index: slice) -> Tensor:
    """A view into larger storage that holds the logits, with NaN in between."""
    view = storage.fill_(torch.nan)[index]
    view.copy_(logits)
    return view


#: Name -> the class dimension and how to lay out (24, C) logits.
LAYOUTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "NC": (1, lambda x: x),
    "CN": (0, lambda x: x.t().contiguous()),
    "transposed": (1, lambda x: x.t().contiguous().t()),
    "NCHW": (1, lambda x: _nchw(x).contiguous()),
    "NHWC": (-1, lambda x: x.view(2, 3, 4, -1)),
    "channels_last": (1, lambda x: _nchw(x).contiguous(memory_format=torch.channels_last)),
    "BTV": (-1, lambda x: x.view(4, 6, -1)),
    "BVT": (-2, lambda x: x.view(4, 6, -1).transpose(1, 2).contiguous()),
    "VBT": (0, lambda x: x.view(4, 6, -1).permute(2, 0, 1).contiguous()),
    "NCDHW": (1, lambda x: x.view(2, 2, 3, 2, -1).permute(0, 4, 1, 2, 3).contiguous()),
    "permuted": (1, lambda x: _nchw(x).permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)),  # samples do not merge
    "sliced": (1, lambda x: _inside(x, x.new_empty(30, x.shape[1] + 9), slice(3, 27), slice(5, x.shape[1] + 5))),
    "steps": (1, lambda x: _inside(x, x.new_empty(48, 2 * x.shape[1]), slice(0, 48, 2), slice(1, None, 2))),
    "misaligned": (1, lambda x: _inside(x.flatten(), x.new_empty(x.numel() + 1), slice(1, None)).view(x.shape)),
    "cropped": (
        1,
        lambda x: _inside(
            _nchw(x), x.new_empty(3, x.shape[1] + 2, 5, 7), slice(2), slice(1, -1), slice(3), slice(2, 6)
        ),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("classes", [23, 130])  # one vector and a tail; more than the tile of a strided class dimension
@pytest.mark.parametrize("layout", LAYOUTS)
@each({name: LOSSES[name] for name in ("gdkd", "everything")})
def test_layouts(case: Case, layout: str, classes: int, dtype: torch.dtype, path: Path) -> None:
    """Whatever the strides and the place of the class dimension: the result of contiguous (N, C) logits."""
    student, teacher, target = make_inputs((SAMPLES, classes), dtype)
    weight = torch.arange(SAMPLES) % 5 / 4
    upstream = torch.arange(SAMPLES) % 7 / 8 + 0.5
    want = expected(case.objective, student, teacher, upstream, target=target, sample_weight=weight, reduction="none")
    class_dim, lay_out = LAYOUTS[layout]
    laid = lay_out(student)
    samples = laid.movedim(class_dim, -1).shape[:-1]
    got = measured(
        case.call,
        laid,
        lay_out(teacher),
        upstream.view(samples).to(arithmetic_dtype(student, teacher)),
        target=target.view(samples),
        sample_weight=weight.view(samples),
        reduction="none",
        class_dim=class_dim,
        **path.options,
    )
    assert got.loss.shape == samples
    assert got.gradient.shape == laid.shape
    gradient = got.gradient.movedim(class_dim, -1).reshape(SAMPLES, classes)
    assert_same(got._replace(loss=got.loss.flatten(), gradient=gradient), want, student, teacher)


@pytest.mark.parametrize("layouts", [("NCHW", "channels_last"), ("channels_last", "cropped"), ("permuted", "NCHW")])
def test_student_and_teacher_laid_out_differently(layouts: tuple[str, str], path: Path) -> None:
    student, teacher, target = make_inputs((SAMPLES, 23))
    want = expected(objective.dkd(), student, teacher, target=target)
    laid = [LAYOUTS[layout][1](logits) for layout, logits in zip(layouts, (student, teacher), strict=True)]
    got = measured(kdkernels.dkd_loss, *laid, target=target.view(2, 3, 4), **path.options)
    assert_values(got.loss, want.loss, 2e-6)
    assert_gradient(got.gradient.movedim(1, -1).reshape(SAMPLES, -1), want.gradient, 2e-6)


@pytest.mark.parametrize("which", ["samples", "classes", "teacher", "pixels"])
@each({name: LOSSES[name] for name in ("kd", "gdkd", "everything")})
def test_expanded_inputs(case: Case, which: str, path: Path) -> None:
    """Strides of 0."""
    student, teacher, target = make_inputs((6, 23))
    if which == "samples":
        student, teacher = student[:1].expand(6, -1), teacher[:1].expand(6, -1)
    elif which == "classes":
        student = student[:, :1].expand(-1, 23)
    elif which == "teacher":
        teacher = teacher[:1].expand(6, -1)
    else:
        student, teacher = (logits[:, :, None].expand(-1, -1, 2) for logits in (student, teacher))
        target = target[:, None].expand(-1, 2)
    check(case, student, teacher, path, **needed_target(case, target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_copied(layout: str, native_path: Path) -> None:
    """Kernels follow the strides: without a gradient, nothing near the logits' size is allocated."""
    class_dim, lay_out = LAYOUTS[layout]
    student, teacher, _ = make_inputs((SAMPLES, 2000))
    student, teacher = lay_out(student), lay_out(teacher)
    sizes = allocations(lambda: kdkernels.gdkd_loss(student, teacher, class_dim=class_dim, **native_path.options))
    assert sizes
    assert max(sizes) < student.numel()  # a quarter of the logits' bytes


def test_num_classes_copies_nothing(native_path: Path) -> None:
    student, teacher, _ = make_inputs((SAMPLES, 2000))
    sizes = allocations(
        lambda: kdkernels.gdkd_loss(student, teacher[:, :1900], num_classes=1800, **native_path.options)
    )
    assert max(sizes) < student.numel()


@pytest.mark.parametrize(
    ("shape", "strides", "class_dim"),
    [
        ((6, 5), (2**29, 64), 1),  # 5 * 2^29 elements to the last sample
        ((5, 6), (2**30, 64), 0),  # 2^32 elements to the last class
        ((2, 5, 3), (64, 8, 2**31), 1),  # 2^32 elements to the last pixel
        ((3, 5, 2), (2**31, 8, 64), 1),
    ],
    ids=["samples", "classes", "pixels", "images"],
)
def test_offsets_of_more_than_32_bits(
    shape: tuple[int, ...], strides: tuple[int, ...], class_dim: int, native_path: Path
) -> None:
    """Strides reach past 2^31 elements; the memory in between is never touched, so it costs nothing."""
    storage = torch.from_numpy(np.zeros(2**32 + 4096, dtype=np.float16)).to(torch.get_default_device())
    student, teacher, target = make_inputs((6, 5), torch.float16)
    far = [storage.as_strided(shape, strides, offset) for offset in (0, 1)]
    samples = far[0].movedim(class_dim, -1).shape[:-1]
    for view, logits in zip(far, (student, teacher), strict=True):
        view.copy_(logits.view(*samples, 5).movedim(-1, class_dim))
    want = expected(objective.dkd(), student, teacher, target=target)
    options = {"target": target.view(samples), "class_dim": class_dim, **native_path.options}
    got = measured(kdkernels.dkd_loss, *far, **options)
    assert_values(got.loss, want.loss, 2e-6)
    assert_gradient(got.gradient.movedim(class_dim, -1).reshape(6, 5), want.gradient, 5e-4)


@pytest.mark.skipif(INTERPRETED, reason="2^31 elements take Triton's interpreter an hour")
def test_more_than_two_to_the_31_elements(native_path: Path) -> None:
    """Counted, not stored: one row, expanded. Every sample has the loss of that row."""
    student, teacher, _ = make_inputs((1, 2**15), torch.bfloat16)
    samples = 2**16 + 3
    options = {"reduction": "none", **native_path.options}
    want = kdkernels.kd_loss(student, teacher, **options)
    got = kdkernels.kd_loss(student.expand(samples, -1), teacher.expand(samples, -1), **options)
    assert torch.equal(got, want.expand(samples))


# Determinism --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 40000), (2, 40000), (1, 300_001), (64, 1000), (3, 2049), (4, 19, 30, 31)], ids=name_of
)
@each(SOME_LOSSES)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_for_any_number_of_threads(case: Case, shape: tuple[int, ...], cpu_path: Path) -> None:
    student, teacher, target = make_inputs(shape)
    outcomes = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        outcomes.append(
            measured(case.call, student, teacher, return_parts=True, **cpu_path.options, **needed_target(case, target))
        )
    for outcome in outcomes[1:]:
        assert torch.equal(outcome.loss, outcomes[0].loss)
        assert torch.equal(outcome.gradient, outcomes[0].gradient)
        for name, part in outcome.parts.items():
            assert torch.equal(part, outcomes[0].parts[name]), name


def test_the_same_bits_from_several_threads_at_once(native_path: Path) -> None:
    """Callers share no state: as in data loading, pipelines and torch's own backward threads."""
    batches = [make_inputs((16, 1000), seed=seed) for seed in range(4)]

    def work(seed: int) -> Outcome:
        student, teacher, target = batches[seed % 4]
        return measured(LOSSES["everything"].call, student, teacher, target=target, **native_path.options)

    alone = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for seed, outcome in enumerate(pool.map(work, range(40))):
            assert torch.equal(outcome.loss, alone[seed % 4].loss)
            assert torch.equal(outcome.gradient, alone[seed % 4].gradient)


@each(SOME_LOSSES)
def test_a_sample_does_not_see_its_batch(case: Case, native_path: Path) -> None:
    """A row's loss and gradient are the same bits in any batch, whatever row stands next to it."""
    student, teacher, target = make_inputs((9, 1000))
    options = {"reduction": "none", **native_path.options}
    upstream = torch.ones(9)
    whole = measured(case.call, student, teacher, upstream, **options, **needed_target(case, target))
    for rows in (slice(4, 5), slice(3, 9)):
        part = measured(
            case.call, student[rows], teacher[rows], upstream[rows], **options, **needed_target(case, target[rows])
        )
        assert torch.equal(part.loss, whole.loss[rows])
        assert torch.equal(part.gradient, whole.gradient[rows])


@each(SOME_LOSSES)
def test_fused_and_recomputed_gradients_agree(case: Case, native_path: Path) -> None:
    """To rounding, also where half of the samples are ignored."""
    inputs: Inputs = make_inputs((8, 300))
    inputs.target[::2] = -100
    fused, recomputed = (
        measured(
            case.call, inputs.student, inputs.teacher, target=inputs.target, backend=native_path.backend, mode=mode
        )
        for mode in ("fused", "recompute")
    )
    assert torch.equal(fused.loss, recomputed.loss)
    assert_gradient(recomputed.gradient, fused.gradient, 1e-6)


@each(SOME_LOSSES)
def test_inputs_are_left_alone(case: Case, path: Path) -> None:
    student, teacher, target = make_inputs((5, 23))
    target[2] = -100
    weight = torch.rand(5)
    tensors = (student, teacher, target, weight)
    before = [tensor.clone() for tensor in tensors]
    measured(case.call, student, teacher, target=target, sample_weight=weight, **path.options)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_a_loss_without_weights_has_no_gradient(path: Path) -> None:
    """0, and not a missing graph: weights may be scheduled."""
    student, teacher, _ = make_inputs((3, 23))
    got = measured(kdkernels.bdd_loss, student, teacher, forward_weight=0.0, reverse_weight=0.0, **path.options)
    assert got.loss == 0
    assert got.gradient.eq(0).all()


# Weights of the terms, and numbers of every kind ----------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.25, 2.5, 0])
@pytest.mark.parametrize("square", [True, False], ids=["squared", "plain"])
@each(SOME_LOSSES | {name: STANDARDIZED[name] for name in ("pr_dkd", "ls_gdkd")})
def test_weight_and_square_temperature(case: Case, square: bool, weight: float, path: Path) -> None:
    """``weight`` multiplies the terms, not the cross entropy and no part; without T^2 the parts have none either."""
    student, teacher, target = make_inputs((5, 23))
    options = {"target": target, "return_parts": True}
    terms = tuple(
        objective.Term(
            term.temperature,
            term.partition,
            term.mass,
            term.groups,
            square_temperature=term.square_temperature and square,
        )
        for term in case.objective.terms
    )
    base = case.objective
    kept = objective.Objective(terms, base.standardize, base.correction, base.eps, ce_weight=0.5)
    plain = expected(kept, student, teacher, target=target)
    without = expected(objective.adjust(kept, ce_weight=0.0), student, teacher, target=target)
    got = measured(
        case.call, student, teacher, weight=weight, square_temperature=square, ce_weight=0.5, **options, **path.options
    )
    rest = (plain.loss - without.loss, plain.gradient - without.gradient)
    want = Outcome(rest[0] + weight * without.loss, rest[1] + weight * without.gradient, plain.parts)
    assert_same(got, want, student, teacher)
    assert set(got.parts) == set(plain.parts)


def test_a_blend_of_cross_entropy_and_distillation(path: Path) -> None:
    """alpha * CE + (1 - alpha) * T^2 * KL, as training scripts write it."""
    student, teacher, target = make_inputs((5, 23))
    a, b = student.double().requires_grad_(), teacher.double()
    kl = torch.nn.functional.kl_div((a / 2).log_softmax(1), (b / 2).softmax(1), reduction="batchmean") * 4
    want = 0.3 * torch.nn.functional.cross_entropy(a, target) + 0.7 * kl
    got = kdkernels.kd_loss(student, teacher, 2.0, target=target, weight=0.7, ce_weight=0.3, **path.options)
    assert_values(got, want.detach(), 2e-6)


KINDS_OF_NUMBER = {
    "float32": np.float32,
    "float64": np.float64,
    "int64": np.int64,
    "uint8": np.uint8,
    "array": np.array,
    "tensor": torch.tensor,
    "half": lambda value: torch.tensor(value, dtype=torch.float16),
}


@pytest.mark.parametrize("kind", KINDS_OF_NUMBER)
@each({name: LOSSES[name] for name in ("kd", "bdd", "dkd", "gdkd", "gdkd3")})
def test_numbers_of_every_kind(case: Case, kind: str) -> None:
    """NumPy scalars, 0-d arrays and 0-d tensors give what Python's numbers give."""
    student, teacher, target = make_inputs((5, 23))
    number = KINDS_OF_NUMBER[kind]
    values = {"temperature": 3, "alpha": 2, "w0": 2, "w2": 5, "forward_weight": 2, "reverse_temperature": 3}
    function = LOSS_ROWS[case.name].function
    values = {name: value for name, value in values.items() if name in LOSS_ROWS[case.name].module.parameter_names}
    values |= {"weight": 2, "ce_weight": 3, "denominator": 4, "eps": 1}
    whole = {"correction": 2, "class_dim": 1, "ignore_index": 7, "num_classes": 20}
    whole |= {"k": 3} if case.name.startswith("gdkd") else {}
    options = {"target": target % 20, "standardize": "sample"}
    want = function(student, teacher, **options, **values, **whole)
    of_kind = {name: number(value) for name, value in values.items()}
    integers = {
        name: (np.int32 if kind in ("float32", "float64", "half", "uint8") else number)(value)
        for name, value in whole.items()
    }
    with torch.device("cpu"):
        assert torch.equal(function(student, teacher, **options, **of_kind, **integers), want)


def test_a_tensor_that_changes_between_calls() -> None:
    """What was computed for an earlier value is not remembered for the tensor."""
    student, teacher, _ = make_inputs((5, 23))
    temperature, weight = torch.tensor(4.0), torch.tensor(1.0)
    for _ in range(3):
        got = kdkernels.kd_loss(student, teacher, temperature, weight=weight)
        assert got == kdkernels.kd_loss(student, teacher, temperature.item(), weight=weight.item())
        temperature.mul_(0.5)
        weight.mul_(0.5)


# The class dimension of tokens ----------------------------------------------------------------------------------------


def class_dim_warnings(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch, times: int = 2) -> list[str]:
    monkeypatch.setattr(validation, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            call()
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def compiled_kd(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.compile(kdkernels.kd_loss, fullgraph=True, backend="eager")(student, teacher)


@pytest.mark.parametrize("loss", [kdkernels.kd_loss, kdkernels.KDLoss(), kdkernels.GDKDLoss(2), compiled_kd])
def test_logits_of_tokens_without_class_dim(loss: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dimension 1 may be the tokens: said once, at the caller's line."""
    student, teacher, _ = make_inputs((2, 7, 5))
    said = class_dim_warnings(lambda: loss(student, teacher), monkeypatch)
    assert len(said) == 1
    assert "dimension 1 is taken for the classes" in said[0]
    assert "class_dim=-1" in said[0]


def test_no_warning_where_the_class_dim_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, target = make_inputs((2, 7, 5))
    module = kdkernels.KDLoss(class_dim=1)
    for call in (
        lambda: kdkernels.kd_loss(student, teacher, class_dim=1),
        lambda: kdkernels.kd_loss(student, teacher, class_dim=-1),
        lambda: kdkernels.kd_loss(student, teacher, target=target),
        lambda: kdkernels.kd_loss(student[0].T, teacher[0].T),
        lambda: kdkernels.kd_loss(student[None], teacher[None]),
        lambda: module(student, teacher),
    ):
        assert class_dim_warnings(call, monkeypatch) == []
