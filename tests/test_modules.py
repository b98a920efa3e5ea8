"""The modules are the functions, with the arguments at construction."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NATIVE_BACKENDS, Path, make_inputs, measured
from torch import nn

import kdkernels
from kdkernels import objective
from kdkernels.modules import LOSSES, OPTIONS, DistillationLoss

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


def saved(module: nn.Module) -> nn.Module:
    """As from a checkpoint, which may hold no more than plain values and this package's classes."""
    file = io.BytesIO()
    torch.save({"loss": module}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["loss"]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled, saved])
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
    for piece in ("GDKDLoss(", "k=3", "temperature=1.5", "strategy='worst'", "reduction='sum'", "ce_weight=0.25"):
        assert piece in text


def test_repr_follows_what_is_set() -> None:
    module = kdkernels.DKDLoss()
    assert repr(module) == "DKDLoss(alpha=1.0, beta=8.0, temperature=4.0, kl_type='forward')"
    module.beta, module.mode, module.denominator = 0.5, "recompute", torch.tensor(3.0)
    text = (
        "DKDLoss(alpha=1.0, beta=0.5, temperature=4.0, kl_type='forward', denominator=a float32 tensor of shape () on"
    )
    assert repr(module) == f"{text} cpu, mode='recompute')"
    module.mode, module.denominator = "fused", None
    assert repr(module) == "DKDLoss(alpha=1.0, beta=0.5, temperature=4.0, kl_type='forward')"


def test_modules_nest() -> None:
    """In a parent module: found, moved and switched without error."""
    parent = nn.ModuleDict({"kd": kdkernels.KDLoss(), "dkd": kdkernels.DKDLoss()})
    assert all(isinstance(child, DistillationLoss) for child in parent.values())
    parent.eval().train().to(torch.float64)
    assert parent.state_dict() == {}


# Attributes ---------------------------------------------------------------------------------------------------------

#: For each parameter of a loss another value than its default.
OTHERS: dict[str, Any] = {
    "temperature": 2.5,
    "forward_temperature": 2.5,
    "reverse_temperature": 1.5,
    "forward_weight": 0.5,
    "reverse_weight": 0.25,
    "alpha": 0.5,
    "beta": 2.0,
    "kl_type": "both",
    "k": 3,
    "w0": 0.5,
    "w1": 2.0,
    "w2": 3.0,
    "strategy": "worst",
}
#: For each option other values than its default, with what else has to be set for it.
OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "weight": {"weight": 0.5},
    "square_temperature": {"square_temperature": False},
    "standardize": {"standardize": "sample"},
    "correction": {"standardize": "sample", "correction": 0},
    "eps": {"standardize": "sample", "eps": 0.5},
    "ce_weight": {"ce_weight": 0.75},
    "reduction": {"reduction": "none"},
    "denominator": {"denominator": 3},
    "ignore_index": {"ignore_index": 3},
    "class_dim": {"class_dim": 0},
    "num_classes": {"num_classes": 20},
    "process_group": {"process_group": None},
    "mode": {"mode": "recompute"},
    "backend": {"backend": "reference"},
    "return_parts": {"return_parts": True},
}
SQUARE = make_inputs((23, 23), torch.float64)
SQUARE.target.remainder_(20)
WITH_PARAMETERS = [(loss, name) for loss, row in LOSSES.items() for name in row.module.parameter_names]


def test_the_table_has_every_loss() -> None:
    """A row's function, module and preset have the same parameters, in the same order and with the same defaults."""
    functions = {getattr(kdkernels, name) for name in kdkernels.__all__ if name.endswith("_loss")}
    assert {row.function for row in LOSSES.values()} == functions - {kdkernels.distillation_loss}
    for name, row in LOSSES.items():
        assert row.function.__name__ == f"{name}_loss"
        assert getattr(kdkernels, row.module.__name__) is row.module
        written = [
            {
                parameter.name: parameter.default
                for parameter in inspect.signature(of).parameters.values()
                if parameter.name not in ("student_logits", "teacher_logits", "target", "options")
            }
            for of in (row.function, row.module, getattr(objective, name))
        ]
        assert list(written[0].items()) == list(written[1].items()) == list(written[2].items())
        assert tuple(written[0]) == row.module.parameter_names


@pytest.mark.parametrize(("loss", "name"), WITH_PARAMETERS)
def test_a_parameter_is_an_attribute(loss: str, name: str) -> None:
    """Of a module it can be read and set, and the next call heeds it."""
    row, (student, teacher, target) = LOSSES[loss], SQUARE
    module = row.module()
    assert getattr(module, name) == inspect.signature(row.module).parameters[name].default
    before = module(student, teacher, target)
    setattr(module, name, OTHERS[name])
    assert getattr(module, name) == OTHERS[name]
    want = row.function(student, teacher, target=target, **{name: OTHERS[name]})
    assert want != before
    assert module(student, teacher, target) == want
    assert row.module(**{name: OTHERS[name]})(student, teacher, target) == want


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_an_option_is_an_attribute(loss: str, name: str) -> None:
    row, (student, teacher, target) = LOSSES[loss], SQUARE
    module = row.module()
    assert getattr(module, name) == OPTIONS[name]
    for option, value in OTHER_OPTIONS[name].items():
        setattr(module, option, value)
        assert getattr(module, option) == value
    want = row.function(student, teacher, target=target, **OTHER_OPTIONS[name])
    got = module(student, teacher, target)
    assert all(torch.equal(*pair) for pair in zip(values_of(got), values_of(want), strict=True))
    if name not in ("process_group", "mode", "backend", "return_parts"):
        assert not torch.equal(values_of(got)[0], values_of(row.module()(student, teacher, target))[0])


def test_an_objective_is_an_attribute() -> None:
    student, teacher, target = SQUARE
    module = kdkernels.DistillationLoss(objective.kd())
    module.objective = objective.dkd(0.5, 2.0, 3.0)
    assert module(student, teacher, target) == kdkernels.dkd_loss(student, teacher, target, 0.5, 2.0, 3.0)
    with pytest.raises(AttributeError, match="objective"):
        kdkernels.KDLoss().objective = objective.dkd()


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, np.array, torch.tensor], ids=lambda f: f.__name__)
def test_attributes_are_python_numbers(number: Callable[[int], Any]) -> None:
    """Whatever kind of number they were given as: a tensor that changes later changes no module."""
    module = kdkernels.GDKDLoss(temperature=number(3))
    module.w2 = module.weight = number(2)
    assert {type(module.temperature), type(module.w2), type(module.weight)} == {float}
    assert (module.temperature, module.w2, module.weight) == (3, 2, 2)
    module.k = torch.tensor(4) if number is torch.tensor else np.int64(4)
    assert type(module.k) is int
    kept = torch.tensor(3.0)
    module.temperature = kept
    kept.fill_(1.0)
    assert module.temperature == 3.0


def test_what_torch_sets_on_modules() -> None:
    module = kdkernels.KDLoss()
    module.training = False
    module.register_buffer("steps", torch.zeros(1))
    module.register_parameter("scale", nn.Parameter(torch.ones(1)))
    module.helper = nn.Linear(2, 2)
    module.callback = print
    module.forward = module.forward
    module._private = 3
    handle = module.register_forward_hook(lambda *_: None)
    handle.remove()
    module.requires_grad_(False).double().train()
    assert set(module.state_dict()) == {"steps", "scale", "helper.weight", "helper.bias"}
    module.steps = torch.ones(1)
    assert module.steps == 1


class Annealed(kdkernels.KDLoss):
    """A user's own: what it adds is its own business, and the arguments stay what they are."""

    def __init__(self, rate: float) -> None:
        super().__init__(4.0, reduction="sum")
        self.rate = rate

    def forward(self, *args: Any) -> Any:
        self.temperature *= self.rate
        return super().forward(*args)


def test_subclasses() -> None:
    student, teacher, _ = SQUARE
    module = copy.deepcopy(Annealed(0.5))
    for temperature in (2.0, 1.0):
        assert module(student, teacher) == kdkernels.kd_loss(student, teacher, temperature, reduction="sum")
    with pytest.raises(ValueError, match="temperature must be"):
        module.temperature = 0


@pytest.mark.parametrize("backend", ["reference", *NATIVE_BACKENDS])
def test_compiled_modules_heed_what_is_set(backend: str) -> None:
    student, teacher, target = make_inputs((5, 23))
    module = kdkernels.DKDLoss(backend=backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(4):
        module.temperature = 4.0 - step / 2
        torch.testing.assert_close(compiled(student, teacher, target), module(student, teacher, target))
    if backend == "reference":  # plain PyTorch: one graph of the first numbers, one of any
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
