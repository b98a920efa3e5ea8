"""What a distillation loss *is*: a few numbers.

Every loss of this package is one :class:`Objective`: an optional standardisation of the logits, one or
more :class:`Term` s and a cross-entropy weight. A term compares student and teacher at one temperature
over one :class:`Partition` of the classes:

    T^2 * ( m_f * KL(Qt || Qs) + m_r * KL(Qs || Qt)
            + sum over groups g of  f_g * KL(pt_g || ps_g) + r_g * KL(ps_g || pt_g) )

and the loss is ``ce_weight * CE + weight * (sum of the terms)``.

``Q`` are the softmax masses of the groups, ``p_g`` the softmax inside group ``g``, ``s`` student, ``t``
teacher. Backends read these numbers and never a loss's name; a new loss of the family is a new preset
at the end of this file.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from kdkernels._describe import describe, short

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: Groups of each kind of partition. The last one is "all the other classes".
GROUPS: dict[str, tuple[str, ...]] = {
    "whole": ("whole",),
    "target": ("target", "rest"),
    "topk": ("top", "rest"),
    "top1_topk": ("top1", "top", "rest"),
}
_KINDS = tuple(GROUPS)
STANDARDIZE = (None, "class", "sample")
_STANDARDIZE_DEFAULTS = {None: (0, 0.0), "class": (0, 1e-5), "sample": (1, 1e-7)}
KL_TYPES = ("forward", "reverse", "both")
STRATEGIES = {"best": True, "worst": False}


#: Temperatures and weights that float32 arithmetic serves: T^2 * weight of any of them is a float32 number.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
MAX_WEIGHT = 1e24
#: Terms that an objective may have: the CPU kernels' kMaxTerms.
MAX_TERMS = 8
_INT64 = (-(2**63), 2**63 - 1)


def plain(name: str, value: object) -> object:
    """The Python number of a NumPy scalar, 0-d array or 0-d tensor; anything else as it is.

    Raises:
        TypeError: a tensor that requires grad, of which a number would be a constant.
        ValueError: a tensor that is not on the CPU, whose value the host would have to wait for.
    """
    if getattr(value, "shape", None) != ():
        return value
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            raise TypeError(
                f"{name} must not require grad, got requires_grad=True: a learnable {name} is not supported yet. "
                f"Pass a number or {name}.detach()"
            )
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} must be a number or a 0-d CPU tensor, got {describe(value)}: reading it would wait for the "
                f"device. Pass {name}.item() if that is meant"
            )
    return value.item()  # type: ignore[attr-defined]


def check_number(name: str, value: object, *, at_least: float | None = None, at_most: float | None = None) -> float:
    """``value``, a number, NumPy scalar or 0-d CPU tensor, as a float in the bounds; else TypeError / ValueError."""
    number = value if isinstance(value, (int, float)) else plain(name, value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    # No math.isfinite: torch.compile cannot trace it for a dynamic float, and it raises for large integers.
    if not -sys.float_info.max <= number <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {short(number)}")
    if at_least is not None and not number >= at_least:
        raise ValueError(f"{name} must be >= {at_least:g}, got {short(number)}")
    if at_most is not None and not number <= at_most:
        raise ValueError(f"{name} must be <= {at_most:g}, got {short(number)}")
    return float(number)


def check_temperature(name: str, value: object) -> float:
    """``value`` as a temperature; TypeError / ValueError if it is none that float32 arithmetic serves."""
    return check_number(name, value, at_least=MIN_TEMPERATURE, at_most=MAX_TEMPERATURE)


def check_weight(name: str, value: object) -> float:
    """``value`` as a weight; TypeError / ValueError if it is none that float32 arithmetic serves."""
    return check_number(name, value, at_least=0.0, at_most=MAX_WEIGHT)


def check_integer(name: str, value: object, *, at_least: int = _INT64[0]) -> int:
    """``value``, an integer, NumPy scalar or 0-d CPU tensor, as an int of 64 bits; else TypeError / ValueError."""
    if type(value) is int and at_least <= value <= _INT64[1]:
        return value
    number = value if isinstance(value, int) else plain(name, value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if number < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {short(number)}")
    if number > _INT64[1]:
        raise ValueError(f"{name} must be <= {_INT64[1]}, got {short(number)}")
    return number


def check_bool(name: str, value: object) -> bool:
    """``value`` if it is a bool, else TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {describe(value)}")
    return value


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if not ((value is None or isinstance(value, str)) and value in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {short(value)}")


def _store_plain(owner: object, field: str, number: float) -> None:
    """Replaces a NumPy scalar or tensor in a frozen dataclass by the number it was checked to be."""
    if not isinstance(getattr(owner, field), (int, float)):
        object.__setattr__(owner, field, number)


@dataclass(frozen=True)
class Partition:
    """How the classes of one sample split into groups.

    Args:
        kind: ``"whole"`` (one group), ``"target"`` ({y}, {rest}), ``"topk"`` ({teacher's top k}, {rest}) or
            ``"top1_topk"`` ({top 1}, {top 2..k}, {rest}).
        k: for the top-k kinds, how many classes lead, ``1 <= k < C`` (``2 <= k < C`` for ``"top1_topk"``);
            otherwise 0. Ties go to the lowest class index.
        largest: take the k largest teacher logits (True) or the k smallest (False).
    """

    kind: str
    k: int = 0
    largest: bool = True

    def __post_init__(self) -> None:
        check_choice("Partition.kind", self.kind, _KINDS)
        check_bool("Partition.largest", self.largest)
        if self.kind in ("topk", "top1_topk"):
            _store_plain(self, "k", check_integer("k", self.k, at_least=1 if self.kind == "topk" else 2))
        elif self.k != 0:
            raise ValueError(f"Partition.k must be 0 for kind {self.kind!r}, got {short(self.k)}")

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, in the order of a term's weights."""
        return GROUPS[self.kind]


WHOLE = Partition("whole")
TARGET = Partition("target")


@dataclass(frozen=True)
class Term:
    """One comparison of student and teacher.

    Args:
        temperature: T, which the logits are divided by, from 1e-6 to 1e6.
        partition: the groups of classes.
        mass: ``(m_f, m_r)``, weights of the forward and reverse KL between the groups' masses, each from 0 to 1e24.
        groups: one ``(f_g, r_g)`` a group, weights of the forward and reverse KL inside it, each from 0 to 1e24.
        square_temperature: multiply the term by T^2, the papers' factor.

    A number may be a NumPy scalar or a 0-d CPU tensor that does not require grad. Within the bounds T^2 times a weight
    is a float32 number.

    Raises:
        TypeError, ValueError: naming the number that does not fit.
    """

    temperature: float
    partition: Partition
    mass: tuple[float, float] = (0.0, 0.0)
    groups: tuple[tuple[float, float], ...] = ((1.0, 0.0),)
    square_temperature: bool = True

    def __post_init__(self) -> None:
        _store_plain(self, "temperature", check_temperature("temperature", self.temperature))
        if not isinstance(self.partition, Partition):
            raise TypeError(f"Term.partition must be a Partition, got {describe(self.partition)}")
        mass = _check_pair("Term.mass", self.mass)
        if not isinstance(self.groups, tuple):
            raise TypeError(f"Term.groups must be a tuple of (forward, reverse) pairs, got {describe(self.groups)}")
        names = self.partition.groups
        if len(self.groups) != len(names):
            raise ValueError(
                f"Term.groups must have one (forward, reverse) pair for each of the {len(names)} groups {names} of "
                f"partition {self.partition.kind!r}, got {len(self.groups)}: {short(self.groups)}"
            )
        groups = [_check_pair(f"Term.groups[{name!r}]", pair) for name, pair in zip(names, self.groups, strict=True)]
        if not all(isinstance(weight, (int, float)) for pair in (self.mass, *self.groups) for weight in pair):
            object.__setattr__(self, "mass", mass)
            object.__setattr__(self, "groups", tuple(groups))
        check_bool("Term.square_temperature", self.square_temperature)

    @property
    def scale(self) -> float:
        """T^2, or 1 with ``square_temperature=False``."""
        return float(self.temperature) ** 2 if self.square_temperature else 1.0

    @property
    def direction(self) -> str:
        """``"forward"``, ``"reverse"`` or ``"both"``: the KL directions that carry weight."""
        forward = self.mass[0] != 0 or any(f != 0 for f, _ in self.groups)
        reverse = self.mass[1] != 0 or any(r != 0 for _, r in self.groups)
        return "both" if forward and reverse else "reverse" if reverse else "forward"

    def part_mixes(self) -> tuple[tuple[float, float], ...]:
        """Share of the forward and of the reverse KL in each reported part: the mass, then the groups.

        A part without weight is still reported, in the direction of the term's other groups.
        """
        fallback = (0.0, 1.0) if any(r for _, r in self.groups) and not any(f for f, _ in self.groups) else (1.0, 0.0)
        mixes = [_mix(self.mass, (1.0, 0.0))]
        mixes += [_mix(pair, fallback) for pair in self.groups]
        return tuple(mixes)


def _mix(pair: tuple[float, float], fallback: tuple[float, float]) -> tuple[float, float]:
    total = pair[0] + pair[1]
    return (pair[0] / total, pair[1] / total) if total else fallback


def _check_pair(name: str, pair: object) -> tuple[float, float]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"{name} must be a (forward, reverse) pair of numbers, got {describe(pair)}")
    return check_weight(f"{name}[0]", pair[0]), check_weight(f"{name}[1]", pair[1])


@dataclass(frozen=True)
class Objective:
    """A whole distillation loss, as data.

    Args:
        terms: one to eight terms; the loss is their sum, times ``weight``, and the cross entropy, times ``ce_weight``.
            GPU kernels serve up to two; with more, GPU tensors are served by the reference backend.
        standardize: ``None``, ``"class"`` (each class over the valid samples of the batch, perception
            reconstruction) or ``"sample"`` (each sample over its classes, logit standardisation), applied to the
            logits the terms see.
        correction: Bessel's correction of the variance; default 0 for ``"class"``, 1 for ``"sample"``.
        eps: default 1e-5 (inside the root) for ``"class"``, 1e-7 (added to the deviation) for ``"sample"``.
        ce_weight: weight from 0 to 1e24 of the cross entropy of the raw student logits with the target, at T = 1.
        weight: weight from 0 to 1e24 of all terms. The reported parts are unweighted.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """

    terms: tuple[Term, ...]
    standardize: str | None = None
    correction: int | None = None
    eps: float | None = None
    ce_weight: float = 0.0
    weight: float = 1.0

    #: Whether the loss cannot be computed without a target.
    needs_target: ClassVar[bool]
    #: The least number of classes for which every partition of this objective exists.
    smallest_class_count: ClassVar[int]

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple) or not all(isinstance(term, Term) for term in self.terms):
            raise TypeError(f"Objective.terms must be a tuple of Terms, got {describe(self.terms)}")
        if not 1 <= len(self.terms) <= MAX_TERMS:
            raise ValueError(f"Objective.terms must hold 1 to {MAX_TERMS} Terms, got {len(self.terms)}")
        check_choice("standardize", self.standardize, STANDARDIZE)
        correction, eps = _STANDARDIZE_DEFAULTS[self.standardize]
        if self.correction is None:
            object.__setattr__(self, "correction", correction)
        if self.eps is None:
            object.__setattr__(self, "eps", eps)
        _store_plain(self, "correction", check_integer("correction", self.correction, at_least=0))
        _store_plain(self, "eps", check_number("eps", self.eps, at_least=0.0, at_most=MAX_WEIGHT))
        _store_plain(self, "ce_weight", check_weight("ce_weight", self.ce_weight))
        _store_plain(self, "weight", check_weight("weight", self.weight))
        if self.weight != 1:
            for weight in (weight for term in self.terms for pair in (term.mass, *term.groups) for weight in pair):
                check_weight("weight times a term's weight", self.weight * weight)
        # Beside the fields, which torch.compile rebuilds an objective from.
        partitions = [term.partition for term in self.terms]
        needs_target = self.ce_weight != 0 or any(partition.kind == "target" for partition in partitions)
        object.__setattr__(self, "needs_target", needs_target)
        object.__setattr__(self, "smallest_class_count", max(partition.k for partition in partitions) + 1)

    def __reduce__(self) -> tuple[type[Objective], tuple[object, ...]]:
        """Pickles the arguments alone: what is derived from them is the loading version's own."""
        arguments = (self.terms, self.standardize, self.correction, self.eps, self.ce_weight, self.weight)
        return Objective, arguments

    def part_names(self) -> tuple[tuple[str, ...], ...]:
        """Names of the loss parts, one tuple a term (mass first); ``""`` for the mass of a single group.

        Of more than one term they end with the term's number, ``_1`` and so on, or with ``_forward`` and ``_reverse``
        where that tells two terms apart.
        """
        directions = [term.direction for term in self.terms]
        suffixes = [f"_{i}" for i in range(1, len(directions) + 1)] if len(directions) > 1 else [""]
        if sorted(directions) == ["forward", "reverse"]:
            suffixes = [f"_{direction}" for direction in directions]
        names = []
        for term, suffix in zip(self.terms, suffixes, strict=True):
            groups = term.partition.groups
            mass = f"mass{suffix}" if len(groups) > 1 else ""
            names.append((mass, *(f"{group}{suffix}" for group in groups)))
        return tuple(names)

    def encode(self) -> tuple[Sequence[int], Tensor]:
        """The objective as the ops take it, which ``csrc/common/objective.h`` decodes.

        Integers that decide its structure, and its numbers, a float64 tensor on the CPU: as an operand they may change
        under ``torch.compile`` without another compilation.
        """
        if torch.compiler.is_compiling():
            # A factor of a tensor stays symbolic where an element of torch.tensor() would become a constant.
            one = torch.ones(1, dtype=torch.float64)
            return _structure(self), torch.cat([one * number for number in _numbers(self)])
        encoded = self.__dict__.get("_encoded")
        traced = torch._C._len_torch_dispatch_stack() > 0  # by a mode such as that of fake tensors, which makes its own
        if encoded is None or traced:
            encoded = _Structure(_structure(self)), torch.tensor(_numbers(self), dtype=torch.float64)
            if not traced:
                object.__setattr__(self, "_encoded", encoded)
        return encoded


class _Structure(tuple):
    """A tuple of integers that torch's pytrees take for one leaf, as the transforms of torch.func need it."""


def _structure(objective: Objective) -> list[int]:
    """Whether there is a cross entropy, standardisation, correction; of each term kind, k, largest, and the first term
    with the same temperature."""
    assert objective.correction is not None
    temperatures = [term.temperature for term in objective.terms]
    structure = [int(objective.ce_weight != 0), STANDARDIZE.index(objective.standardize), objective.correction]
    for term in objective.terms:
        partition, first = term.partition, temperatures.index(term.temperature)
        structure += [_KINDS.index(partition.kind), partition.k, int(partition.largest), first]
    return structure


def _numbers(objective: Objective) -> list[float]:
    assert objective.eps is not None
    numbers = [objective.ce_weight, objective.weight, objective.eps]
    for term in objective.terms:
        numbers += [term.temperature, term.scale]
        numbers += [weight for pair in (term.mass, *term.groups) for weight in pair]
    return numbers


#: Types that a remembered result may depend on: their values cannot change.
_IMMUTABLE = frozenset({float, int, bool, str, type(None), Objective})


def _memoized(build: Callable[_P, _R]) -> Callable[_P, _R]:
    """Presets are built in every training step: keep the last few (they are immutable).

    Of arguments of other types nothing is kept: a tensor may hold another value the next time.
    """

    def build_to_keep(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not _IMMUTABLE.issuperset(map(type, (*args, *kwargs.values()))):
            raise TypeError("not to be remembered")
        return build(*args, **kwargs)

    remembered = functools.lru_cache(maxsize=256, typed=True)(build_to_keep)

    @functools.wraps(build)
    def preset(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.compiler.is_compiling():
            try:
                return remembered(*args, **kwargs)  # type: ignore[arg-type]
            except TypeError:
                pass  # unhashable, not to be remembered, or wrong: the validation says what is wrong
        return build(*args, **kwargs)

    return preset


@_memoized
def adjust(
    objective: Objective,
    standardize: str | None = None,
    correction: int | None = None,
    eps: float | None = None,
    ce_weight: float | None = None,
    weight: float = 1.0,
    square_temperature: bool = True,
) -> Objective:
    """``objective`` with the given fields replaced; None keeps what it has.

    ``weight`` multiplies that of the terms; ``square_temperature=False`` drops T^2 from all of them.
    """
    check_choice("standardize", standardize, STANDARDIZE)
    if standardize is None and (correction is not None or eps is not None) and objective.standardize is None:
        name, value = ("correction", correction) if correction is not None else ("eps", eps)
        raise ValueError(f"{name} is used only with standardize='class' or 'sample', got {name}={short(value)}")
    if standardize is not None and standardize != objective.standardize:
        base_correction, base_eps = None, None
    else:
        standardize, base_correction, base_eps = objective.standardize, objective.correction, objective.eps
    terms = objective.terms
    if not check_bool("square_temperature", square_temperature):
        terms = tuple(Term(t.temperature, t.partition, t.mass, t.groups, square_temperature=False) for t in terms)
    return Objective(
        terms=terms,
        standardize=standardize,
        correction=base_correction if correction is None else correction,
        eps=base_eps if eps is None else eps,
        ce_weight=objective.ce_weight if ce_weight is None else ce_weight,
        weight=objective.weight * check_weight("weight", weight),
    )


# Presets ---------------------------------------------------------------------------------------------------------


@_memoized
def kd(temperature: float = 4.0) -> Objective:
    """Knowledge distillation (Hinton et al. 2015): T^2 * KL(teacher || student)."""
    return Objective((Term(temperature, WHOLE),))


@_memoized
def reverse_kd(temperature: float = 4.0) -> Objective:
    """Reverse KD: T^2 * KL(student || teacher)."""
    return Objective((Term(temperature, WHOLE, groups=((0.0, 1.0),)),))


@_memoized
def symmetric_kd(temperature: float = 4.0) -> Objective:
    """Half forward, half reverse KD (``kl_type="both"`` of the GDKD repository)."""
    return Objective((Term(temperature, WHOLE, groups=((0.5, 0.5),)),))


@_memoized
def bdd(
    forward_weight: float = 1.0,
    reverse_weight: float = 1.0,
    forward_temperature: float = 4.0,
    reverse_temperature: float = 4.0,
) -> Objective:
    """Balance Divergence (Qi et al., arXiv 2501.07804): a forward and a reverse KL with a temperature each."""
    forward_weight = check_weight("forward_weight", forward_weight)
    reverse_weight = check_weight("reverse_weight", reverse_weight)
    forward_temperature = check_temperature("forward_temperature", forward_temperature)
    reverse_temperature = check_temperature("reverse_temperature", reverse_temperature)
    forward = Term(forward_temperature, WHOLE, groups=((forward_weight, 0.0),))
    reverse = Term(reverse_temperature, WHOLE, groups=((0.0, reverse_weight),))
    return Objective((forward, reverse))


@_memoized
def dkd(alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, kl_type: str = "forward") -> Objective:
    """Decoupled KD (Zhao et al., CVPR 2022): alpha * target mass KL + beta * non-target KL."""
    alpha, beta = check_weight("alpha", alpha), check_weight("beta", beta)
    return Objective((Term(temperature, TARGET, (alpha, 0.0), ((0.0, 0.0), _weigh(beta, kl_type))),))


@_memoized
def gdkd(
    k: int = 5,
    w0: float = 1.0,
    w1: float = 1.0,
    w2: float = 8.0,
    temperature: float = 4.0,
    strategy: str = "best",
    kl_type: str = "forward",
) -> Objective:
    """Generalised DKD (Zheng & Cheng, arXiv 2512.04625): mass, teacher's top-k and rest, weighed by w0, w1, w2."""
    w0, w1, w2 = check_weight("w0", w0), check_weight("w1", w1), check_weight("w2", w2)
    partition = Partition("topk", k, _largest(strategy))
    return Objective((Term(temperature, partition, (w0, 0.0), (_weigh(w1, kl_type), _weigh(w2, kl_type))),))


@_memoized
def gdkd3(
    k: int = 4,
    w0: float = 1.0,
    w1: float = 1.0,
    w2: float = 8.0,
    temperature: float = 4.0,
    strategy: str = "best",
    kl_type: str = "forward",
) -> Objective:
    """GDKD with three groups: the masses of top-1, top-2..k and rest, then the last two from inside."""
    w0, w1, w2 = check_weight("w0", w0), check_weight("w1", w1), check_weight("w2", w2)
    partition = Partition("top1_topk", k, _largest(strategy))
    groups = ((0.0, 0.0), _weigh(w1, kl_type), _weigh(w2, kl_type))
    return Objective((Term(temperature, partition, (w0, 0.0), groups),))


@_memoized
def dkd_top1(alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, kl_type: str = "forward") -> Objective:
    """DKD around the teacher's top class instead of the target (``DKDMod`` of the GDKD repository)."""
    alpha, beta = check_weight("alpha", alpha), check_weight("beta", beta)
    groups = ((0.0, 0.0), _weigh(beta, kl_type))
    return Objective((Term(temperature, Partition("topk", 1), (alpha, 0.0), groups),))


@_memoized
def pr_kd(temperature: float = 4.0) -> Objective:
    """PR-KD: KD of logits standardised by class (Zhu & Zhu 2025, c-s-a 34(2):11-18; LumiNet, arXiv 2310.03669)."""
    return adjust(kd(temperature), standardize="class")


@_memoized
def pr_dkd(alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, kl_type: str = "forward") -> Objective:
    """PR-DKD: DKD of logits standardised by class (Zhu & Zhu 2025, c-s-a 34(2):11-18)."""
    return adjust(dkd(alpha, beta, temperature, kl_type), standardize="class")


@_memoized
def pr_gdkd(
    k: int = 5,
    w0: float = 1.0,
    w1: float = 1.0,
    w2: float = 8.0,
    temperature: float = 4.0,
    strategy: str = "best",
    kl_type: str = "forward",
) -> Objective:
    """PR-GDKD: GDKD of logits standardised by class, the top k among them (Zhu & Zhu 2025, c-s-a 34(2):11-18)."""
    return adjust(gdkd(k, w0, w1, w2, temperature, strategy, kl_type), standardize="class")


@_memoized
def lskd(temperature: float = 2.0, weight: float = 9.0) -> Objective:
    """LSKD: weight * KD of logits standardised by sample (Sun et al., CVPR 2024)."""
    weight = check_weight("weight", weight)
    return Objective((Term(temperature, WHOLE, groups=((weight, 0.0),)),), standardize="sample")


@_memoized
def ls_dkd(alpha: float = 1.0, beta: float = 8.0, temperature: float = 2.0, kl_type: str = "forward") -> Objective:
    """LS-DKD: DKD of logits standardised by sample (Sun et al., CVPR 2024)."""
    return adjust(dkd(alpha, beta, temperature, kl_type), standardize="sample")


@_memoized
def ls_gdkd(
    k: int = 5,
    w0: float = 1.0,
    w1: float = 1.0,
    w2: float = 8.0,
    temperature: float = 2.0,
    strategy: str = "best",
    kl_type: str = "forward",
) -> Objective:
    """LS-GDKD: GDKD of logits standardised by sample (Sun et al., CVPR 2024)."""
    return adjust(gdkd(k, w0, w1, w2, temperature, strategy, kl_type), standardize="sample")


def _weigh(weight: float, kl_type: str) -> tuple[float, float]:
    check_choice("kl_type", kl_type, KL_TYPES)
    # No product with 0 or 1, for which torch.compile would take the weight for a constant.
    return {"forward": (weight, 0.0), "reverse": (0.0, weight), "both": (0.5 * weight, 0.5 * weight)}[kl_type]


def _largest(strategy: str) -> bool:
    check_choice("strategy", strategy, tuple(STRATEGIES))
    return STRATEGIES[strategy]
