"""The signatures of the papers' repositories: called as those repositories call them, against their formulas."""

from __future__ import annotations

import inspect

import literal
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_gradient, assert_values, make_inputs
from torch import Tensor

from kdkernels.compat import gdkd, luminet, mdistiller

STUDENT, TEACHER, Y = make_inputs((6, 23), torch.float64, scale=2.0)


def assert_matches(got: tuple[Tensor, ...], want: tuple[Tensor, ...], student: Tensor, reference: Tensor) -> None:
    """The loss, the gradient it leaves and the values beside it are the formula's batch means."""
    got[0].backward()
    want[0].mean().backward()
    assert student.grad is not None
    assert reference.grad is not None
    assert_gradient(student.grad, reference.grad, 1e-10)
    assert len(got) == len(want)
    for left, right in zip(got, want, strict=True):
        assert left.shape == ()
        assert_values(left.detach(), right.detach().mean(), 1e-12)
    assert not any(part.requires_grad for part in got[1:])


def leaves() -> tuple[Tensor, Tensor]:
    return STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()


@pytest.mark.parametrize("temperature", [1, 4, 2.5])
def test_mdistiller_kd(temperature: float) -> None:
    student, reference = leaves()
    got = mdistiller.kd_loss(student, TEACHER, temperature)
    assert_matches((got,), (literal.kl(reference, TEACHER, temperature),), student, reference)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (1.0, 0.5, 1.0), (0, 2, 3)])
def test_mdistiller_dkd(alpha: float, beta: float, temperature: float) -> None:
    student, reference = leaves()
    got = mdistiller.dkd_loss(student, TEACHER, Y, alpha, beta, temperature)
    groups = literal.target_groups(TEACHER, Y)
    want = literal.dkd(reference, TEACHER, groups, alpha, beta, temperature, "forward")[:1]
    assert_matches((got,), want, student, reference)


@pytest.mark.parametrize("kl_type", ["forward", "reverse", "both"])
@pytest.mark.parametrize(("k", "strategy"), [(5, "best"), (5, "worst"), (1, "best")])
def test_gdkd(k: int, strategy: str, kl_type: str) -> None:
    student, reference = leaves()
    got = gdkd.gdkd_loss(student, TEACHER, Y, k, strategy, 0.5, 2.0, 6.0, 3.0, kl_type=kl_type)
    want = literal.gdkd(reference, TEACHER, k, strategy, 0.5, 2.0, 6.0, 3.0, kl_type)
    assert_matches(got, want, student, reference)


@pytest.mark.parametrize("k", [2, 5])
def test_gdkd3(k: int) -> None:
    """GDKD3.py's call: no strategy before the weights, and four values."""
    student, reference = leaves()
    got = gdkd.gdkd3_loss(student, TEACHER, Y, k, 0.5, 2.0, 6.0, 3.0)
    want = literal.gdkd3(reference, TEACHER, k, 0.5, 2.0, 6.0, 3.0)
    assert_matches(got, want, student, reference)


@pytest.mark.parametrize("temperature", [1, 2.5])
def test_lskd(temperature: float) -> None:
    """LSKD.py's call: without the weight, and with the means and deviations of both sides."""
    student, reference = leaves()
    got = gdkd.lskd_loss(student, TEACHER, temperature)

    def standardized(logits: Tensor) -> Tensor:
        return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)

    moments = [moment for side in (STUDENT, TEACHER) for moment in (side.mean(1), side.std(1))]
    want = (literal.kl(standardized(reference), standardized(TEACHER), temperature), *moments)
    assert_matches(got, want, student, reference)


def test_lskd_moments_have_the_logits_dtype() -> None:
    student, teacher = STUDENT.to(torch.bfloat16), TEACHER.to(torch.float16)
    loss, *moments = gdkd.lskd_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert [moment.dtype for moment in moments] == [torch.bfloat16] * 2 + [torch.float16] * 2


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6), (2, 3)])
@pytest.mark.parametrize("name", ["dkd", "dkdmod", "dkdmod top1", "gdkd", "gdkd3", "luminet"])
def test_targets_are_flattened(name: str, shape: tuple[int, ...]) -> None:
    """The repositories reshape the target or do not look at it."""
    loss = {
        "dkd": lambda y: mdistiller.dkd_loss(STUDENT, TEACHER, y, 1.0, 8.0, 4.0),
        "dkdmod": lambda y: gdkd.dkd_loss(STUDENT, TEACHER, y, 1.0, 8.0, 4.0, 1000, "forward")[0],
        "dkdmod top1": lambda y: gdkd.dkd_loss(STUDENT, TEACHER, y, 1.0, 8.0, 4.0, 1000, "forward", "top1")[0],
        "gdkd": lambda y: gdkd.gdkd_loss(STUDENT, TEACHER, y, 5, "best", 1.0, 1.0, 8.0, 4.0, "forward")[0],
        "gdkd3": lambda y: gdkd.gdkd3_loss(STUDENT, TEACHER, y, 4, 1.0, 1.0, 8.0, 4.0)[0],
        "luminet": lambda y: luminet.luminet_loss(STUDENT, TEACHER, y, 33.0, 4.0),
    }[name]
    torch.testing.assert_close(loss(Y.reshape(shape)), loss(Y), rtol=0, atol=0)


def test_targets_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target must be .* shape \(6,\)"):
        mdistiller.dkd_loss(STUDENT, TEACHER, torch.cat([Y, Y])[:, None], 1.0, 8.0, 4.0)
    with pytest.raises(TypeError, match="target must be "):
        mdistiller.dkd_loss(STUDENT, TEACHER, [1, 2, 3, 4, 5, 6], 1.0, 8.0, 4.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("kl_type", ["forward", "reverse", "both"])
@pytest.mark.parametrize("strategy", ["target", "top1"])
def test_gdkd_dkdmod(strategy: str, kl_type: str) -> None:
    """DKDMod's call: by default around the target; the size of its mask has nothing left to do."""
    student, reference = leaves()
    got = gdkd.dkd_loss(
        student, TEACHER, Y, 0.7, 5.0, temperature=2.0, mask_magnitude=1000, kl_type=kl_type, strategy=strategy
    )
    groups = literal.target_groups(TEACHER, Y) if strategy == "target" else literal.top_groups(TEACHER, 1)
    want = literal.dkd(reference, TEACHER, groups, 0.7, 5.0, 2.0, kl_type)
    assert_matches(got, want, student, reference)


def test_gdkd_dkdmod_is_around_the_target_by_default() -> None:
    student, reference = leaves()
    got = gdkd.dkd_loss(student, TEACHER, Y, 0.7, 5.0, 2.0, 1000, "forward")
    want = literal.dkd(reference, TEACHER, literal.target_groups(TEACHER, Y), 0.7, 5.0, 2.0, "forward")
    assert_matches(got, want, student, reference)


@pytest.mark.parametrize(("alpha", "temperature"), [(33.0, 4.0), (0.5, 1), (-2, 2.5)])
def test_luminet(alpha: float, temperature: float) -> None:
    student, reference = leaves()
    got = luminet.luminet_loss(student, TEACHER, Y, alpha, temperature)
    got.backward()

    def perception(logits: Tensor) -> Tensor:
        return (logits - logits.mean(0)) / (logits.var(0, correction=0) + 1e-5).sqrt()

    log_student = F.log_softmax(perception(reference) / temperature, dim=1)
    soft_teacher = F.softmax(perception(TEACHER) / temperature, dim=1)
    want = F.kl_div(log_student, soft_teacher, reduction="batchmean") * alpha**2
    want.backward()
    assert got.shape == ()
    assert student.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(student.grad, reference.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        ("2", TypeError, "alpha must be a number, got '2'"),
        (True, TypeError, "alpha must be a number, got True"),
        (float("nan"), ValueError, "alpha must be finite, got nan"),
        (1e200, ValueError, r"alpha\^2 must be finite, got inf"),
    ],
)
def test_luminet_checks_alpha(alpha: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        luminet.luminet_loss(STUDENT, TEACHER, Y, alpha, 4.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (mdistiller.kd_loss, "logits_student logits_teacher temperature"),
        (mdistiller.dkd_loss, "logits_student logits_teacher target alpha beta temperature"),
        (gdkd.gdkd_loss, "logits_student logits_teacher target k strategy w0 w1 w2 temperature kl_type"),
        (
            gdkd.dkd_loss,
            "logits_student logits_teacher target alpha beta temperature mask_magnitude kl_type strategy",
        ),
        (gdkd.gdkd3_loss, "logits_student logits_teacher target k w0 w1 w2 temperature"),
        (gdkd.lskd_loss, "logits_student logits_teacher temperature"),
        (luminet.luminet_loss, "logits_student logits_teacher target alpha temperature"),
    ],
    ids=lambda value: f"{value.__module__}.{value.__name__}" if callable(value) else "",
)
def test_argument_names(function: object, names: str) -> None:
    """Name for name and in order: positional and keyword calls both keep working."""
    assert " ".join(inspect.signature(function).parameters) == names


@pytest.mark.parametrize("name", ["kd", "dkd", "gdkd", "gdkd3", "lskd", "dkdmod", "luminet"])
def test_a_teacher_with_grad_is_detached(name: str) -> None:
    """Those repositories differentiate the teacher's side at most by accident; here it gets nothing."""
    student, _ = leaves()
    teacher = TEACHER.clone().requires_grad_()
    loss = {
        "kd": lambda: mdistiller.kd_loss(student, teacher, 4.0),
        "dkd": lambda: mdistiller.dkd_loss(student, teacher, Y, 1.0, 8.0, 4.0),
        "gdkd": lambda: gdkd.gdkd_loss(student, teacher, Y, 5, "best", 1.0, 1.0, 8.0, 4.0, "forward")[0],
        "gdkd3": lambda: gdkd.gdkd3_loss(student, teacher, Y, 4, 1.0, 1.0, 8.0, 4.0)[0],
        "lskd": lambda: gdkd.lskd_loss(student, teacher, 2.0)[0],
        "dkdmod": lambda: gdkd.dkd_loss(student, teacher, Y, 1.0, 8.0, 4.0, 1000, "forward")[0],
        "luminet": lambda: luminet.luminet_loss(student, teacher, Y, 33.0, 4.0),
    }[name]()
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
