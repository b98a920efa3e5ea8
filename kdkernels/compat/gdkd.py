"""Signatures of the GDKD authors' repository (ZaberKo/GDKD): the loss and its unweighted parts.

Two of its files give their function another's name; here they are ``gdkd3_loss`` (``gdkd_loss`` of ``GDKD3.py``) and
``lskd_loss`` (``kd_loss`` of ``LSKD.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import objective
from kdkernels.compat import _repository
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


def gdkd3_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor | None,
    k: int,
    w0: float,
    w1: float,
    w2: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, high, low_top, low_other)`` of ``GDKD3.py``'s ``gdkd_loss``: the groups are the teacher's top 1, its top
    2..k and the rest. The parts are those of the mass, the top 2..k and the rest, each with T^2, detached.

    ``target`` is taken for the signature's sake; the partition looks at the teacher only.
    """
    loss, parts = distillation_loss(
        logits_student,
        logits_teacher.detach(),
        objective.gdkd3(k, w0, w1, w2, temperature),
        return_parts=True,
    )
    return loss, parts["mass"], parts["top"], parts["rest"]


def lskd_loss(
    logits_student: Tensor, logits_teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(loss, mean_student, std_student, mean_teacher, std_teacher)`` of ``LSKD.py``'s ``kd_loss``.

    KD of ``(N, C)`` logits standardised by sample. The other values are the samples' mean logit and deviation, averaged
    over the samples, detached, in the logits' dtype; they take one more reading of each side.
    """
    teacher = logits_teacher.detach()
    loss = distillation_loss(logits_student, teacher, objective.lskd(temperature, weight=1.0))
    std_student, mean_student = (moment.mean() for moment in torch.std_mean(logits_student.detach(), dim=-1))
    std_teacher, mean_teacher = (moment.mean() for moment in torch.std_mean(teacher, dim=-1))
    return loss, mean_student, std_student, mean_teacher, std_teacher


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

    ``target`` has shape ``(N,)`` or ``(N, 1)``. The parts have T^2 and are detached. ``mask_magnitude`` is taken for
    the signature's sake: the masked classes are left out exactly.
    """
    check_choice("strategy", strategy, ("target", "top1"))
    preset = objective.dkd if strategy == "target" else objective.dkd_top1
    loss, parts = distillation_loss(
        logits_student,
        logits_teacher.detach(),
        preset(alpha, beta, temperature, kl_type),
        target=_repository.flat_target(target, logits_student) if strategy == "target" else None,
        return_parts=True,
    )
    return loss, parts["mass"], parts["rest"]


_FUNCTIONS = {
    "distillers.DKDMod.dkd_loss": dkd_loss,
    "distillers.GDKD.gdkd_loss": gdkd_loss,
    "distillers.GDKD3.gdkd_loss": gdkd3_loss,
    "distillers.LSKD.kd_loss": lskd_loss,
}


def install(package: str = "mdistiller") -> list[str]:
    """Puts these functions into a checkout of ZaberKo/GDKD that is on Python's path; its package has mdistiller's name.

    They replace what there is of ``DKDMod.dkd_loss``, ``GDKD.gdkd_loss``, ``GDKD3.gdkd_loss`` and ``LSKD.kd_loss``.
    As :func:`kdkernels.compat.mdistiller.install`, which serves its KD and DKD.
    """
    return _repository.install(package, _FUNCTIONS)


def uninstall(package: str = "mdistiller") -> list[str]:
    """Puts the checkout's own functions back and returns their names."""
    return _repository.uninstall(package, _FUNCTIONS)
