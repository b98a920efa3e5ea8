"""The reference's own reference: one sample after another, in numpy's widest floats, with gradients in closed form.

Nothing is shared with the reference but the Objective: groups are lists of classes, masked classes are left out of
them, a divergence is the documentation's phi and psi, and a standardisation's chain rule is written out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdkernels.objective import Objective, Partition, Term

Numbers = NDArray[np.longdouble]


class Rows(NamedTuple):
    """Of each sample: the loss ``(N,)``, the parts ``(N,)`` by name, and the factored losses' gradient ``(N, C)``."""

    loss: Numbers
    parts: dict[str, Numbers]
    gradient: Numbers


class Side(NamedTuple):
    """A distribution over some atoms: logarithms, -inf where there is nothing, and the atoms' logsumexp."""

    logs: Numbers
    lse: np.longdouble


def losses(
    objective: Objective, student: Numbers, teacher: Numbers, target: NDArray[np.int64], factor: Numbers
) -> Rows:
    """All samples of ``(N, C)`` logits count; each one's gradient is multiplied by its ``factor``."""
    student, teacher = student.astype(np.longdouble), teacher.astype(np.longdouble)
    loss, gradient = np.zeros(len(student), np.longdouble), np.zeros_like(student)
    parts: dict[str, Numbers] = {}
    if objective.ce_weight:
        probabilities = [softmax(row, range(len(row))) for row in student]
        parts["ce"] = np.array([-side.logs[y] for side, y in zip(probabilities, target, strict=True)])
        loss = loss + objective.ce_weight * parts["ce"]
        gradient += np.exp([side.logs for side in probabilities])
        gradient[np.arange(len(target)), target] -= 1
        gradient *= objective.ce_weight
    h_s, h_t = standardized(objective, student), standardized(objective, teacher)
    slope = np.zeros_like(student)
    ranked = h_t if objective.standardize == "class" else teacher  # the others do not change an order
    for term, names in zip(objective.terms, objective.part_names(), strict=True):
        for i in range(len(student)):
            groups = groups_of(term.partition, ranked[i], int(target[i]))
            values, of_mix, by_class = _term(term, h_s[i], h_t[i], groups)
            loss[i] += sum(values)
            slope[i] += by_class
            for name, part in zip(names, of_mix, strict=True):
                if name:
                    parts.setdefault(name, np.zeros(len(student), np.longdouble))[i] = part
    gradient = gradient * factor[:, None] + unstandardized(objective, student, slope * factor[:, None])
    return Rows(loss, parts, gradient)


def groups_of(partition: Partition, teacher: Numbers, target: int) -> list[list[int]]:
    """The classes of each group; of equal logits the lowest class comes first."""
    classes = range(len(teacher))
    if partition.kind == "whole":
        return [list(classes)]
    if partition.kind == "target":
        return [[target], [j for j in classes if j != target]]
    sign = -1 if partition.largest else 1
    order = sorted(classes, key=lambda j: (sign * teacher[j], j))
    leading, rest = order[: partition.k], order[partition.k :]
    return [leading, rest] if partition.kind == "topk" else [leading[:1], leading[1:], rest]


def softmax(x: Numbers, group: list[int] | range) -> Side:
    """log_softmax of some classes, in an array of all of them."""
    logs = np.full(len(x), -np.inf, np.longdouble)
    known = [j for j in group if x[j] != -np.inf]
    if not known:
        return Side(logs, np.longdouble(-np.inf))
    shift = x[known].max()
    lse = shift + np.log(np.exp(x[known] - shift).sum())
    # The maximum's own logarithm is -log1p of the others, exact where the maximum has nearly all of the mass.
    logs[known] = (x[known] - shift) - np.log(np.exp(x[known] - shift).sum())
    return Side(logs, lse)


def divergence(p: Numbers, q: Numbers, weights: tuple[float, float]) -> tuple[np.longdouble, Numbers]:
    """``f KL(p || q) + r KL(q || p)`` of logarithms, and its slope in the logits of q: psi - q sum(psi)."""
    value, psi = np.longdouble(0), np.zeros_like(q)
    forward, reverse = (np.longdouble(weight) for weight in weights)
    has_p, has_q = np.exp(p) > 0, np.exp(q) > 0
    if (forward and ((p > -np.inf) & (q == -np.inf)).any()) or (reverse and ((q > -np.inf) & (p == -np.inf)).any()):
        value = np.longdouble(np.inf)
    if forward:
        value += forward * (np.exp(p[has_p]) * (p[has_p] - q[has_p])).sum()
        psi[has_p] -= forward * np.exp(p[has_p])
    if reverse:
        value += reverse * (np.exp(q[has_q]) * (q[has_q] - p[has_q])).sum()
        psi[has_q] += reverse * np.exp(q[has_q]) * (q[has_q] - p[has_q] + 1)
    return value, psi - np.exp(q) * psi.sum()


def _term(
    term: Term, h_s: Numbers, h_t: Numbers, groups: list[list[int]]
) -> tuple[list[np.longdouble], list[np.longdouble], Numbers]:
    """Weighted values and parts (the mass first), and the slope in the standardised student logits."""
    temperature, scale = np.longdouble(term.temperature), np.longdouble(term.scale)
    a, b = h_s / temperature, h_t / temperature
    inside = [(softmax(a, group), softmax(b, group)) for group in groups]
    masses = [softmax(np.array([pair[side].lse for pair in inside]), range(len(groups))).logs for side in (0, 1)]
    mixes = term.part_mixes()
    value, of_mass = divergence(masses[1], masses[0], term.mass)
    values, parts = [scale * value], [scale * divergence(masses[1], masses[0], mixes[0])[0]]
    slope = np.zeros_like(h_s)
    for g, ((q, p), weights) in enumerate(zip(inside, term.groups, strict=True)):
        slope += of_mass[g] * np.exp(q.logs)
        if len(groups[g]) == 1:
            values.append(np.longdouble(0))
            parts.append(np.longdouble(0))
            continue
        value, of_group = divergence(p.logs, q.logs, weights)
        values.append(scale * value)
        parts.append(scale * divergence(p.logs, q.logs, mixes[g + 1])[0])
        slope += of_group
    return values, parts, slope * scale / temperature


class _Moments(NamedTuple):
    there: NDArray[np.bool_]
    count: Numbers
    centred: Numbers
    root: Numbers
    deviation: Numbers
    degrees: Numbers


def _moments(objective: Objective, logits: Numbers) -> _Moments:
    axis = 0 if objective.standardize == "class" else 1
    there = logits != -np.inf
    count = np.maximum(there.sum(axis, keepdims=True), 1).astype(np.longdouble)
    known = np.where(there, logits, 0)
    centred = np.where(there, known - known.sum(axis, keepdims=True) / count, 0)
    degrees = np.maximum(there.sum(axis, keepdims=True) - objective.correction, 1).astype(np.longdouble)
    variance = (centred**2).sum(axis, keepdims=True) / degrees
    eps = np.longdouble(objective.eps)
    root = np.sqrt(variance + eps) if axis == 0 else np.sqrt(variance)
    return _Moments(there, count, centred, root, root if axis == 0 else root + eps, degrees)


def deviation(objective: Objective, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """What :func:`standardized` divides by, in double."""
    return _moments(objective, logits.astype(np.longdouble)).deviation.astype(np.float64)


def standardized(objective: Objective, logits: Numbers) -> Numbers:
    if objective.standardize is None:
        return logits
    m = _moments(objective, logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(m.there, np.where(m.deviation == 0, 0, m.centred / m.deviation), -np.inf)


def unstandardized(objective: Objective, logits: Numbers, slope: Numbers) -> Numbers:
    """The gradient in the logits from that in the standardised ones."""
    if objective.standardize is None:
        return slope
    m = _moments(objective, logits)
    axis = 0 if objective.standardize == "class" else 1
    slope = np.where(m.there, slope, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        through_mean = slope - slope.sum(axis, keepdims=True) / m.count
        projection = (slope * m.centred).sum(axis, keepdims=True) / (m.degrees * m.root * m.deviation)
        gradient = (through_mean - np.where(m.root == 0, 0, m.centred * projection)) / m.deviation
    return np.where(m.there & (m.deviation != 0), gradient, 0)
