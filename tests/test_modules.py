"""The modules are the functions, with the arguments at construction."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Path, make_inputs, measured
from torch import nn

import kdkernels
from kdkernels import objective
from kdkernels.modules import DistillationLoss

#: id -> (module class, function, positional arguments, keyword arguments).
MODULES: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "KDLoss": (kdkernels.KDLoss, kdkernels.kd_loss, (2.5,), {}),
    "KDLoss_options": (kdkernels.KDLoss, kdkernels.kd_loss, (), {"ce_weight": 0.3, "reduction": "sum"}),
    "ReverseKDLoss": (kdkernels.ReverseKDLoss, kdkernels.reverse_kd_loss, (2.5,), {"reduction": "none"}),
    "BDDLoss": (kdkernels.BDDLoss, kdkernels.bdd_loss, (0.5, 2.0, 3.0, 1.5), {"return_parts": True}),
    "DKDLoss": (kdkernels.DKDLoss, kdkernels.dkd_loss, (0.5, 2.0, 3.0), {"kl_type": "both", "ignore_index": 2}),
    "GDKDLoss": (
        kdkernels.GDKDLoss,
        kdkernels.gdkd_loss,
        (3, 0.5, 2.0, 6.0, 1.5),
        {"strategy": "worst", "kl_type": "reverse", "denominator": 7},
    ),
    "GDKD3Loss": (
        kdkernels.GDKD3Loss,
        kdkernels.gdkd3_loss,
        (3, 0.5, 2.0, 6.0, 1.5),
        {"strategy": "worst", "kl_type": "both", "reduction": "batchmean"},
    ),
    "DistillationLoss": (
        kdkernels.DistillationLoss,
        kdkernels.distillation_loss,
        (objective.dkd(0.5, 2.0, 3.0),),
        {"ce_weight": 1.0},
    ),
}
EACH = pytest.mark.parametrize(("module", "function", "args", "options"), MODULES.values(), ids=MODULES.keys())
#: Options that leave no trace in the result unless the module hands them on.
DEFAULTS = pytest.mark.parametrize(
    ("module", "function"), [entry[:2] for entry in MODULES.values() if entry[0] is not kdkernels.DistillationLoss]
)


def values_of(result: Any) -> list[torch.Tensor]:
    return [result[0], *result[1].values()] if isinstance(result, tuple) else [result]


@EACH
def test_a_module_is_its_function(
    module: Callable[..., nn.Module],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    path: Path,
) -> None:
    student, teacher, target = make_inputs((5, 23))
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    per_call = {"target": target, "sample_weight": weight}
    built = module(*args, **options, **path.options)
    names = {"dkd_loss": ("alpha", "beta", "temperature")}.get(function.__name__)
    given = dict(zip(names, args, strict=True)) if names else {}
    want = function(student, teacher, *(() if names else args), **given, **options, **per_call, **path.options)
    got = built(student, teacher, target, weight)
    for left, right in zip(values_of(got), values_of(want), strict=True):
        assert torch.equal(left, right)
    if not isinstance(got, tuple) and got.dim() == 0:
        left, right = (
            measured(call, student, teacher)
            for call in (
                lambda s, t, **_: built(s, t, target, weight),
                lambda s, t, **_: function(
                    s, t, *(() if names else args), **given, **options, **per_call, **path.options
                ),
            )
        )
        assert torch.equal(left.gradient, right.gradient)


@DEFAULTS
def test_defaults_are_the_functions(module: Callable[..., nn.Module], function: Callable[..., Any]) -> None:
    student, teacher, target = make_inputs((5, 23), torch.float64)
    want = function(student, teacher, target=target, backend="reference")
    got = module(backend="reference")(student, teacher, target)
    assert torch.equal(got, want)


def test_the_papers_defaults() -> None:
    """Written out: a changed default silently changes everyone's experiments."""
    built = {name: entry[0]() for name, entry in MODULES.items() if entry[0] is not kdkernels.DistillationLoss}
    terms = {name: built[name].objective.terms for name in built}
    assert [term.temperature for term in terms["KDLoss"]] == [4.0]
    assert [term.temperature for term in terms["ReverseKDLoss"]] == [4.0]
    assert [(term.temperature, term.groups) for term in terms["BDDLoss"]] == [(4.0, ((1, 0),)), (4.0, ((0, 1),))]
    (dkd,) = terms["DKDLoss"]
    assert (dkd.temperature, dkd.mass, dkd.groups) == (4.0, (1, 0), ((0, 0), (8, 0)))
    (gdkd,) = terms["GDKDLoss"]
    assert (gdkd.temperature, gdkd.partition.k, gdkd.partition.largest) == (4.0, 5, True)
    assert (gdkd.mass, gdkd.groups) == ((1, 0), ((1, 0), (8, 0)))
    (gdkd3,) = terms["GDKD3Loss"]
    assert (gdkd3.temperature, gdkd3.partition.k, gdkd3.partition.largest) == (4.0, 4, True)
    assert (gdkd3.mass, gdkd3.groups) == ((1, 0), ((0, 0), (1, 0), (8, 0)))


@EACH
def test_modules_have_no_state(
    module: Callable[..., nn.Module], function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    built = module(*args, **options)
    assert built.state_dict() == {}
    assert list(built.parameters()) == []
    assert list(built.buffers()) == []


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
@EACH
def test_modules_are_copied_and_pickled(
    module: Callable[..., nn.Module],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    built = module(*args, backend="reference", **options)
    twin = duplicate(built)
    assert type(twin) is type(built)
    student, teacher, target = make_inputs((5, 23))
    got, want = (values_of(m(student, teacher, target)) for m in (twin, built))
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_repr_shows_the_numbers() -> None:
    text = repr(kdkernels.GDKDLoss(3, temperature=1.5, strategy="worst", reduction="sum", ce_weight=0.25))
    for piece in ("GDKDLoss(", "k=3", "temperature=1.5", "largest=False", "reduction='sum'", "ce_weight=0.25"):
        assert piece in text


def test_modules_nest() -> None:
    """In a parent module: found, moved and switched without error."""
    parent = nn.ModuleDict({"kd": kdkernels.KDLoss(), "dkd": kdkernels.DKDLoss()})
    assert all(isinstance(child, DistillationLoss) for child in parent.values())
    parent.eval().train().to(torch.float64)
    assert parent.state_dict() == {}
