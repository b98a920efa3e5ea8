"""Signatures of the DKD authors' repository mdistiller (``mdistiller/distillers/KD.py`` and ``DKD.py``)."""

from __future__ import annotations

from torch import Tensor

from kdkernels import functional


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student), averaged over the samples of ``(N, C)`` logits."""
    return functional.kd_loss(logits_student, logits_teacher.detach(), temperature)


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD), averaged over the samples of ``(N, C)`` logits."""
    return functional.dkd_loss(logits_student, logits_teacher.detach(), target, alpha, beta, temperature)
