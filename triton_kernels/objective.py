"""Objectives as the kernels see them: what decides their code is a constant, the numbers are run-time arguments."""

import functools
import math
import struct
from typing import NamedTuple

import triton
import triton.language as tl

WHOLE, TARGET, TOPK, TOP1_TOPK = (tl.constexpr(kind) for kind in range(4))
#: Standardisation of the logits.
BY_CLASS, BY_SAMPLE = tl.constexpr(1), tl.constexpr(2)
_GROUPS = (1, 2, 2, 3)
# Integers and numbers before those of the terms, and integers of a term.
_STRUCTURE_HEADER, _STRUCTURE_TERM, _NUMBERS_HEADER = 3, 4, 3

# Where numbers are: those before the terms, and those of a term from its first one on.
CE_WEIGHT, CORRECTION, EPS, NOTHING = (tl.constexpr(i) for i in range(4))
EXPONENT, MASS, GROUP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)

# How many columns there are of what forward keeps: before the terms, of a standardised sample, of a group; integers.
SAVED_HEADER, SAVED_SAMPLE, SAVED_GROUP, MEMBERS = (tl.constexpr(columns) for columns in (3, 8, 5, 3))


class Term(NamedTuple):
    """What decides the code of one term."""

    kind: int
    largest: bool
    #: Whether the forward and the reverse divergences inside the groups are wanted.
    forward: bool
    reverse: bool
    #: Whether the gradient depends on each class's own gap.
    tilt: bool
    #: Where the term's numbers begin, and its columns of what is kept of a sample.
    numbers: int
    saved: int
    members: int
    #: How many of the objective's terms it stands for: two at one temperature over one partition are one.
    terms: int


class Columns(NamedTuple):
    """Columns of what is known of a sample: loss parts, numbers and integers that are kept."""

    parts: int
    saved: int
    members: int


class Problem(NamedTuple):
    """An objective, unpacked for the kernels; hashable."""

    terms: tuple[Term, ...]
    ce: bool
    standardize: int
    #: Numbers in float32 and, for double arithmetic, what is missing to double precision. Weights have the factor T^2.
    numbers: tuple[float, ...]
    low: tuple[float, ...]
    #: How many classes lead, a term.
    ks: tuple[int, ...]
    columns: Columns


@functools.lru_cache(maxsize=256)
def unpack(structure: tuple[int, ...], values: tuple[float, ...], parts: bool, double: bool) -> Problem:
    """The problem of what ``Objective.encode()`` returned; ``parts``: with the numbers that the loss parts need."""
    count, rest = divmod(len(structure) - _STRUCTURE_HEADER, _STRUCTURE_TERM)
    if count not in (1, 2) or rest:
        raise ValueError(f"structure must be what Objective.encode() returns, got {len(structure)} integers")
    _, standardize, correction = structure[:_STRUCTURE_HEADER]
    ce_weight, weight, eps = values[:_NUMBERS_HEADER]
    numbers = [ce_weight, float(correction), eps, 0.0]
    terms, ks = [], []
    part_count, members = 1, 0
    saved = SAVED_HEADER.value + (SAVED_SAMPLE.value if standardize == BY_SAMPLE.value else 0)
    for folded in _fold(_terms(structure, values)):
        kind, k, largest, _, temperature = folded[0][:5]
        groups = _GROUPS[kind]
        weights, mixes = [0.0] * 2 * (1 + groups), []
        for term in folded:
            scale, *of_term = term[5:]
            weights = [sum_ + scale * weight * own for sum_, own in zip(weights, of_term, strict=True)]
            mixes += [scale * share for share in _shares(of_term)] if parts else []
        inside = weights[2:] + [mix for i, mix in enumerate(mixes) if i % (2 * (1 + groups)) > 1]
        forward, reverse, tilt = any(inside[::2]), any(inside[1::2]), any(weights[3::2])
        flags = forward, reverse, tilt
        terms.append(Term(kind, bool(largest), *flags, len(numbers), saved, members, len(folded)))
        numbers += [math.log2(math.e) / temperature, *weights, *mixes]
        ks.append(k)
        part_count += len(folded) * (1 + groups)
        saved += SAVED_GROUP.value * groups
        members += MEMBERS.value if kind >= TOPK.value else 0
    high = tuple(_float32(number) for number in numbers)
    low = tuple(_float32(number - part) for number, part in zip(numbers, high, strict=True)) if double else ()
    columns = Columns(part_count, saved, members)
    return Problem(tuple(terms), ce_weight != 0, standardize, high, low, tuple(ks), columns)


def _terms(structure: tuple[int, ...], values: tuple[float, ...]) -> list[tuple[float, ...]]:
    """Of each term its integers, temperature, scale and the weights of mass and groups."""
    terms, at = [], _NUMBERS_HEADER
    for begin in range(_STRUCTURE_HEADER, len(structure), _STRUCTURE_TERM):
        integers = structure[begin : begin + _STRUCTURE_TERM]
        count = _term_numbers(integers[0])
        terms.append((*integers, *values[at : at + count]))
        at += count
    return terms


def _term_numbers(kind: int) -> int:
    return 2 + 2 * (1 + _GROUPS[kind])


def _shares(weights: list[float]) -> list[float]:
    """The share of each direction in a term's parts, mass first, each a (forward, reverse) pair.

    A group without weight is reported in the direction of the others.
    """
    fallback = (0.0, 1.0) if any(weights[3::2]) and not any(weights[2::2]) else (1.0, 0.0)
    shares: list[float] = []
    for i in range(0, len(weights), 2):
        pair = weights[i : i + 2]
        total = sum(pair)
        shares += [weight / total for weight in pair] if total else fallback if i else (1.0, 0.0)
    return shares


def _fold(terms: list[tuple[float, ...]]) -> list[list[tuple[float, ...]]]:
    """Encoded terms, those together that have one partition and one temperature."""
    same = len(terms) == 2 and terms[0][:4] == terms[1][:4]
    return [terms] if same else [[term] for term in terms]


@functools.lru_cache(maxsize=256)
def sizes(structure: tuple[int, ...]) -> Columns:
    """How many numbers of each kind the ops have a sample."""
    kinds = structure[_STRUCTURE_HEADER::_STRUCTURE_TERM]
    numbers = (0.0,) * _NUMBERS_HEADER + sum(((1.0,) * _term_numbers(kind) for kind in kinds), ())
    return unpack(structure, numbers, False, False).columns


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


@triton.constexpr_function
def groups_of(kind):
    """How many groups a partition has."""
    return _GROUPS[kind]


@triton.constexpr_function
def has_single(kind):
    """Whether its first group is one class."""
    return kind in (1, 3)


@triton.constexpr_function
def only_targets(terms):
    """Whether the target is the single class of every term, and none has more leading classes."""
    return all(term[0] == 1 for term in terms)


@triton.constexpr_function
def by_rank(kind):
    """Whether the teacher's ranking decides, so that there is a top group."""
    return kind in (2, 3)


@triton.jit
def number(numbers, low, i: tl.constexpr):
    """A number in the arithmetic's precision: double if there are low parts."""
    if len(low) > 0:
        return tl.full((), numbers[i], tl.float64) + tl.full((), low[i], tl.float64)
    else:
        return tl.full((), numbers[i], tl.float32)
