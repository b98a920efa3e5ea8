"""The losses as ``torch.nn`` modules: arguments at construction, tensors in ``forward``.

Every argument of a module is an attribute: it can be read and set, is checked when set, and takes effect in the next
call. The numbers among them are kept as Python numbers. Modules are copied, pickled and saved like any other module;
copies share a process group, which is left out of pickles (see :class:`~kdkernels.distributed.GroupReference`).
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from kdkernels import functional, objective
from kdkernels._describe import describe, short
from kdkernels.dispatch import BACKENDS
from kdkernels.distributed import NOT_PICKLED, GroupReference, ProcessGroup, is_process_group
from kdkernels.functional import Loss, LossOptions, distillation_loss
from kdkernels.objective import Objective, Partition, Term
from kdkernels.validation import MODES, REDUCTIONS

_PER_CALL = ("target", "sample_weight")
#: The options of every module, with their defaults.
OPTIONS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(distillation_loss).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _PER_CALL
}


class DistillationLoss(nn.Module):
    """Any :class:`~kdkernels.objective.Objective` as a module.

    Args:
        objective: what to compute.
        options: the keyword arguments of :func:`~kdkernels.functional.distillation_loss`, except ``target`` and
            ``sample_weight``, which belong to the call.

    Every argument is an attribute that can be set: ``loss.ce_weight = 0.5``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, at construction or when set.
        AttributeError: a number, string or tensor is set that is no argument of the module (of this package's classes;
            a class derived from them may have what it likes).
    """

    objective: Objective
    weight: float
    square_temperature: bool
    standardize: str | None
    correction: int | None
    eps: float | None
    ce_weight: float | None
    reduction: str
    denominator: float | Tensor | None
    ignore_index: int
    class_dim: int | None
    num_classes: int | None
    mode: str
    backend: str
    return_parts: bool
    _changed: dict[str, Any]
    _process_group: GroupReference

    #: Names of the arguments that are no options.
    parameter_names: ClassVar[tuple[str, ...]] = ("objective",)

    def __init__(self, objective: Objective, **options: Unpack[LossOptions]) -> None:
        super().__init__()
        self._set_arguments({"objective": objective}, options)

    def _set_arguments(self, parameters: dict[str, Any], options: Mapping[str, Any]) -> None:
        kind = type(self).__name__
        for name in options:
            if name in _PER_CALL:
                raise TypeError(f"{name} is an argument of forward(), not of {kind}()")
            if name not in OPTIONS:
                raise TypeError(f"{kind}() got an unexpected keyword argument {name!r}")
        arguments = self._checked(parameters)
        arguments |= {name: _checked_option(name, options.get(name, default)) for name, default in OPTIONS.items()}
        for name, value in arguments.items():
            super().__setattr__(name, value)
        self._refresh()

    def _refresh(self) -> None:
        """Collects the options that differ from their defaults: to do so in each call would make it slower."""
        values = {name: getattr(self, name) for name in OPTIONS if name != "process_group"}
        changed = {name: value for name, value in values.items() if _differ(value, OPTIONS[name])}
        super().__setattr__("_changed", changed)  # a new one: copies of a module share the old one

    @classmethod
    def _checked(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters as they are kept; TypeError or ValueError where one does not fit."""
        if not isinstance(parameters["objective"], Objective):
            raise TypeError(f"objective must be a kdkernels.Objective, got {describe(parameters['objective'])}")
        return parameters

    @property
    def process_group(self) -> ProcessGroup | None:
        """The group whose processes share the statistics of classes; not pickled, to be set again where it was."""
        return self._process_group.group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._process_group = GroupReference(group)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            value = _checked_option(name, value)
        elif name in self.parameter_names:
            parameters = {other: getattr(self, other) for other in self.parameter_names}
            value = self._checked(parameters | {name: value})[name]
        elif type(self).__module__ == __name__ and _looks_like_an_option(name, value) and not hasattr(self, name):
            names = ", ".join((*self.parameter_names, *OPTIONS))
            raise AttributeError(f"{type(self).__name__} has no argument {name!r}; it has {names}")
        super().__setattr__(name, value)
        if name in OPTIONS or name in self.parameter_names:
            self._refresh()

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Loss:
        """The loss of :func:`~kdkernels.functional.distillation_loss` for these tensors."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            self.objective,
            target=target,
            sample_weight=sample_weight,
            process_group=self._process_group.group,
            **self._changed,
        )

    def extra_repr(self) -> str:
        names = [name for name in OPTIONS if _differ(getattr(self, name), OPTIONS[name])]
        values = {name: getattr(self, name) for name in (*self.parameter_names, *names)}
        return ", ".join(f"{name}={value if name == 'objective' else short(value)}" for name, value in values.items())


def _differ(value: Any, default: Any) -> bool:
    return value is not default and (isinstance(value, Tensor) or value != default)


def _looks_like_an_option(name: str, value: object) -> bool:
    """Whether to take an attribute that no argument has for a mistake. DeepSpeed numbers modules by ``ds_`` names."""
    plain = isinstance(value, (numbers.Number, str, Tensor)) and not isinstance(value, nn.Parameter)
    return plain and not name.startswith(("_", "ds_"))


def _choice(choices: tuple[object, ...]) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        objective.check_choice(name, value, choices)
        return value

    return check


def _denominator(name: str, value: Any) -> float | Tensor:
    if not isinstance(value, Tensor):
        return objective.check_number(name, value, at_least=0.0)
    if value.dim() != 0 or value.is_complex():
        raise ValueError(f"{name} must be a number >= 0 or a 0-d real tensor, got {describe(value)}")
    return value.detach()


def _process_group(name: str, value: Any) -> ProcessGroup:
    if not is_process_group(value) and value != NOT_PICKLED:
        expected = "None or a torch.distributed.ProcessGroup this process is in"
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")
    return value


#: What an option's value is checked by when it is set. What depends on a call's tensors is checked by the call.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "weight": objective.check_weight,
    "square_temperature": objective.check_bool,
    "standardize": _choice(objective.STANDARDIZE),
    "correction": lambda name, value: objective.check_integer(name, value, at_least=0),
    "eps": lambda name, value: objective.check_number(name, value, at_least=0.0, at_most=objective.MAX_WEIGHT),
    "ce_weight": objective.check_weight,
    "reduction": _choice(REDUCTIONS),
    "denominator": _denominator,
    "ignore_index": objective.check_integer,
    "class_dim": objective.check_integer,
    "num_classes": lambda name, value: objective.check_integer(name, value, at_least=1),
    "process_group": _process_group,
    "mode": _choice(MODES),
    "backend": _choice(BACKENDS),
    "return_parts": objective.check_bool,
}


def _checked_option(name: str, value: Any) -> Any:
    if value is None and OPTIONS[name] is None:
        return None
    return _CHECKS[name](name, value)


class _NamedLoss(DistillationLoss):
    """A loss whose objective is a preset's, for the parameters that the module has now."""

    #: The preset, whose parameters are the module's.
    preset: ClassVar[Callable[..., Objective]]
    #: Parameters that are kept as floats: of an integer attribute torch.compile makes a new graph for each value.
    _floats: ClassVar[frozenset[str]]
    _objective: Objective

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "preset" in cls.__dict__:
            parameters = inspect.signature(cls.preset).parameters
            cls.parameter_names = tuple(parameters)
            cls._floats = frozenset(name for name, each in parameters.items() if isinstance(each.default, float))

    def __init__(self, parameters: dict[str, Any], options: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self._set_arguments(parameters, options)

    @classmethod
    def _checked(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        cls.preset(**parameters)
        plain = {name: objective.plain(name, value) for name, value in parameters.items()}
        return {name: float(value) if name in cls._floats else value for name, value in plain.items()}

    def _refresh(self) -> None:
        super()._refresh()
        nn.Module.__setattr__(self, "_objective", self._built())

    def _built(self) -> Objective:
        return self.preset(*[getattr(self, name) for name in self.parameter_names])

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        """What the module computes, before its options."""
        # While traced it is built of the parameters, so that a graph depends on no number that was built in.
        return self._built() if torch.compiler.is_compiling() else self._objective


class KDLoss(_NamedLoss):
    """Module of :func:`~kdkernels.functional.kd_loss`."""

    preset = staticmethod(objective.kd)
    temperature: float

    def __init__(self, temperature: float = 4.0, **options: Unpack[LossOptions]) -> None:
        super().__init__({"temperature": temperature}, options)


class ReverseKDLoss(_NamedLoss):
    """Module of :func:`~kdkernels.functional.reverse_kd_loss`."""

    preset = staticmethod(objective.reverse_kd)
    temperature: float

    def __init__(self, temperature: float = 4.0, **options: Unpack[LossOptions]) -> None:
        super().__init__({"temperature": temperature}, options)


class BDDLoss(_NamedLoss):
    """Module of :func:`~kdkernels.functional.bdd_loss`."""

    preset = staticmethod(objective.bdd)
    forward_weight: float
    reverse_weight: float
    forward_temperature: float
    reverse_temperature: float

    def __init__(
        self,
        forward_weight: float = 1.0,
        reverse_weight: float = 1.0,
        forward_temperature: float = 4.0,
        reverse_temperature: float = 4.0,
        **options: Unpack[LossOptions],
    ) -> None:
        parameters = {
            "forward_weight": forward_weight,
            "reverse_weight": reverse_weight,
            "forward_temperature": forward_temperature,
            "reverse_temperature": reverse_temperature,
        }
        super().__init__(parameters, options)


class DKDLoss(_NamedLoss):
    """Module of :func:`~kdkernels.functional.dkd_loss`."""

    preset = staticmethod(objective.dkd)
    alpha: float
    beta: float
    temperature: float
    kl_type: str

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        kl_type: str = "forward",
        **options: Unpack[LossOptions],
    ) -> None:
        parameters = {"alpha": alpha, "beta": beta, "temperature": temperature, "kl_type": kl_type}
        super().__init__(parameters, options)


class _GDKDLoss(_NamedLoss):
    """What the two modules of GDKD share."""

    k: int
    w0: float
    w1: float
    w2: float
    temperature: float
    strategy: str
    kl_type: str


class GDKDLoss(_GDKDLoss):
    """Module of :func:`~kdkernels.functional.gdkd_loss`."""

    preset = staticmethod(objective.gdkd)

    def __init__(
        self,
        k: int = 5,
        w0: float = 1.0,
        w1: float = 1.0,
        w2: float = 8.0,
        temperature: float = 4.0,
        *,
        strategy: str = "best",
        kl_type: str = "forward",
        **options: Unpack[LossOptions],
    ) -> None:
        parameters = {"k": k, "w0": w0, "w1": w1, "w2": w2, "temperature": temperature}
        super().__init__(parameters | {"strategy": strategy, "kl_type": kl_type}, options)


class GDKD3Loss(_GDKDLoss):
    """Module of :func:`~kdkernels.functional.gdkd3_loss`."""

    preset = staticmethod(objective.gdkd3)

    def __init__(
        self,
        k: int = 4,
        w0: float = 1.0,
        w1: float = 1.0,
        w2: float = 8.0,
        temperature: float = 4.0,
        *,
        strategy: str = "best",
        kl_type: str = "forward",
        **options: Unpack[LossOptions],
    ) -> None:
        parameters = {"k": k, "w0": w0, "w1": w1, "w2": w2, "temperature": temperature}
        super().__init__(parameters | {"strategy": strategy, "kl_type": kl_type}, options)


class NamedLoss(NamedTuple):
    """One row of the table of losses: a module and its function. Both have the parameters of the module's preset."""

    module: type[DistillationLoss]
    function: Callable[..., Loss]


#: The losses with a name, of which a new one is a row here, a preset, a function and a module.
LOSSES: dict[str, NamedLoss] = {
    "kd": NamedLoss(KDLoss, functional.kd_loss),
    "reverse_kd": NamedLoss(ReverseKDLoss, functional.reverse_kd_loss),
    "bdd": NamedLoss(BDDLoss, functional.bdd_loss),
    "dkd": NamedLoss(DKDLoss, functional.dkd_loss),
    "gdkd": NamedLoss(GDKDLoss, functional.gdkd_loss),
    "gdkd3": NamedLoss(GDKD3Loss, functional.gdkd3_loss),
}

# torch.load(weights_only=True) loads these: they hold plain values, and their classes check nothing but that.
torch.serialization.add_safe_globals(
    [DistillationLoss, Objective, Term, Partition, GroupReference, *(loss.module for loss in LOSSES.values())]
)
