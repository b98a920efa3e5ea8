"""Signatures of the GDKD authors' repository (ZaberKo/GDKD): the loss and its unweighted parts."""

from __future__ import annotations

from torch import Tensor

from kdkernels import objective
from kdkernels.functional import distillation_loss


def gdkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor | None,
    k: int,
    strategy: str,
    w0: float,
    w1: float,
    w2: float,
    temperature: float,
    kl_type: str = "forward",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, high, low_top, low_other)``: GDKD and its mass, top and rest parts, each with T^2, detached.

    ``target`` is taken for the signature's sake; the partition looks at the teacher only.
    """
    loss, parts = distillation_loss(
        logits_student,
        logits_teacher.detach(),
        objective.gdkd(k, w0, w1, w2, temperature, strategy, kl_type),
        return_parts=True,
    )
    return loss, parts["mass"], parts["top"], parts["rest"]


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor | None,
    alpha: float,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, tckd, nckd)`` of ``DKDMod``: DKD around the teacher's top class; parts with T^2, detached."""
    loss, parts = distillation_loss(
        logits_student,
        logits_teacher.detach(),
        objective.dkd_top1(alpha, beta, temperature),
        return_parts=True,
    )
    return loss, parts["mass"], parts["rest"]
