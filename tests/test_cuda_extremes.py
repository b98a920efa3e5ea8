"""The CUDA backend on extreme logits, masks and upstream gradients: right values, from the float64 reference.

Where a value is known to be wrong, its test is expected to fail, strictly: it says so once it is right.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cuda_targets import FIRST, LAST, check, missing, run
from helpers import (
    LOSS_TOLERANCE,
    Path,
    arithmetic_dtype,
    assert_gradient,
    assert_values,
    expected,
    make_inputs,
    must_have_native,
    name_of,
)
from losses import Case
from torch import Tensor

from kdkernels import Objective, distillation_loss, objective

FUSED, RECOMPUTE = Path("cuda", "fused"), Path("cuda", "recompute")
MASKED, LOWEST = -torch.inf, torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def backend_is_there() -> None:
    reason = missing()
    if reason is not None:
        (pytest.fail if must_have_native() else pytest.skip)(reason)


def case_of(value: Objective) -> Case:
    """A loss by its objective."""
    return Case("", value, partial(distillation_loss, objective=value), ())


def as_pixels(logits: Tensor) -> Tensor:
    """Rows ``(N, C)`` as one image ``(1, C, N)``: the classes of a sample are apart in memory."""
    return logits.t().contiguous().unsqueeze(0)


LAYOUTS = pytest.mark.parametrize("pixels", [False, True], ids=["rows", "pixels"])


# Masks of -inf in the teacher --------------------------------------------------------------------------------------

REVERSE = {
    "target alone": objective.dkd(kl_type="reverse"),
    "target alone, both": objective.dkd(kl_type="both"),
    "two groups": objective.gdkd(2, 1.0, 0.0, 8.0, 4.0, "worst", "reverse"),
    "three groups": objective.gdkd3(3, 1.0, 0.0, 8.0, 4.0, "worst", "reverse"),
}


@LAYOUTS
@pytest.mark.parametrize("path", [FUSED, RECOMPUTE], ids=lambda path: path.mode)
@pytest.mark.parametrize("name", REVERSE)
def test_masked_in_the_teacher_outside_of_the_reverse_divergence(name: str, path: Path, pixels: bool) -> None:
    """The class is in a group whose divergence has no weight, or that has it alone: its infinite gap takes no part."""
    student, teacher, target = make_inputs((3, 6))
    teacher[:, 1] = MASKED
    target[:] = 1
    if pixels:
        student, teacher, target = as_pixels(student), as_pixels(teacher), target.unsqueeze(0)
    check(case_of(REVERSE[name]), student, teacher, path, LAST, return_parts=False, target=target)


# Upstream gradients of samples that do not count -------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("path", [FUSED, RECOMPUTE], ids=lambda path: path.mode)
def test_upstream_of_samples_that_do_not_count(path: Path, pixels: bool) -> None:
    """An upstream gradient of infinity or NaN leaves no trace where a sample is ignored or weighs nothing, nor in
    classes that are not compared."""
    student, teacher, target = make_inputs((5, 9))
    target = target.clamp(max=6)
    weight, upstream = torch.ones(5), torch.tensor([1.0, torch.inf, torch.nan, 2.0, -torch.inf])
    target[1] = target[2] = -100
    weight[4] = 0.0
    if pixels:
        student, teacher, target = as_pixels(student), as_pixels(teacher), target.unsqueeze(0)
        weight, upstream = weight.unsqueeze(0), upstream.unsqueeze(0)
    options = {"target": target, "sample_weight": weight, "num_classes": 7, "reduction": "none"}
    case = case_of(objective.dkd())
    got, _ = run(case, student, teacher, path, LAST, upstream, **options)
    want = expected(case.objective, student, teacher, upstream.nan_to_num(0.0, 0.0, 0.0), **options)
    assert_gradient(got.gradient, want.gradient, 2e-6)
    gradient = got.gradient[0].t() if pixels else got.gradient
    assert gradient[[1, 2, 4]].eq(0).all()
    assert gradient[:, 7:].eq(0).all()


@LAYOUTS
def test_a_target_that_only_masks(pixels: bool) -> None:
    """Its labels are not looked up: they may be those of another set of classes."""
    student, teacher, _ = make_inputs((5, 9))
    target = torch.tensor([3, 1000, -100, -7, 9])
    if pixels:
        student, teacher, target = as_pixels(student), as_pixels(teacher), target.unsqueeze(0)
    check(case_of(objective.kd()), student, teacher, FUSED, LAST, return_parts=False, target=target)


# Large and small logits --------------------------------------------------------------------------------------------

#: A sample each.
OFFSETS = torch.tensor([[0.0], [3e2], [1e4], [-3e4], [1e6]])
CE = {
    "plain": objective.adjust(objective.kd(4.0), ce_weight=1.0),
    "by rank": objective.adjust(objective.gdkd(2), ce_weight=1.0),
    "by sample": objective.adjust(objective.lskd(), ce_weight=1.0),
}


def check_entropy(value: Objective, student: Tensor, teacher: Tensor, target: Tensor, arch: int = LAST) -> None:
    """The cross entropy and the gradient of each sample: offsets change neither."""
    options = {"target": target, "reduction": "none"}
    want = expected(value, student, teacher, torch.ones_like(target, dtype=torch.float64), **options)
    upstream = torch.ones(target.shape, dtype=arithmetic_dtype(student, teacher))
    got, _ = run(case_of(value), student, teacher, FUSED, arch, upstream, return_parts=True, **options)
    assert_values(got.parts["ce"], want.parts["ce"], 2 * LOSS_TOLERANCE[got.loss.dtype], "cross entropy")
    assert_gradient(got.gradient, want.gradient, 1e-5)


@pytest.mark.parametrize("name", CE)
@pytest.mark.parametrize("pixels", [False, True], ids=["rows", "pixels"])
def test_cross_entropy_far_from_zero(name: str, pixels: bool) -> None:
    student, teacher, target = make_inputs((5, 12))
    student = (student * 16).round() / 16 + OFFSETS  # no offset rounds these
    if pixels:
        student, teacher, target = as_pixels(student), as_pixels(teacher), target.unsqueeze(0)
    check_entropy(CE[name], student, teacher, target)


def test_cross_entropy_far_from_zero_in_split_rows() -> None:
    student, teacher, target = make_inputs((2, 33001))
    student = (student * 16).round() / 16 + 1e4
    check_entropy(CE["plain"], student, teacher, target, FIRST)


@pytest.mark.parametrize("shape", [(5, 70), (1, 12, 5)], ids=name_of)
def test_cross_entropy_far_from_zero_of_standardised_classes(shape: tuple[int, ...]) -> None:
    student, teacher, target = make_inputs(shape)
    student = (student * 16).round() / 16 + 1e4
    value = objective.adjust(objective.pr_kd(), ce_weight=1.0)
    check(case_of(value), student, teacher, FUSED, LAST, return_parts=False, target=target)


@pytest.mark.parametrize("pixels", [False, True], ids=["rows", "pixels"])
def test_cross_entropy_far_from_zero_of_a_thread_a_sample(pixels: bool) -> None:
    """Loss alone, as a user asks for it: pixels are a thread each then."""
    student = torch.full((5, 8), 1.0) + OFFSETS
    teacher, target = torch.zeros(5, 8), torch.arange(5)
    if pixels:
        student, teacher, target = as_pixels(student), as_pixels(teacher), target.unsqueeze(0)
    check(case_of(CE["plain"]), student, teacher, FUSED, LAST, return_parts=False, target=target)


#: All classes but one at some large negative number, a sample each.
ALL_BUT_ONE = torch.tensor([-1e9, -1e10, LOWEST])[:, None].repeat(1, 4).index_fill(1, torch.tensor(1), 1.0)


@LAYOUTS
def test_all_classes_but_one_are_masked(pixels: bool) -> None:
    student, target = ALL_BUT_ONE, torch.tensor([1, 1, 1])
    if pixels:
        student, target = as_pixels(student), target.unsqueeze(0)
    value = objective.adjust(objective.kd(3.7), ce_weight=1.0)
    got, _ = run(case_of(value), student, student, FUSED, LAST, target=target)
    assert got.loss == 0
    assert got.gradient.eq(0).all()


HUGE = {
    "all alike": (objective.kd(1.0), torch.full((1, 4), 1e10), torch.tensor([[0.0, 0.0, 0.0, 1.0]])),
    "a masked rest": (
        objective.dkd(temperature=3.7),
        torch.tensor([[-3e11, 1.0, -3e11, -3e11]]),
        torch.tensor([[-3e11, 1.0, -3e11, -2e11]]),
    ),
}


@pytest.mark.xfail(
    strict=True, reason="a term's exponents count from a rounded product: it may be far off where logits are huge"
)
@pytest.mark.parametrize("name", HUGE)
def test_huge_logits(name: str) -> None:
    """Differences are all that counts, however large a group's logits are."""
    value, student, teacher = HUGE[name]
    check(case_of(value), student, teacher, FUSED, LAST, return_parts=False, target=torch.tensor([1]))


@LAYOUTS
def test_masks_by_the_lowest_number_of_standardised_samples(pixels: bool) -> None:
    """They are finite logits, far down: a sample's deviation is theirs, and no square of it is a float32."""
    student, teacher, _ = make_inputs((4, 7), scale=1.0)
    for logits in (student, teacher):
        logits[:3, 5:] = torch.tensor([[-1e18], [-1e20], [LOWEST]])
    if pixels:
        student, teacher = as_pixels(student), as_pixels(teacher)
    check(case_of(objective.lskd()), student, teacher, FUSED, LAST, return_parts=False, reduction="none")


def test_masks_by_the_lowest_number_in_split_samples() -> None:
    student, teacher, _ = make_inputs((2, 33001), scale=1.0)
    for logits in (student, teacher):
        logits[0, 30000:] = LOWEST
    check(case_of(objective.lskd()), student, teacher, FUSED, FIRST, return_parts=False)


@pytest.mark.parametrize("size", [1e-20, 1e-25])
def test_small_logits_of_standardised_samples(size: float) -> None:
    """Without eps the scale of a sample's logits does not matter, though their squares underflow."""
    student, teacher, _ = make_inputs((4, 7), scale=1.0)
    value = objective.adjust(objective.lskd(), eps=0.0)
    want = expected(value, student * size, teacher * size)
    got, _ = run(case_of(value), student * size, teacher * size, FUSED, LAST)
    assert_values(got.loss, want.loss, 2 * LOSS_TOLERANCE[got.loss.dtype])
    assert_gradient(got.gradient.double() * size, want.gradient * size, 4e-6)


@pytest.mark.xfail(strict=True, reason="squares of a class's deviations are added up in float32, which these leave")
@pytest.mark.parametrize("extreme", ["lowest number", "tiny"])
def test_extremes_of_standardised_classes(extreme: str) -> None:
    student, teacher, _ = make_inputs((4, 7), scale=1.0)
    value = objective.pr_kd()
    if extreme == "tiny":
        student, teacher = student * 1e-25, teacher * 1e-25
        value = objective.adjust(value, eps=0.0)
    else:
        student[1, 3] = teacher[1, 3] = LOWEST
    want = expected(value, student, teacher)
    got, _ = run(case_of(value), student, teacher, FUSED, LAST)
    assert_values(got.loss, want.loss, 2 * LOSS_TOLERANCE[got.loss.dtype])
    assert_gradient(got.gradient, want.gradient, 4e-6)


# Many leading classes ----------------------------------------------------------------------------------------------


@LAYOUTS
def test_as_many_leading_classes_as_there_may_be(pixels: bool) -> None:
    """On a GPU of little shared memory a block is all theirs."""
    student, teacher, _ = make_inputs((1, 1025))
    if pixels:
        student, teacher = as_pixels(student), as_pixels(teacher)
    k = 1024
    value = objective.gdkd(k)
    limits = {"shared_bytes": 101376, "shared_bytes_of_all": 102400, "multiprocessors": 84}
    sim = check(case_of(value), student, teacher, RECOMPUTE, FIRST, limits=limits, return_parts=False)
    assert sim is None or all(launch.shared_bytes <= 101376 for launch in sim.log)
