"""The oracle on its own: against the papers' formulas, closed forms, and torch's losses, all in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import literal
import pytest
import torch
import torch.nn.functional as F
from helpers import expected, make_inputs, upstream_like
from losses import LOSSES, Case, each
from torch import Tensor

import kdkernels
from kdkernels import objective, reference
from kdkernels.objective import TARGET, WHOLE, Objective, Partition, Term

INPUTS = make_inputs((6, 11), torch.float64, scale=2.0)
PARTITIONS = [
    WHOLE,
    TARGET,
    Partition("topk", 1),
    Partition("topk", 4),
    Partition("topk", 4, largest=False),
    Partition("topk", 10),  # one class is left for the rest
    Partition("top1_topk", 2),
    Partition("top1_topk", 5),
    Partition("top1_topk", 5, largest=False),
]

S, T, Y = INPUTS
LITERAL: dict[str, tuple[Objective, Callable[[Tensor], Tensor]]] = {
    "kd": (objective.kd(3.0), lambda s: literal.kl(s, T, 3.0)),
    "reverse_kd": (objective.reverse_kd(3.0), lambda s: literal.kl(s, T, 3.0, "reverse")),
    "symmetric_kd": (objective.symmetric_kd(3.0), lambda s: literal.kl(s, T, 3.0, "both")),
    "bdd": (
        objective.bdd(0.5, 1.5, 4.0, 2.0),
        lambda s: 0.5 * literal.kl(s, T, 4.0) + 1.5 * literal.kl(s, T, 2.0, "reverse"),
    ),
    "kd_unscaled": (
        Objective((Term(3.0, WHOLE, square_temperature=False),)),
        lambda s: literal.kl(s, T, 3.0) / 9.0,
    ),
    "kd_ce": (
        objective.adjust(objective.kd(3.0), ce_weight=0.3),
        lambda s: literal.kl(s, T, 3.0) + 0.3 * F.cross_entropy(s, Y, reduction="none"),
    ),
    **{
        f"dkd_{kl_type}": (
            objective.dkd(0.7, 5.0, 2.0, kl_type),
            lambda s, kl_type=kl_type: literal.dkd(s, T, literal.target_groups(T, Y), 0.7, 5.0, 2.0, kl_type)[0],
        )
        for kl_type in ("forward", "reverse", "both")
    },
    "dkd_top1": (
        objective.dkd_top1(0.7, 5.0, 2.0),
        lambda s: literal.dkd(s, T, literal.top_groups(T, 1), 0.7, 5.0, 2.0, "forward")[0],
    ),
    **{
        f"gdkd_{k}_{strategy}_{kl_type}": (
            objective.gdkd(k, 0.5, 2.0, 6.0, 3.0, strategy, kl_type),
            lambda s, k=k, strategy=strategy, kl_type=kl_type: literal.gdkd(
                s, T, k, strategy, 0.5, 2.0, 6.0, 3.0, kl_type
            )[0],
        )
        for k, strategy, kl_type in [
            (1, "best", "forward"),
            (5, "best", "forward"),
            (5, "best", "reverse"),
            (5, "best", "both"),
            (5, "worst", "forward"),
            (10, "best", "both"),
        ]
    },
    "gdkd3": (objective.gdkd3(4, 0.5, 2.0, 6.0, 3.0), lambda s: literal.gdkd3(s, T, 4, 0.5, 2.0, 6.0, 3.0)[0]),
}


@pytest.mark.parametrize(("value", "formula"), LITERAL.values(), ids=LITERAL.keys())
def test_literal_formulas(value: Objective, formula: Callable[[Tensor], Tensor]) -> None:
    """Value and gradient are those of the formula under autograd."""
    got = expected(value, S, T, target=Y, reduction="sum")
    student = S.clone().requires_grad_()
    want = formula(student).sum()
    (gradient,) = torch.autograd.grad(want, student)
    torch.testing.assert_close(got.loss, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.gradient, gradient, rtol=1e-10, atol=1e-12)


@each(LOSSES)
def test_gradient_formula(case: Case) -> None:
    """The documented closed form of the gradient, for every combination of weights in the table."""
    student, teacher, target = make_inputs((5, 23), torch.float64, scale=2.0)
    got = expected(case.objective, student, teacher, target=target, reduction="sum")
    want, _ = literal.gradient_formula(case.objective, student, teacher, target)
    torch.testing.assert_close(got.gradient, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_kd_decomposes(partition: Partition, temperature: float) -> None:
    """KD = KL of the masses + the groups' KLs, each weighed by the teacher's mass of the group."""
    weights = Term(temperature, partition, (1.0, 0.0), ((1.0, 0.0),) * len(partition.groups))
    parts = expected(Objective((weights,)), S, T, target=Y, reduction="none").parts
    masses = torch.stack(
        [(F.softmax(T / temperature, 1) * group).sum(1) for group in literal.groups_of(partition, T, Y)], 1
    )
    total = parts.get("mass", torch.zeros(len(S)))
    for name, mass in zip(partition.groups, masses.unbind(1), strict=True):
        total = total + mass * parts[name]
    torch.testing.assert_close(total, literal.kl(S, T, temperature), rtol=1e-12, atol=1e-12)


def test_two_classes_by_hand() -> None:
    """With two classes DKD is the KL of two coins, whose odds are the differences of the logits."""
    student, teacher = torch.tensor([[1.0, -0.5]]).double(), torch.tensor([[-2.0, 1.0]]).double()
    temperature = 2.0
    q, p = (1 / (1 + math.exp(-gap / temperature)) for gap in (1.5, -3.0))  # student's and teacher's p of class 0
    want = 4.0 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    for value in (objective.dkd(1.0, 8.0, temperature), objective.kd(temperature), objective.gdkd(1, 1, 1, 8, 2.0)):
        got = expected(value, student, teacher, target=torch.tensor([0]))
        assert got.loss.item() == pytest.approx(want, rel=1e-13)
        # d/dz of the forward KL is T * (q - p).
        slope = temperature * (q - p)
        assert got.gradient.flatten().tolist() == pytest.approx([slope, -slope], rel=1e-12)


def test_three_classes_by_hand() -> None:
    """Probabilities chosen, logits their logarithms: teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2), T = 1."""
    teacher, student = (torch.tensor([p]).double().log() for p in ((0.5, 0.25, 0.25), (0.25, 0.25, 0.5)))
    target = torch.tensor([0])
    kd = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    tckd = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    nckd = 0.5 * math.log(0.5 * 3) + 0.5 * math.log(0.5 * 3 / 2)  # teacher (1/2, 1/2), student (1/3, 2/3)
    reverse_nckd = math.log(2 / 3) / 3 + 2 * math.log(4 / 3) / 3
    for value, want in [
        (objective.kd(1.0), kd),
        (objective.dkd(1.0, 0.0, 1.0), tckd),
        (objective.dkd(0.0, 1.0, 1.0), nckd),
        (objective.dkd(2.0, 3.0, 1.0), 2 * tckd + 3 * nckd),
        (objective.dkd(0.0, 1.0, 1.0, "reverse"), reverse_nckd),
        (objective.dkd(0.0, 1.0, 1.0, "both"), (nckd + reverse_nckd) / 2),
        (objective.gdkd(1, 2.0, 5.0, 3.0, 1.0), 2 * tckd + 3 * nckd),  # class 0 is the teacher's top
    ]:
        got = expected(value, student, teacher, target=target).loss.item()
        assert got == pytest.approx(want, rel=1e-12), value


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_reductions_are_torchs(reduction: str) -> None:
    """KD with T = 1 is torch's kl_div, the cross entropy torch's with its weights and ignored samples."""
    got = expected(objective.kd(1.0), S, T, reduction=reduction).loss
    log_s, log_t = S.log_softmax(1), T.log_softmax(1)
    rows = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    want = {
        "none": rows,
        "sum": F.kl_div(log_s, log_t, reduction="sum", log_target=True),
        "batchmean": F.kl_div(log_s, log_t, reduction="batchmean", log_target=True),
        "mean": rows.mean(),
    }[reduction]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs(reduction: str) -> None:
    """Also with ignored samples, in the (N, C, H, W) layout."""
    student, teacher, target = make_inputs((2, 5, 3, 4), torch.float64, scale=2.0)
    target[1, 2] = -100
    value = Objective((Term(1.0, WHOLE, groups=((0.0, 0.0),)),), ce_weight=2.5)
    got = expected(value, student, teacher, target=target, reduction=reduction)
    student.requires_grad_()
    want = 2.5 * F.cross_entropy(student, target, reduction=reduction)
    (gradient,) = torch.autograd.grad(want, student, upstream_like(want))
    torch.testing.assert_close(got.loss, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.gradient, gradient, rtol=1e-10, atol=1e-12)


def test_weighted_mean_by_hand() -> None:
    """Weights enter the numerator and the mean's denominator; batchmean divides by the size of dimension 0."""
    rows = literal.kl(S, T, 4.0)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 4.0]).double()
    target = torch.tensor([0, 1, 2, -1, 4, 5])
    counted = weight * torch.tensor([1, 1, 1, 0, 1, 1])
    options = {"target": target, "sample_weight": weight, "ignore_index": -1}
    for reduction, want in [
        ("none", rows * counted),
        ("sum", (rows * counted).sum()),
        ("batchmean", (rows * counted).sum() / 6),
        ("mean", (rows * counted).sum() / counted.sum()),
    ]:
        got = expected(objective.kd(), S, T, reduction=reduction, **options).loss
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# Standardisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", [0, 1])
def test_class_standardisation_is_batch_norm(correction: int) -> None:
    value = objective.adjust(objective.kd(4.0), standardize="class", correction=correction, eps=1e-5)
    got = expected(value, S, T, reduction="sum")
    student = S.clone().requires_grad_()

    def standard(z: Tensor) -> Tensor:
        return (z - z.mean(0)) / (z.var(0, correction=correction) + 1e-5).sqrt()

    want = literal.kl(standard(student), standard(T), 4.0).sum()
    (gradient,) = torch.autograd.grad(want, student)
    torch.testing.assert_close(got.loss, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.gradient, gradient, rtol=1e-9, atol=1e-12)
    if correction == 0:
        normed = [F.batch_norm(z, None, None, training=True, eps=1e-5) for z in (S, T)]
        torch.testing.assert_close(got.loss, literal.kl(*normed, 4.0).sum(), rtol=1e-12, atol=1e-12)


def test_class_statistics_leave_out_ignored_samples() -> None:
    value = objective.adjust(objective.gdkd(k=3), standardize="class")
    target = Y.clone()
    target[[1, 4]] = -100
    kept = target != -100
    garbage = S.clone()
    garbage[1] = torch.nan
    got = expected(value, garbage, T, target=target)
    want = expected(value, S[kept], T[kept])
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.gradient[kept], want.gradient, rtol=1e-10, atol=1e-12)
    assert not got.gradient[~kept].any()


def test_sample_standardisation_by_hand() -> None:
    value = objective.adjust(objective.dkd(1.0, 2.0, 2.0), standardize="sample")
    got = expected(value, S, T, target=Y, reduction="sum")
    student = S.clone().requires_grad_()

    def standard(z: Tensor) -> Tensor:
        return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)

    groups = literal.target_groups(T, Y)
    want = literal.dkd(standard(student), standard(T), groups, 1.0, 2.0, 2.0, "forward")[0].sum()
    (gradient,) = torch.autograd.grad(want, student)
    torch.testing.assert_close(got.loss, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.gradient, gradient, rtol=1e-9, atol=1e-12)


def test_top_k_looks_at_the_standardised_teacher() -> None:
    """Class 0 leads in the raw logits, class 1 once each class is measured against its own mean."""
    teacher = torch.tensor([[10.0, 1.0, 0.0], [10.5, 0.0, 0.5], [10.2, 0.2, -0.5]]).double()
    value = objective.adjust(objective.gdkd(1, 1.0, 0.0, 0.0, 1.0), standardize="class")
    standard = F.batch_norm(teacher, None, None, training=True, eps=1e-5)
    assert standard[0].argmax() != teacher[0].argmax()
    got = expected(value, S[:3, :3], teacher, reduction="none").loss
    groups = literal.top_groups(standard, 1)
    student = F.batch_norm(S[:3, :3], None, None, training=True, eps=1e-5)
    torch.testing.assert_close(got, literal.mass_kl(student, standard, groups, 1.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("standardize", ["class", "sample"])
def test_standardising_a_constant(standardize: str) -> None:
    """A constant column (class) or row (sample) is standardised to 0, with a finite gradient."""
    student = S.clone()
    student[:, 3] = 7.0
    student[2, :] = 7.0
    value = objective.adjust(objective.kd(), standardize=standardize)
    got = expected(value, student, T)
    assert got.loss.isfinite()
    assert got.gradient.isfinite().all()
    logits = reference.standardize(student, torch.ones(len(student), dtype=torch.bool), value)
    assert not (logits[:, 3] if standardize == "class" else logits[2]).any()


def test_class_standardisation_of_one_sample() -> None:
    """Its logits are their own mean: everything is 0."""
    got = expected(objective.adjust(objective.kd(), standardize="class"), S[:1], T[:1])
    assert got.loss == 0
    assert not got.gradient.any()


@pytest.mark.parametrize("standardize", ["class", "sample"])
def test_standardised_gradient(standardize: str) -> None:
    student = S[:4, :7].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: kdkernels.gdkd_loss(z, T[:4, :7], k=3, standardize=standardize, backend="reference"), (student,)
    )


def test_ties_go_to_the_lowest_class() -> None:
    teacher = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    for largest, want in [(True, [[1, 2], [0, 1]]), (False, [[0, 1], [0, 1]])]:
        leading, rest = reference.partition_masks(Partition("topk", 2, largest), teacher, None)
        assert [row.nonzero().flatten().tolist() for row in leading] == want
        assert torch.equal(leading, ~rest)
    first, second, rest = reference.partition_masks(Partition("top1_topk", 3), teacher, None)
    assert first.int().argmax(1).tolist() == [1, 0]
    assert [row.nonzero().flatten().tolist() for row in second] == [[2, 3], [1, 2]]
    assert [row.nonzero().flatten().tolist() for row in rest] == [[0], [3]]
