"""The papers' formulas, written the way their authors write them: for mild logits, readable, shared with nothing.

Each loss returns one value a sample. Where the authors' code hides classes behind a large negative mask, the classes
are left out instead, which is what the mask stands for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.objective import Objective, Partition


def kl(student: Tensor, teacher: Tensor, temperature: float, kl_type: str = "forward") -> Tensor:
    """T^2 * KL between softened softmaxes over all the classes given."""
    log_s, log_t = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    forward = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1) * temperature**2
    reverse = F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(1) * temperature**2
    return {"forward": forward, "reverse": reverse, "both": (forward + reverse) / 2}[kl_type]


def mass_kl(student: Tensor, teacher: Tensor, groups: list[Tensor], temperature: float) -> Tensor:
    """T^2 * forward KL between the summed probabilities of each group."""
    mass_s, mass_t = (
        torch.stack([(F.softmax(logits / temperature, 1) * group).sum(1) for group in groups], 1)
        for logits in (student, teacher)
    )
    return F.kl_div(mass_s.log(), mass_t, reduction="none").sum(1) * temperature**2


def only(logits: Tensor, group: Tensor) -> Tensor:
    """The logits of one group, which has the same size in every row."""
    return logits[group].view(len(logits), -1)


def target_groups(teacher: Tensor, target: Tensor) -> list[Tensor]:
    first = F.one_hot(target, teacher.shape[1]).bool()
    return [first, ~first]


def top_groups(teacher: Tensor, k: int, strategy: str = "best") -> list[Tensor]:
    leaders = torch.topk(teacher, k, dim=1, largest=strategy == "best").indices
    first = torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, leaders, True)
    return [first, ~first]


def dkd(
    student: Tensor, teacher: Tensor, groups: list[Tensor], alpha: float, beta: float, temperature: float, kl_type: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoupled KD around a group of one class: ``(loss, TCKD, NCKD)``."""
    tckd = mass_kl(student, teacher, groups, temperature)
    nckd = kl(only(student, groups[1]), only(teacher, groups[1]), temperature, kl_type)
    return alpha * tckd + beta * nckd, tckd, nckd


def gdkd(
    student: Tensor,
    teacher: Tensor,
    k: int,
    strategy: str,
    w0: float,
    w1: float,
    w2: float,
    temperature: float,
    kl_type: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Generalised DKD: ``(loss, high, low_top, low_other)``."""
    groups = top_groups(teacher, k, strategy)
    high = mass_kl(student, teacher, groups, temperature)
    low = [kl(only(student, group), only(teacher, group), temperature, kl_type) for group in groups]
    return w0 * high + w1 * low[0] + w2 * low[1], high, *low


def gdkd3(
    student: Tensor, teacher: Tensor, k: int, w0: float, w1: float, w2: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GDKD with the top class on its own: ``(loss, high, low_top, low_other)``."""
    (leading, rest), (first, _) = top_groups(teacher, k), top_groups(teacher, 1)
    second = leading & ~first
    high = mass_kl(student, teacher, [first, second, rest], temperature)
    low = [kl(only(student, group), only(teacher, group), temperature) for group in (second, rest)]
    return w0 * high + w1 * low[0] + w2 * low[1], high, *low


def groups_of(partition: Partition, teacher: Tensor, target: Tensor) -> list[Tensor]:
    """The masks of any partition, for logits without ties."""
    if partition.kind == "whole":
        return [torch.ones_like(teacher, dtype=torch.bool)]
    if partition.kind == "target":
        return target_groups(teacher, target)
    strategy = "best" if partition.largest else "worst"
    leading, rest = top_groups(teacher, partition.k, strategy)
    if partition.kind == "topk":
        return [leading, rest]
    first, _ = top_groups(teacher, 1, strategy)
    return [first, leading & ~first, rest]


def gradient_formula(objective: Objective, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The closed form of the summed row losses' gradient, and the size of its terms before they cancel.

    Per term and group, with log-masses and in-group softmaxes::

        T * (ps * (A + B * (a - b)) - C * pt),   B = r,   C = f,
        A = f - r * E_s[a - b] + m_f * (Qs - Qt) + m_r * Qs * (log Qs - log Qt - KL(Qs || Qt))
    """
    gradient, size = torch.zeros_like(student), torch.zeros_like(student)
    if objective.ce_weight:
        ps, onehot = student.softmax(1), F.one_hot(target, student.shape[1])
        gradient += objective.ce_weight * (ps - onehot)
        size += objective.ce_weight * (ps + onehot)
    for term in objective.terms:
        a, b = student / term.temperature, teacher / term.temperature
        groups = groups_of(term.partition, teacher, target)
        log_qs, log_qt = (
            torch.stack([x.masked_fill(~group, -torch.inf).logsumexp(1) for group in groups], 1).log_softmax(1)
            for x in (a, b)
        )
        qs, qt = log_qs.exp(), log_qt.exp()
        mass_reverse = (qs * (log_qs - log_qt)).sum(1)
        m_f, m_r = term.mass
        scale = term.scale / term.temperature
        for g, (group, (f, r)) in enumerate(zip(groups, term.groups, strict=True)):
            ps, pt = (x.masked_fill(~group, -torch.inf).softmax(1) for x in (a, b))
            gap = a - b
            mean_gap = (ps * gap).sum(1)
            mass = m_f * (qs - qt)[:, g] + m_r * qs[:, g] * (log_qs[:, g] - log_qt[:, g] - mass_reverse)
            coefficient = (f - r * mean_gap + mass)[:, None]
            gradient += scale * (ps * (coefficient + r * gap) - f * pt)
            mass_size = (m_f * (qs + qt) + m_r * qs * ((log_qs - log_qt).abs() + mass_reverse[:, None]))[:, g]
            size += scale * (ps * ((f + r * mean_gap.abs() + mass_size)[:, None] + r * gap.abs()) + f * pt)
    return gradient, size
