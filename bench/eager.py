"""The losses as the papers' repositories compute them, in eager PyTorch: what people paste into a training script.

Each is a pure function ``(student, teacher, target, **numbers) -> mean loss`` of ``(N, C)`` logits and does the work
those repositories do: boolean masks of the logits' shape, masses of groups as masked sums of a softmax, and a softmax
inside a group by pushing the other classes down by 1000. That arithmetic overflows on extreme logits, in the same
places as the repositories' does; on the logits of this benchmark it is right, and the benchmark checks that it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: What a class outside a group loses before the softmax inside that group.
MASKED = 1000.0


def kd_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KD as in mdistiller: log-softmax of the student against the softmax of the teacher."""
    log_student = F.log_softmax(student / temperature, dim=1)
    teacher = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, teacher, reduction="none").sum(1).mean() * temperature**2


def reverse_kd_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(student || teacher) as in the GDKD repository: both sides as log-probabilities."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_teacher, log_student, reduction="batchmean", log_target=True) * temperature**2


def bdd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    forward_weight: float,
    reverse_weight: float,
    forward_temperature: float,
    reverse_temperature: float,
) -> Tensor:
    """A forward and a reverse KL, each with its weight and temperature, one after the other."""
    forward = kd_loss(student, teacher, target, forward_temperature)
    reverse = reverse_kd_loss(student, teacher, target, reverse_temperature)
    return forward_weight * forward + reverse_weight * reverse


def dkd_loss(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """DKD as in mdistiller: target and other masks, TCKD from masked sums, NCKD with the target masked away."""
    target_mask = torch.zeros_like(student).scatter_(1, target[:, None], 1).bool()
    other_mask = torch.ones_like(student).scatter_(1, target[:, None], 0).bool()
    masses_kl = _masses_kl(student / temperature, teacher / temperature, (target_mask, other_mask))
    other_teacher = F.softmax(teacher / temperature - MASKED * target_mask, dim=1)
    other_student = F.log_softmax(student / temperature - MASKED * target_mask, dim=1)
    other_kl = F.kl_div(other_student, other_teacher, reduction="batchmean")
    return (alpha * masses_kl + beta * other_kl) * temperature**2


def gdkd_loss(
    student: Tensor, teacher: Tensor, target: Tensor, k: int, w0: float, w1: float, w2: float, temperature: float
) -> Tensor:
    """GDKD as in its repository: masks of the teacher's top k and of the rest, three KLs."""
    leading = torch.topk(teacher, k, dim=1, sorted=False).indices
    top = torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, leading, True)
    rest = ~top
    student, teacher = student / temperature, teacher / temperature
    masses_kl = _masses_kl(student, teacher, (top, rest))
    top_kl = _group_kl(student, teacher, others=rest)
    rest_kl = _group_kl(student, teacher, others=top)
    return (w0 * masses_kl + w1 * top_kl + w2 * rest_kl) * temperature**2


def gdkd3_loss(
    student: Tensor, teacher: Tensor, target: Tensor, k: int, w0: float, w1: float, w2: float, temperature: float
) -> Tensor:
    """GDKD3 as in the GDKD repository: top 1, top 2..k and rest, each with its mask."""
    leading = torch.topk(teacher, k, dim=1, sorted=True).indices
    nothing = torch.zeros_like(teacher, dtype=torch.bool)
    first = nothing.scatter(1, leading[:, :1], True)
    top = nothing.scatter(1, leading[:, 1:], True)
    rest = ~nothing.scatter(1, leading, True)
    student, teacher = student / temperature, teacher / temperature
    masses_kl = _masses_kl(student, teacher, (first, top, rest))
    top_kl = _group_kl(student, teacher, others=~top)
    rest_kl = _group_kl(student, teacher, others=~rest)
    return (w0 * masses_kl + w1 * top_kl + w2 * rest_kl) * temperature**2


def by_class(logits: Tensor) -> Tensor:
    """Perception reconstruction as in LumiNet's repository: each class against its mean and variance in the batch."""
    variance = logits.var(0, unbiased=False, keepdim=True)
    return (logits - logits.mean(0, keepdim=True)) / torch.sqrt(variance + 1e-5)


def by_sample(logits: Tensor) -> Tensor:
    """Logit standardisation as in its repository: each sample against its mean and deviation over the classes."""
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def standardized(loss: Callable[..., Tensor], standardize: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """``loss`` of standardised logits, student and teacher each with their own statistics."""

    def of_standardized(student: Tensor, teacher: Tensor, target: Tensor, **numbers: float) -> Tensor:
        return loss(standardize(student), standardize(teacher), target, **numbers)

    return of_standardized


def _masses_kl(student: Tensor, teacher: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """KL between the groups' masses, each the masked sum of a softmax over all classes."""
    masses = []
    for logits in (student, teacher):
        probabilities = F.softmax(logits, dim=1)
        masses.append(torch.cat([(probabilities * mask).sum(1, keepdim=True) for mask in masks], dim=1))
    return F.kl_div(masses[0].log(), masses[1], reduction="batchmean")


def _group_kl(student: Tensor, teacher: Tensor, others: Tensor) -> Tensor:
    """KL between the softmaxes inside one group, with the ``others`` masked away."""
    log_student = F.log_softmax(student - MASKED * others, dim=1)
    log_teacher = F.log_softmax(teacher - MASKED * others, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
