"""Signatures of the GDKD authors' repository (ZaberKo/GDKD): the loss and its unweighted parts."""

from __future__ import annotations

from torch import Tensor

from kdkernels import objective
from kdkernels.functional import distillation_loss
from kdkernels.objective import check_choice


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
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    mask_magnitude: float = 1000.0,
    kl_type: str = "forward",
    strategy: str = "target",
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, tckd, nckd)`` of ``DKDMod``: DKD around the target or, ``strategy="top1"``, the teacher's top class.

    The parts have T^2 and are detached. ``mask_magnitude`` is taken for the signature's sake: the masked classes are
    left out exactly.
    """
    check_choice("strategy", strategy, ("target", "top1"))
    preset = objective.dkd if strategy == "target" else objective.dkd_top1
    loss, parts = distillation_loss(
        logits_student,
        logits_teacher.detach(),
        preset(alpha, beta, temperature, kl_type),
        target=target if strategy == "target" else None,
        return_parts=True,
    )
    return loss, parts["mass"], parts["rest"]
