"""The oracle: every loss by its literal formula in plain PyTorch.

Slow and memory hungry on purpose: literal formulas lose digits to cancellation, so they are computed in float64
whatever the logits' dtype (float32 on devices without float64). Nothing here is shared with the kernels and gradients
come from autograd, so that the kernels can be measured against this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.distributed import ProcessGroup, Sum, name_of
from kdkernels.objective import Objective, Partition
from kdkernels.validation import Call


def distillation_loss(call: Call, arithmetic: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and detached parts of a checked call; the loss is differentiable in ``call.student``.

    ``arithmetic`` is the dtype to compute in, by default the widest that the device has.
    """
    objective = call.objective
    double = torch.float64 in (call.student.dtype, call.teacher.dtype)
    loss_dtype = torch.float64 if double else torch.float32
    widest = torch.float32 if call.student.device.type == "mps" else torch.float64
    dtype = arithmetic or widest
    samples = call.student.shape[: call.class_dim] + call.student.shape[call.class_dim + 1 :]
    student, teacher = (
        logits.narrow(call.class_dim, 0, call.num_classes).movedim(call.class_dim, -1).flatten(0, -2).to(dtype)
        if logits.dim() > 1
        else logits.narrow(0, 0, call.num_classes).unsqueeze(0).to(dtype)
        for logits in (call.student, call.teacher)
    )
    weight = torch.ones(len(student), dtype=dtype, device=student.device)
    if call.sample_weight is not None:
        weight = call.sample_weight.flatten().to(dtype)
    target = None
    if call.target is not None:
        target = call.target.flatten()
        weight = torch.where(target == call.ignore_index, 0.0, weight)
        target = target.where(target != call.ignore_index, 0)
    valid = weight > 0
    # A sample that does not count may hold anything, NaN included: nothing of it may reach a product.
    student, teacher = (torch.where(valid[:, None], logits, 0.0) for logits in (student, teacher))

    # 0, and tied to the student: without any weight the gradient is 0, not missing.
    loss = torch.where(torch.zeros_like(valid), student[:, 0], 0.0)
    parts: dict[str, Tensor] = {}
    if objective.ce_weight:
        assert target is not None
        parts["ce"] = torch.nn.functional.cross_entropy(student, target, reduction="none")
        loss = loss + objective.ce_weight * parts["ce"]
    # Standardised by sample, logits keep their order; beside finfo.min their differences are lost to rounding.
    ranked = teacher if objective.standardize == "sample" else None
    student, teacher = (standardize(logits, valid, objective, call.process_group) for logits in (student, teacher))
    ranked = teacher if ranked is None else ranked
    for term, names in zip(objective.terms, objective.part_names(), strict=True):
        groups = partition_masks(term.partition, ranked, target)
        # Less the maximum before the quotient: that of large logits would lose their digits.
        a, b = ((logits - _largest(logits)) / term.temperature for logits in (student, teacher))
        kls = [_mass_kls(a, b, groups), *(_group_kls(a, b, group) for group in groups)]
        mixes = term.part_mixes()
        for name, (forward, reverse), weights, mix in zip(names, kls, (term.mass, *term.groups), mixes, strict=True):
            if objective.weight:
                loss = loss + objective.weight * term.scale * _mixed(forward, reverse, weights)
            if name:
                parts[name] = term.scale * _mixed(forward, reverse, mix).detach()

    def reduced(rows: Tensor) -> Tensor:
        return _reduce(rows, weight, valid, samples, call).to(loss_dtype)

    return reduced(loss), {name: reduced(part.detach()) for name, part in parts.items()}


def standardize(
    logits: Tensor, valid: Tensor, objective: Objective, process_group: ProcessGroup | None = None
) -> Tensor:
    """Standardised ``(N, C)`` logits: by class over the valid samples, by sample over its classes, or untouched.

    Logits of -inf (masked classes) stay what they are and count for nothing.
    """
    if objective.standardize is None:
        return logits
    by_class = objective.standardize == "class"
    there = valid[:, None] & (logits != -torch.inf)

    def total(values: Tensor) -> Tensor:
        if not by_class:
            return values.sum(1, keepdim=True)
        return values.sum(0) if process_group is None else Sum.apply(values.sum(0), name_of(process_group))

    assert objective.eps is not None
    count = total(there.to(logits.dtype))
    known = torch.where(there, logits, 0.0)
    # In a unit near their size, a power of two for exact quotients, logits near finfo.min and tiny ones have squares.
    unit = total(known.detach().abs() / (2 * count.clamp(min=1)))
    unit = torch.exp2(torch.where((unit > 0) & (unit < torch.inf), unit, 1.0).log2().floor())
    eps = objective.eps / unit
    known = known / unit
    mean = total(known) / count.clamp(min=1)
    mean = mean + total(torch.where(there, known - mean, 0.0)) / count.clamp(min=1)  # exact where all are equal
    centred = torch.where(there, known - mean, 0.0)
    variance = total(centred.square()) / (count - objective.correction).clamp(min=1)
    deviation = _root(variance + eps / unit) if by_class else _root(variance) + eps
    scaled = torch.where(deviation == 0, 0.0, centred / torch.where(deviation == 0, 1.0, deviation))
    return torch.where(logits == -torch.inf, logits, scaled)


def _root(x: Tensor) -> Tensor:
    """The square root, with slope 0 at 0 in place of an infinite one."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), torch.where(x == 0, 0.0, x))


def partition_masks(partition: Partition, teacher: Tensor, target: Tensor | None) -> list[Tensor]:
    """One boolean ``(N, C)`` mask a group; they are disjoint and cover every class."""
    whole = torch.ones_like(teacher, dtype=torch.bool)
    if partition.kind == "whole":
        return [whole]
    if partition.kind == "target":
        assert target is not None
        first = torch.zeros_like(whole).scatter_(1, target[:, None], True)
        return [first, ~first]
    order = torch.sort(teacher, dim=1, descending=partition.largest, stable=True).indices
    leading = torch.zeros_like(whole).scatter_(1, order[:, : partition.k], True)
    if partition.kind == "topk":
        return [leading, ~leading]
    first = torch.zeros_like(whole).scatter_(1, order[:, :1], True)
    return [first, leading & ~first, ~leading]


def _mass_kls(a: Tensor, b: Tensor, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL between the groups' masses."""
    log_qs, log_qt = (torch.stack([_logsumexp(x, group) for group in groups], 1).log_softmax(1) for x in (a, b))
    return _kl(log_qt, log_qs), _kl(log_qs, log_qt)


def _group_kls(a: Tensor, b: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL between the softmaxes inside one group; exactly 0 inside a single class."""
    # A single class is left out before the divergence: behind it, an infinite one's gradient would be NaN.
    several = group & (group.sum(1, keepdim=True) > 1)
    log_ps, log_pt = (_log_softmax(x, several) for x in (a, b))
    return _kl(log_pt, log_ps), _kl(log_ps, log_pt)


def _log_softmax(x: Tensor, group: Tensor) -> Tensor:
    """log_softmax over a group; -inf outside it, and in all of it where it has no finite class."""
    x = x - _largest(x.masked_fill(~group, -torch.inf))
    lse = _logsumexp(x, group)[:, None]
    empty = lse == -torch.inf
    return torch.where(group & ~empty, x - torch.where(empty, 0.0, lse), -torch.inf)


def _largest(x: Tensor) -> Tensor:
    """Each row's maximum: less that, no softmax changes, and logits of any size leave room for its logarithms."""
    largest = x.detach().amax(1, keepdim=True)
    return torch.where(largest.isfinite(), largest, 0.0)


def _logsumexp(x: Tensor, group: Tensor) -> Tensor:
    """logsumexp over a group, -inf with zero gradient where the group has no finite class."""
    masked = x.masked_fill(~group, -torch.inf)
    empty = (masked == -torch.inf).all(1)
    return torch.where(empty, -torch.inf, torch.logsumexp(torch.where(empty[:, None], 0.0, masked), 1))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) along dim 1 from log-probabilities.

    A class with p = 0 adds nothing, to the gradient neither; one that only q masks is infinite, however small p was.
    """
    p = log_p.exp()
    infinite = (p == 0) & (log_p > -torch.inf) & (log_q == -torch.inf)
    gap = torch.where(p == 0, 0.0, log_p) - torch.where(p == 0, 0.0, log_q)
    return torch.where(infinite, torch.inf, p * gap).sum(1)


def _mixed(forward: Tensor, reverse: Tensor, weights: tuple[float, float]) -> Tensor:
    """The weighted sum of both directions, where a weight of 0 drops a direction even if it is infinite."""
    total = torch.zeros_like(forward)
    for divergence, weight in zip((forward, reverse), weights, strict=True):
        if weight:
            total = total + weight * divergence
    return total


def _reduce(rows: Tensor, weight: Tensor, valid: Tensor, samples: torch.Size, call: Call) -> Tensor:
    rows = torch.where(valid, rows * weight, 0.0)
    if call.reduction == "none":
        return rows.reshape(samples)
    total = rows.sum() * call.scale
    if call.reduction == "sum":
        if call.denominator is None:
            return total
        denominator = call.denominator.to(rows.dtype)
    elif call.reduction == "batchmean":
        denominator = torch.tensor(float(call.student.shape[0]), dtype=rows.dtype, device=rows.device)
    else:
        denominator = torch.where(valid, weight, 0.0).sum()
    # Without a valid sample the sum is 0, and so is the loss.
    return torch.where(denominator == 0, 0.0, total / torch.where(denominator == 0, 1.0, denominator))
