"""What a distillation loss *is*: a few numbers.

Every loss of this package is one :class:`Objective`: an optional standardisation of the logits, one or
two :class:`Term` s and a cross-entropy weight. A term compares student and teacher at one temperature
over one :class:`Partition` of the classes:

    T^2 * ( m_f * KL(Qt || Qs) + m_r * KL(Qs || Qt)
            + sum over groups g of  f_g * KL(pt_g || ps_g) + r_g * KL(ps_g || pt_g) )

``Q`` are the softmax masses of the groups, ``p_g`` the softmax inside group ``g``, ``s`` student, ``t``
teacher. Backends read these numbers and never a loss's name; a new loss of the family is a new preset
at the end of this file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

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
_STANDARDIZE = (None, "class", "sample")
_STANDARDIZE_DEFAULTS = {None: (0, 0.0), "class": (0, 1e-5), "sample": (1, 1e-7)}
KL_TYPES = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "both": (0.5, 0.5)}
STRATEGIES = {"best": True, "worst": False}


def check_number(name: str, value: object, *, above: float | None = None, at_least: float | None = None) -> float:
    """``value`` as a float; TypeError / ValueError if it is no finite real number within the bound."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not -math.inf < value < math.inf:  # no math.isfinite: torch.compile cannot trace it for a dynamic float
        raise ValueError(f"{name} must be finite, got {value!r}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be > {above:g}, got {value!r}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} must be >= {at_least:g}, got {value!r}")
    return float(value)


def check_integer(name: str, value: object, *, at_least: int | None = None) -> int:
    """``value`` if it is an integer within the bound, else TypeError / ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value!r}")
    return value


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if not ((value is None or isinstance(value, str)) and value in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


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
        if not isinstance(self.largest, bool):
            raise TypeError(f"Partition.largest must be a bool, got {self.largest!r}")
        if self.kind in ("topk", "top1_topk"):
            check_integer("k", self.k, at_least=1 if self.kind == "topk" else 2)
        elif self.k != 0:
            raise ValueError(f"Partition.k must be 0 for kind {self.kind!r}, got {self.k!r}")

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
        temperature: T > 0; the logits are divided by it.
        partition: the groups of classes.
        mass: ``(m_f, m_r)``, weights of the forward and reverse KL between the groups' masses, each >= 0.
        groups: one ``(f_g, r_g)`` a group, weights of the forward and reverse KL inside it, each >= 0.
        square_temperature: multiply the term by T^2, the papers' factor.

    Raises:
        TypeError, ValueError: naming the number that does not fit.
    """

    temperature: float
    partition: Partition
    mass: tuple[float, float] = (0.0, 0.0)
    groups: tuple[tuple[float, float], ...] = ((1.0, 0.0),)
    square_temperature: bool = True

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0.0)
        if not isinstance(self.partition, Partition):
            raise TypeError(f"Term.partition must be a Partition, got {self.partition!r}")
        _check_pair("Term.mass", self.mass)
        if not isinstance(self.groups, tuple):
            raise TypeError(f"Term.groups must be a tuple of (forward, reverse) pairs, got {self.groups!r}")
        names = self.partition.groups
        if len(self.groups) != len(names):
            raise ValueError(
                f"Term.groups must have one (forward, reverse) pair for each of the {len(names)} groups {names} of "
                f"partition {self.partition.kind!r}, got {len(self.groups)}: {self.groups!r}"
            )
        for name, pair in zip(names, self.groups, strict=True):
            _check_pair(f"Term.groups[{name!r}]", pair)
        if not isinstance(self.square_temperature, bool):
            raise TypeError(f"Term.square_temperature must be a bool, got {self.square_temperature!r}")

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


def _check_pair(name: str, pair: object) -> None:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"{name} must be a (forward, reverse) pair of numbers, got {pair!r}")
    check_number(f"{name}[0]", pair[0], at_least=0.0)
    check_number(f"{name}[1]", pair[1], at_least=0.0)


@dataclass(frozen=True)
class Objective:
    """A whole distillation loss, as data.

    Args:
        terms: one or two terms; the loss is their sum.
        standardize: ``None``, ``"class"`` (each class over the valid samples of the batch, perception
            reconstruction) or ``"sample"`` (each sample over its classes, logit standardisation), applied to the
            logits the terms see.
        correction: Bessel's correction of the variance; default 0 for ``"class"``, 1 for ``"sample"``.
        eps: default 1e-5 (inside the root) for ``"class"``, 1e-7 (added to the deviation) for ``"sample"``.
        ce_weight: weight >= 0 of the cross entropy of the raw student logits with the target, at T = 1.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """

    terms: tuple[Term, ...]
    standardize: str | None = None
    correction: int | None = None
    eps: float | None = None
    ce_weight: float = 0.0

    #: Whether the loss cannot be computed without a target.
    needs_target: ClassVar[bool]
    #: The least number of classes for which every partition of this objective exists.
    smallest_class_count: ClassVar[int]

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple) or not all(isinstance(term, Term) for term in self.terms):
            raise TypeError(f"Objective.terms must be a tuple of Terms, got {self.terms!r}")
        if len(self.terms) not in (1, 2):
            raise ValueError(f"Objective.terms must hold one or two Terms, got {len(self.terms)}")
        check_choice("standardize", self.standardize, _STANDARDIZE)
        correction, eps = _STANDARDIZE_DEFAULTS[self.standardize]
        if self.correction is None:
            object.__setattr__(self, "correction", correction)
        if self.eps is None:
            object.__setattr__(self, "eps", eps)
        check_integer("correction", self.correction, at_least=0)
        check_number("eps", self.eps, at_least=0.0)
        check_number("ce_weight", self.ce_weight, at_least=0.0)
        # Beside the fields, which torch.compile rebuilds an objective from.
        partitions = [term.partition for term in self.terms]
        needs_target = self.ce_weight != 0 or any(partition.kind == "target" for partition in partitions)
        object.__setattr__(self, "needs_target", needs_target)
        object.__setattr__(self, "smallest_class_count", max(partition.k for partition in partitions) + 1)

    def __reduce__(self) -> tuple[object, ...]:
        return Objective, tuple(getattr(self, field.name) for field in fields(self))

    def part_names(self) -> tuple[tuple[str, ...], ...]:
        """Names of the loss parts, one tuple a term (mass first); ``""`` for the mass of a single group."""
        suffixes = [""]
        if len(self.terms) == 2:
            directions = [term.direction for term in self.terms]
            distinct = set(directions) == {"forward", "reverse"}
            suffixes = [f"_{direction}" for direction in directions] if distinct else ["_1", "_2"]
        names = []
        for term, suffix in zip(self.terms, suffixes, strict=True):
            groups = term.partition.groups
            mass = f"mass{suffix}" if len(groups) > 1 else ""
            names.append((mass, *(f"{group}{suffix}" for group in groups)))
        return tuple(names)

    def encode(self) -> tuple[Sequence[int], Tensor]:
        """The objective as the ops take it, which ``csrc/objective.h`` decodes.

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
    assert objective.correction is not None
    structure = [_STANDARDIZE.index(objective.standardize), objective.correction]
    for term in objective.terms:
        partition, same = term.partition, term.temperature == objective.terms[0].temperature
        structure += [_KINDS.index(partition.kind), partition.k, int(partition.largest), int(same)]
    return structure


def _numbers(objective: Objective) -> list[float]:
    assert objective.eps is not None
    numbers = [objective.ce_weight, objective.eps]
    for term in objective.terms:
        numbers += [term.temperature, term.scale]
        for forward, reverse in (term.mass, *term.groups, *term.part_mixes()):
            numbers += [forward, reverse]
    return numbers


def _memoized(build: Callable[_P, _R]) -> Callable[_P, _R]:
    """Presets are built in every training step: keep the last few (they are immutable)."""
    remembered = functools.lru_cache(maxsize=256, typed=True)(build)

    @functools.wraps(build)
    def preset(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.compiler.is_compiling():
            try:
                return remembered(*args, **kwargs)  # type: ignore[arg-type]
            except TypeError:
                pass  # unhashable or of a wrong type: the validation says what is wrong
        return build(*args, **kwargs)

    return preset


@_memoized
def adjust(
    objective: Objective,
    standardize: str | None = None,
    correction: int | None = None,
    eps: float | None = None,
    ce_weight: float | None = None,
) -> Objective:
    """``objective`` with the given fields replaced; None keeps what it has."""
    if standardize is None and (correction is not None or eps is not None) and objective.standardize is None:
        name, value = ("correction", correction) if correction is not None else ("eps", eps)
        raise ValueError(f"{name} is used only with standardize='class' or 'sample', got {name}={value!r}")
    if standardize is not None and standardize != objective.standardize:
        base_correction, base_eps = None, None
    else:
        standardize, base_correction, base_eps = objective.standardize, objective.correction, objective.eps
    return Objective(
        terms=objective.terms,
        standardize=standardize,
        correction=base_correction if correction is None else correction,
        eps=base_eps if eps is None else eps,
        ce_weight=objective.ce_weight if ce_weight is None else ce_weight,
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
    check_number("forward_weight", forward_weight, at_least=0.0)
    check_number("reverse_weight", reverse_weight, at_least=0.0)
    check_number("forward_temperature", forward_temperature, above=0.0)
    check_number("reverse_temperature", reverse_temperature, above=0.0)
    forward = Term(forward_temperature, WHOLE, groups=((forward_weight, 0.0),))
    reverse = Term(reverse_temperature, WHOLE, groups=((0.0, reverse_weight),))
    return Objective((forward, reverse))


@_memoized
def dkd(alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, kl_type: str = "forward") -> Objective:
    """Decoupled KD (Zhao et al., CVPR 2022): alpha * target mass KL + beta * non-target KL."""
    check_number("alpha", alpha, at_least=0.0)
    check_number("beta", beta, at_least=0.0)
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
    _check_weights(w0=w0, w1=w1, w2=w2)
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
    _check_weights(w0=w0, w1=w1, w2=w2)
    partition = Partition("top1_topk", k, _largest(strategy))
    groups = ((0.0, 0.0), _weigh(w1, kl_type), _weigh(w2, kl_type))
    return Objective((Term(temperature, partition, (w0, 0.0), groups),))


@_memoized
def dkd_top1(alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, kl_type: str = "forward") -> Objective:
    """DKD around the teacher's top class instead of the target (``DKDMod`` of the GDKD repository)."""
    check_number("alpha", alpha, at_least=0.0)
    check_number("beta", beta, at_least=0.0)
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
    check_number("weight", weight, at_least=0.0)
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
    check_choice("kl_type", kl_type, tuple(KL_TYPES))
    forward, reverse = KL_TYPES[kl_type]
    return weight * forward, weight * reverse


def _largest(strategy: str) -> bool:
    check_choice("strategy", strategy, tuple(STRATEGIES))
    return STRATEGIES[strategy]


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        check_number(name, value, at_least=0.0)
