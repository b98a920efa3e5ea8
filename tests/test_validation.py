"""Bad input: the exception's type, the argument's name and its value in the message, and that nothing was computed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_inputs

import kdkernels
from kdkernels import autograd, objective, reference
from kdkernels._describe import short
from kdkernels.modules import LOSSES
from kdkernels.objective import TARGET, WHOLE, Objective, Partition, Term

STUDENT, TEACHER, Y = make_inputs((3, 7))
WEIGHT = torch.ones(3)


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here ends before a backend is reached."""

    def reached(*_: object, **__: object) -> None:
        pytest.fail("a backend was reached")

    monkeypatch.setattr(reference, "distillation_loss", reached)
    monkeypatch.setattr(autograd, "loss_of", reached)


def described(value: object) -> str:
    """How a message shows a value."""
    return re.escape(short(value))


# Arguments of a call ------------------------------------------------------------------------------------------------

#: id -> (arguments that replace good ones, exception, pattern).
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "student_str": ({"student_logits": "abc"}, TypeError, r"student_logits must be .* tensor, got 'abc'"),
    "student_list": ({"student_logits": [[1.0, 2.0]]}, TypeError, r"student_logits .* got \[\[1.0, 2.0\]\]"),
    "student_none": ({"student_logits": None}, TypeError, r"student_logits .* got None"),
    "student_float": ({"student_logits": 1.5}, TypeError, r"student_logits .* got 1.5"),
    "student_int": ({"student_logits": 3}, TypeError, r"student_logits .* got 3 \(int\)"),
    "student_ints": ({"student_logits": STUDENT.long()}, TypeError, r"student_logits .* got a int64 tensor .*\(3, 7\)"),
    "student_bool": ({"student_logits": STUDENT > 0}, TypeError, r"student_logits .* got a bool tensor"),
    "student_complex": ({"student_logits": STUDENT + 0j}, TypeError, r"student_logits .* got a complex64 tensor"),
    "student_float8": (
        {"student_logits": STUDENT.to(torch.float8_e5m2)},
        TypeError,
        r"student_logits .* got a float8_e5m2 tensor",
    ),
    "student_sparse": ({"student_logits": STUDENT.to_sparse()}, TypeError, r"student_logits .* torch.sparse_coo"),
    "teacher_str": ({"teacher_logits": "abc"}, TypeError, r"teacher_logits .* got 'abc'"),
    "teacher_list": ({"teacher_logits": [1]}, TypeError, r"teacher_logits .* got \[1\]"),
    "teacher_ints": ({"teacher_logits": TEACHER.int()}, TypeError, r"teacher_logits .* got a int32 tensor"),
    "teacher_shape": ({"teacher_logits": TEACHER[:2]}, ValueError, r"teacher_logits .*\(3, 7\), got \(2, 7\)"),
    "teacher_dims": ({"teacher_logits": TEACHER[None]}, ValueError, r"teacher_logits .*\(3, 7\), got \(1, 3, 7\)"),
    "teacher_broadcast": ({"teacher_logits": TEACHER[:1]}, ValueError, r"teacher_logits .*\(3, 7\), got \(1, 7\)"),
    "teacher_classes": ({"teacher_logits": TEACHER[:, :5]}, ValueError, r"teacher_logits .* 7 classes .* got 5; num_c"),
    "teacher_device": ({"teacher_logits": TEACHER.to("meta")}, ValueError, r"teacher_logits .* device cpu, got meta"),
    "teacher_grad": (
        {"teacher_logits": TEACHER.clone().requires_grad_()},
        ValueError,
        r"teacher_logits must not require grad, got requires_grad=True.*teacher_logits.detach\(\)",
    ),
    "scalar_logits": (
        {"student_logits": torch.tensor(1.0), "teacher_logits": torch.tensor(1.0)},
        ValueError,
        r"class_dim must be a dimension of logits of shape \(\), got 1",
    ),
    "no_class": (
        {"student_logits": torch.ones(3, 0), "teacher_logits": torch.ones(3, 0)},
        ValueError,
        r"at least one class, got shape",
    ),
    "objective": ({"objective": "kd"}, TypeError, r"objective must be a kdkernels.Objective, got 'kd'"),
    "objective_term": (
        {"objective": objective.kd().terms[0], "ce_weight": 0.1},
        TypeError,
        r"objective must be a kdkernels.Objective, got Term",
    ),
    "target_list": ({"target": [0, 1, 2]}, TypeError, r"target must be an integer tensor .*got \[0, 1, 2\]"),
    "target_int": ({"target": 0}, TypeError, r"target must be an integer tensor .*got 0 \(int\)"),
    "target_none": ({"target": None}, TypeError, r"target is required .*got None; expected integers of shape \(3,\)"),
    "target_float": ({"target": Y.float()}, TypeError, r"target must be an integer tensor .*got a float32 tensor"),
    "target_bool": ({"target": Y > 1}, TypeError, r"target must be an integer tensor .*got a bool tensor"),
    "target_short": (
        {"target": Y[:2]},
        ValueError,
        r"target must be .*shape \(3,\) .*got a int64 tensor of shape \(2,\)",
    ),
    "target_column": ({"target": Y[:, None]}, ValueError, r"target must be .*shape \(3,\).*got .* of shape \(3, 1\)"),
    "target_onehot": (
        {"target": (STUDENT > 9).long()},
        ValueError,
        r"target must be .*\(3,\).*got .* of shape \(3, 7\)",
    ),
    "target_device": ({"target": Y.to("meta")}, ValueError, r"target must be .* on cpu, got .* on meta"),
    "weight_list": ({"sample_weight": [1.0] * 3}, TypeError, r"sample_weight must be a tensor .*got \[1.0, 1.0, 1.0\]"),
    "weight_float": ({"sample_weight": 1.0}, TypeError, r"sample_weight must be a tensor .*got 1.0"),
    "weight_complex": ({"sample_weight": WEIGHT + 0j}, TypeError, r"sample_weight must be .*got a complex64 tensor"),
    "weight_short": ({"sample_weight": WEIGHT[:2]}, ValueError, r"sample_weight must be .* 3 values .*got .*\(2,\)"),
    "weight_scalar": (
        {"sample_weight": WEIGHT[0]},
        ValueError,
        r"sample_weight must be .* 3 values .*got .*shape \(\)",
    ),
    "weight_matrix": ({"sample_weight": STUDENT.abs()}, ValueError, r"sample_weight must be .*got .*shape \(3, 7\)"),
    "weight_device": (
        {"sample_weight": WEIGHT.to("meta")},
        ValueError,
        r"sample_weight must be .*on cpu, got .*on meta",
    ),
    "weight_grad": (
        {"sample_weight": WEIGHT.clone().requires_grad_()},
        ValueError,
        r"sample_weight must not require grad, got requires_grad=True: pass sample_weight.detach\(\)",
    ),
    "standardize": (
        {"standardize": "batch"},
        ValueError,
        r"standardize must be one of None, 'class', 'sample', got 'batch'",
    ),
    "standardize_bool": ({"standardize": True}, ValueError, r"standardize must be one of .*got True"),
    "correction_alone": ({"correction": 1}, ValueError, r"correction is used only with standardize=.*got correction=1"),
    "eps_alone": ({"eps": 0.5}, ValueError, r"eps is used only with standardize=.*got eps=0.5"),
    "correction_float": (
        {"standardize": "class", "correction": 0.5},
        TypeError,
        r"correction must be an integer, got 0.5",
    ),
    "correction_negative": ({"standardize": "class", "correction": -1}, ValueError, r"correction must be >= 0, got -1"),
    "eps_negative": ({"standardize": "class", "eps": -1e-5}, ValueError, r"eps must be >= 0, got -1e-05"),
    "eps_str": ({"standardize": "class", "eps": "small"}, TypeError, r"eps must be a number, got 'small'"),
    "ce_negative": ({"ce_weight": -0.5}, ValueError, r"ce_weight must be >= 0, got -0.5"),
    "ce_nan": ({"ce_weight": float("nan")}, ValueError, r"ce_weight must be finite, got nan"),
    "ce_str": ({"ce_weight": "1"}, TypeError, r"ce_weight must be a number, got '1'"),
    "ce_tensor": ({"ce_weight": WEIGHT}, TypeError, r"ce_weight must be a number, got a float32 tensor .*\(3,\)"),
    "ce_large": ({"ce_weight": 1e25}, ValueError, r"ce_weight must be <= 1e\+24, got 1e\+25"),
    "weight_negative": ({"weight": -0.5}, ValueError, r"weight must be >= 0, got -0.5"),
    "weight_large": ({"weight": 1e24}, ValueError, r"weight times a term's weight must be <= 1e\+24, got 8e\+24"),
    "weight_bool": ({"weight": True}, TypeError, r"weight must be a number, got True"),
    "weight_vector": ({"weight": WEIGHT}, TypeError, r"weight must be a number, got a float32 tensor"),
    "square_temperature": (
        {"square_temperature": 1},
        TypeError,
        r"square_temperature must be a bool, got 1 \(int\)",
    ),
    "square_temperature_none": (
        {"square_temperature": None},
        TypeError,
        r"square_temperature must be a bool, got None",
    ),
    "reduction": (
        {"reduction": "avg"},
        ValueError,
        r"reduction must be one of 'none', 'sum', 'mean', 'batchmean', got 'avg'",
    ),
    "reduction_none": ({"reduction": None}, ValueError, r"reduction must be one of .*got None"),
    "denominator_negative": ({"denominator": -2.5}, ValueError, r"denominator must be >= 0, got -2.5"),
    "denominator_huge": ({"denominator": 10**400}, ValueError, r"denominator must be finite, got an integer of 1329 b"),
    "denominator_nan": ({"denominator": float("nan")}, ValueError, r"denominator must be finite, got nan"),
    "denominator_inf": ({"denominator": float("inf")}, ValueError, r"denominator must be finite, got inf"),
    "denominator_str": ({"denominator": "3"}, TypeError, r"denominator must be a number, got '3'"),
    "denominator_bool": ({"denominator": True}, TypeError, r"denominator must be a number, got True"),
    "denominator_vector": (
        {"denominator": WEIGHT},
        ValueError,
        r"denominator must be .*0-d.*got a float32 tensor.*\(3,\)",
    ),
    "denominator_complex": (
        {"denominator": WEIGHT[0] + 0j},
        ValueError,
        r"denominator must be .*got a complex64 tensor",
    ),
    "denominator_device": (
        {"denominator": WEIGHT[0].to("meta")},
        ValueError,
        r"denominator must be .*cpu, got .*on meta",
    ),
    "denominator_sum": (
        {"denominator": 3, "reduction": "sum"},
        ValueError,
        r"denominator replaces the count of reduction='mean', got it with reduction='sum'",
    ),
    "denominator_none": ({"denominator": 3, "reduction": "none"}, ValueError, r"denominator .*reduction='none'"),
    "ignore_index_float": ({"ignore_index": -100.0}, TypeError, r"ignore_index must be an integer, got -100.0"),
    "ignore_index_none": ({"ignore_index": None}, TypeError, r"ignore_index must be an integer, got None"),
    "ignore_index_large": (
        {"ignore_index": 2**63},
        ValueError,
        r"ignore_index must be <= 9223372036854775807, got 9223372036854775808",
    ),
    "ignore_index_small": ({"ignore_index": -(2**63) - 1}, ValueError, r"ignore_index must be >= -9223372036854775808"),
    "ignore_index_numpy": ({"ignore_index": np.float32(-1)}, TypeError, r"ignore_index must be an integer, got"),
    "class_dim_huge": ({"class_dim": 10**30}, ValueError, r"class_dim must be <= 9223372036854775807, got 1000"),
    "correction_huge": (
        {"standardize": "class", "correction": 10**400},
        ValueError,
        r"correction must be <= .*got an integer",
    ),
    "eps_huge": ({"standardize": "class", "eps": 1e300}, ValueError, r"eps must be <= 1e\+24, got 1e\+300"),
    "class_dim_high": ({"class_dim": 2}, ValueError, r"class_dim must be a dimension .*\(3, 7\), got 2"),
    "class_dim_low": ({"class_dim": -3}, ValueError, r"class_dim must be a dimension .*\(3, 7\), got -3"),
    "class_dim_float": ({"class_dim": 1.0}, TypeError, r"class_dim must be an integer, got 1.0"),
    "class_dim_bool": ({"class_dim": True}, TypeError, r"class_dim must be an integer, got True"),
    "num_classes_zero": ({"num_classes": 0}, ValueError, r"num_classes must be between 1 and the 7 .*got 0"),
    "num_classes_high": ({"num_classes": 8}, ValueError, r"num_classes must be between 1 and the 7 .*got 8"),
    "num_classes_float": ({"num_classes": 5.0}, TypeError, r"num_classes must be an integer, got 5.0"),
    "num_classes_shape": (
        {"num_classes": 5, "teacher_logits": TEACHER[:2, :5]},
        ValueError,
        r"teacher_logits .*\(3, 7\) outside class_dim, got \(2, 5\)",
    ),
    "mode": ({"mode": "fast"}, ValueError, r"mode must be one of 'fused', 'recompute', got 'fast'"),
    "mode_bool": ({"mode": True}, ValueError, r"mode must be one of .*got True"),
    "backend": ({"backend": "gpu"}, ValueError, r"backend must be one of 'auto', .*got 'gpu'"),
    "backend_none": ({"backend": None}, ValueError, r"backend must be one of .*got None"),
}


@pytest.mark.parametrize(("arguments", "exception", "pattern"), CALLS.values(), ids=CALLS.keys())
def test_calls(arguments: dict[str, Any], exception: type[Exception], pattern: str) -> None:
    student, teacher, target = STUDENT.clone().requires_grad_(), TEACHER.clone(), Y.clone()
    good = {"student_logits": student, "teacher_logits": teacher, "objective": objective.dkd(), "target": target}
    with pytest.raises(exception, match=pattern):
        kdkernels.distillation_loss(**good | arguments)
    assert student.grad is None
    assert torch.equal(student, STUDENT)
    assert torch.equal(teacher, TEACHER)
    assert torch.equal(target, Y)


def test_the_arguments_above_are_bad_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they replace is a good call, which does reach a backend."""
    monkeypatch.setattr(reference, "distillation_loss", lambda _: (torch.tensor(1.0), {}))
    assert kdkernels.distillation_loss(STUDENT, TEACHER, objective.dkd(), target=Y, backend="reference") == 1


@pytest.mark.parametrize("k", [7, 8, 100])
@pytest.mark.parametrize("loss", [kdkernels.gdkd_loss, kdkernels.gdkd3_loss])
def test_k_of_all_classes(loss: Callable[..., Any], k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be smaller than the number of classes 7, got {k}"):
        loss(STUDENT, TEACHER, k=k)


def test_k_of_the_compared_classes() -> None:
    with pytest.raises(ValueError, match=r"k must be smaller than the number of classes 5, got 5"):
        kdkernels.gdkd_loss(STUDENT, TEACHER, k=5, num_classes=5)


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match=r"temprature"):
        kdkernels.kd_loss(STUDENT, TEACHER, temprature=2.0)


@pytest.mark.parametrize("name", ["reduction", "target", "backend", "ce_weight"])
def test_options_are_keywords(name: str) -> None:
    """A ninth positional argument would be a silent mistake."""
    with pytest.raises(TypeError, match="positional"):
        kdkernels.kd_loss(
            STUDENT, TEACHER, 4.0, {"reduction": "mean", "target": Y, "backend": "cpu", "ce_weight": 1}[name]
        )


# Arguments of the losses --------------------------------------------------------------------------------------------


def function_of(loss: str) -> Callable[..., Any]:
    """A loss's function with the tensors given."""
    return partial(LOSSES[loss].function, STUDENT, TEACHER, target=Y)


LOSS_FUNCTIONS: dict[str, Callable[..., Any]] = {loss: function_of(loss) for loss in LOSSES}
MODULES: dict[str, Callable[..., Any]] = {loss: row.module for loss, row in LOSSES.items()}
PARAMETERS = [(loss, name) for loss, row in LOSSES.items() for name in row.module.parameter_names]
TEMPERATURES = [(loss, name) for loss, name in PARAMETERS if "temperature" in name]
WEIGHTS = [(loss, name) for loss, name in PARAMETERS if name in {"alpha", "beta", "w0", "w1", "w2"} or "weight" in name]


def test_every_parameter_is_tried() -> None:
    others = set(PARAMETERS) - set(TEMPERATURES) - set(WEIGHTS)
    assert {name for _, name in others} == {"k", "strategy", "kl_type"}
    assert len(TEMPERATURES) == 7
    assert len(WEIGHTS) == 10


NOT_NUMBERS = ["4", None, [4.0], True, 1j, torch.ones(1), torch.tensor(True), np.ones(2), np.True_, np.complex64(1)]
BOTH = pytest.mark.parametrize("build", [LOSS_FUNCTIONS, MODULES], ids=["function", "module"])


@BOTH
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=short)
@pytest.mark.parametrize(("loss", "name"), TEMPERATURES + WEIGHTS)
def test_numbers_that_are_none(loss: str, name: str, value: object, build: dict[str, Callable[..., Any]]) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a number, got {described(value)}"):
        build[loss](**{name: value})


@BOTH
@pytest.mark.parametrize(
    "value",
    [0, -1.5, float("nan"), float("inf"), -float("inf"), 1e-30, 2.0**70, 1e100, 1e200, 10**400],
    ids=short,
)
@pytest.mark.parametrize(("loss", "name"), TEMPERATURES)
def test_temperatures(loss: str, name: str, value: float, build: dict[str, Callable[..., Any]]) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*got {described(value)}"):
        build[loss](**{name: value})


@BOTH
@pytest.mark.parametrize("value", [-1e-9, -3, float("nan"), float("inf"), 1e25, 10**400], ids=short)
@pytest.mark.parametrize(("loss", "name"), WEIGHTS)
def test_weights(loss: str, name: str, value: float, build: dict[str, Callable[..., Any]]) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*got {described(value)}"):
        build[loss](**{name: value})


@BOTH
@pytest.mark.parametrize(
    ("loss", "name", "value", "exception"),
    [
        ("gdkd", "k", 0, ValueError),
        ("gdkd", "k", -3, ValueError),
        ("gdkd3", "k", 1, ValueError),
        ("gdkd3", "k", 0, ValueError),
        ("gdkd", "k", True, TypeError),
        ("gdkd", "k", 2.0, TypeError),
        ("gdkd", "k", "5", TypeError),
        ("gdkd", "k", torch.tensor(5.0), TypeError),
        ("gdkd", "k", torch.tensor([5]), TypeError),
        ("gdkd", "k", np.float64(5), TypeError),
        ("gdkd3", "k", 10**30, ValueError),
        ("gdkd3", "k", None, TypeError),
        ("gdkd", "strategy", "top", ValueError),
        ("gdkd3", "strategy", 1, ValueError),
        ("gdkd", "kl_type", "backward", ValueError),
        ("gdkd3", "kl_type", None, ValueError),
        ("dkd", "kl_type", ["forward"], ValueError),
    ],
)
def test_choices(
    loss: str, name: str, value: object, exception: type[Exception], build: dict[str, Callable[..., Any]]
) -> None:
    with pytest.raises(exception, match=rf"{name} must be .*got {described(value)}"):
        build[loss](**{name: value})


@BOTH
@pytest.mark.parametrize(
    "value", [np.float32(1e25), torch.tensor(-1.0), torch.tensor(torch.nan), np.array(-2)], ids=short
)
@pytest.mark.parametrize(("loss", "name"), TEMPERATURES + WEIGHTS)
def test_scalars_out_of_range(loss: str, name: str, value: Any, build: dict[str, Callable[..., Any]]) -> None:
    """The message shows the number, not what held it."""
    with pytest.raises(ValueError, match=rf"{name} must be .*got {re.escape(str(value.item()))}"):
        build[loss](**{name: value})


@BOTH
@pytest.mark.parametrize(("loss", "name"), TEMPERATURES + WEIGHTS)
def test_a_number_that_requires_grad(loss: str, name: str, build: dict[str, Callable[..., Any]]) -> None:
    """A constant in its place would train nothing, in silence."""
    with pytest.raises(TypeError, match=rf"{name} must not require grad.* learnable {name} is not supported yet"):
        build[loss](**{name: torch.tensor(4.0, requires_grad=True)})


@BOTH
@pytest.mark.parametrize(("loss", "name"), [*TEMPERATURES, *WEIGHTS, ("gdkd", "k")])
def test_a_number_on_another_device(loss: str, name: str, build: dict[str, Callable[..., Any]]) -> None:
    """The host would wait for a GPU."""
    with pytest.raises(ValueError, match=rf"{name} must be a number or a 0-d CPU tensor, got .* on meta"):
        build[loss](**{name: torch.tensor(4, device="meta")})


HUGE = [np.zeros((16, 500)), list(range(10**5)), "x" * 10**5, torch.zeros(16, 500), 10**5000, {1: [0.0] * 10**4}]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: type(value).__name__)
def test_no_message_shows_a_large_value_whole(value: object) -> None:
    arguments = ("student_logits", "objective", "target", "sample_weight", "denominator", "class_dim", "num_classes")
    arguments += ("weight", "ce_weight", "standardize", "reduction", "mode", "backend", "ignore_index", "process_group")
    good = {"student_logits": STUDENT, "teacher_logits": TEACHER, "objective": objective.dkd(), "target": Y}
    for name in arguments:
        with pytest.raises((TypeError, ValueError), match=name) as error:
            kdkernels.distillation_loss(**good | {name: value})
        assert len(str(error.value)) < 400, name
    for loss, name in (*TEMPERATURES, *WEIGHTS, ("gdkd", "k"), ("gdkd", "strategy"), ("dkd", "kl_type")):
        with pytest.raises((TypeError, ValueError), match=name) as error:
            LOSS_FUNCTIONS[loss](**{name: value})
        assert len(str(error.value)) < 400, name
    with pytest.raises((TypeError, ValueError)) as error:
        Term(1.0, WHOLE, groups=value)
    assert len(str(error.value)) < 400


# Objectives ---------------------------------------------------------------------------------------------------------

ONE = ((1.0, 0.0),)

#: id -> (what builds it, exception, pattern).
OBJECTIVES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "partition_kind": (lambda: Partition("half"), ValueError, r"Partition.kind must be one of .*got 'half'"),
    "partition_none": (lambda: Partition(None), ValueError, r"Partition.kind must be one of .*got None"),
    "partition_k": (lambda: Partition("whole", 3), ValueError, r"Partition.k must be 0 for kind 'whole', got 3"),
    "partition_no_k": (lambda: Partition("topk"), ValueError, r"k must be >= 1, got 0"),
    "partition_one_k": (lambda: Partition("top1_topk", 1), ValueError, r"k must be >= 2, got 1"),
    "partition_largest": (lambda: Partition("topk", 3, 1), TypeError, r"Partition.largest must be a bool, got 1"),
    "term_partition": (lambda: Term(1.0, "whole"), TypeError, r"Term.partition must be a Partition, got 'whole'"),
    "term_temperature": (lambda: Term(0.0, WHOLE), ValueError, r"temperature must be >= 1e-06, got 0.0"),
    "term_too_few": (
        lambda: Term(1.0, TARGET, groups=ONE),
        ValueError,
        r"Term.groups must have one .* 2 groups \('target', 'rest'\) of partition 'target', got 1",
    ),
    "term_too_many": (lambda: Term(1.0, WHOLE, groups=ONE * 2), ValueError, r"Term.groups .*1 groups .*'whole', got 2"),
    "term_list": (lambda: Term(1.0, WHOLE, groups=[(1.0, 0.0)]), TypeError, r"Term.groups .*got \[\(1.0, 0.0\)\]"),
    "term_pair": (lambda: Term(1.0, WHOLE, groups=(1.0,)), TypeError, r"Term.groups\['whole'\] .*pair.*got 1.0"),
    "term_triple": (
        lambda: Term(1.0, WHOLE, groups=((1, 2, 3),)),
        TypeError,
        r"Term.groups\['whole'\] .*got \(1, 2, 3\)",
    ),
    "term_negative": (lambda: Term(1.0, WHOLE, groups=((1, -2),)), ValueError, r"Term.groups\['whole'\]\[1\] .*got -2"),
    "term_mass": (lambda: Term(1.0, TARGET, 1.0, ONE * 2), TypeError, r"Term.mass must be a .*pair.*got 1.0"),
    "term_mass_nan": (lambda: Term(1.0, TARGET, (float("nan"), 0), ONE * 2), ValueError, r"Term.mass\[0\] .*got nan"),
    "term_square": (
        lambda: Term(1.0, WHOLE, square_temperature=2),
        TypeError,
        r"Term.square_temperature must be a bool, got 2",
    ),
    "no_term": (lambda: Objective(()), ValueError, r"Objective.terms must hold 1 to 8 Terms, got 0"),
    "nine_terms": (lambda: Objective((Term(1.0, WHOLE),) * 9), ValueError, r"Objective.terms must hold 1 to 8 .*got 9"),
    "term_alone": (
        lambda: Objective(Term(1.0, WHOLE)),
        TypeError,
        r"Objective.terms must be a tuple of Terms, got Term",
    ),
    "term_names": (lambda: Objective(("kd",)), TypeError, r"Objective.terms must be a tuple of Terms, got \('kd',\)"),
    "standardize": (
        lambda: Objective((Term(1.0, WHOLE),), "row"),
        ValueError,
        r"standardize must be one of .*got 'row'",
    ),
    "correction": (lambda: Objective((Term(1.0, WHOLE),), "class", -1), ValueError, r"correction must be >= 0, got -1"),
    "eps": (lambda: Objective((Term(1.0, WHOLE),), "class", 0, "x"), TypeError, r"eps must be a number, got 'x'"),
    "ce_weight": (lambda: Objective((Term(1.0, WHOLE),), ce_weight=-1), ValueError, r"ce_weight must be >= 0, got -1"),
}


@pytest.mark.parametrize(("build", "exception", "pattern"), OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_objectives(build: Callable[[], object], exception: type[Exception], pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        build()


def test_objectives_are_immutable() -> None:
    """They are shared between calls."""
    value = objective.kd()
    with pytest.raises(AttributeError):
        value.ce_weight = 1.0
    with pytest.raises(AttributeError):
        value.terms[0].temperature = 1.0


# Modules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"target": Y}, r"target is an argument of forward\(\), not of KDLoss\(\)"),
        ({"sample_weight": WEIGHT}, r"sample_weight is an argument of forward\(\), not of KDLoss\(\)"),
        ({"temprature": 2.0}, r"KDLoss\(\) got an unexpected keyword argument 'temprature'"),
    ],
    ids=["target", "sample_weight", "unknown"],
)
def test_module_options(arguments: dict[str, Any], pattern: str) -> None:
    with pytest.raises(TypeError, match=pattern):
        kdkernels.KDLoss(**arguments)


#: An option's name, a value that it cannot have, and the error.
BAD_OPTIONS = {
    "weight": (-1.0, ValueError),
    "square_temperature": (1, TypeError),
    "standardize": ("batch", ValueError),
    "correction": (-1, ValueError),
    "eps": ("small", TypeError),
    "ce_weight": (float("nan"), ValueError),
    "reduction": ("avg", ValueError),
    "denominator": (-1.0, ValueError),
    "ignore_index": (2**63, ValueError),
    "class_dim": (0.5, TypeError),
    "num_classes": (0, ValueError),
    "process_group": ("world", TypeError),
    "mode": ("fast", ValueError),
    "backend": ("gpu", ValueError),
    "return_parts": ("yes", TypeError),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_options_of_modules_are_checked_when_set(loss: str, name: str) -> None:
    value, exception = BAD_OPTIONS[name]
    module = MODULES[loss]()
    before = getattr(module, name)
    with pytest.raises(exception, match=rf"{name} must be .*got"):
        setattr(module, name, value)
    assert getattr(module, name) is before
    with pytest.raises(exception, match=rf"{name} must be .*got"):
        MODULES[loss](**{name: value})


@pytest.mark.parametrize(("loss", "name"), TEMPERATURES + WEIGHTS)
def test_numbers_of_modules_are_checked_when_set(loss: str, name: str) -> None:
    module = MODULES[loss]()
    before = getattr(module, name)
    for value, exception in (("4", TypeError), (-1.0, ValueError), (sys.float_info.max, ValueError)):
        with pytest.raises(exception, match=rf"{name} must be .*got"):
            setattr(module, name, value)
        assert getattr(module, name) is before


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [1, 2.5, "mean", True, np.float32(2), torch.tensor(1.0)], ids=short)
@pytest.mark.parametrize("name", ["temprature", "T", "gamma", "target"])
def test_attributes_that_are_no_arguments(name: str, value: object, loss: str) -> None:
    module = MODULES[loss]()
    with pytest.raises(AttributeError, match=rf"{type(module).__name__} has no argument '{name}'; it has .*reduction"):
        setattr(module, name, value)
    assert not hasattr(module, name)


def test_module_objective() -> None:
    with pytest.raises(TypeError, match=r"objective must be a kdkernels.Objective, got 'kd'"):
        kdkernels.DistillationLoss("kd")
    module = kdkernels.DistillationLoss(objective.kd())
    with pytest.raises(TypeError, match=r"objective must be a kdkernels.Objective, got 'kd'"):
        module.objective = "kd"
    assert module.objective == objective.kd()
