"""Signatures of the DKD authors' repository mdistiller (``mdistiller/distillers/KD.py`` and ``DKD.py``)."""

from __future__ import annotations

from torch import Tensor

from kdkernels import functional
from kdkernels.compat import _repository


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student), averaged over the samples of ``(N, C)`` logits."""
    return functional.kd_loss(logits_student, logits_teacher.detach(), temperature)


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD), averaged over the samples of ``(N, C)`` logits.

    ``target`` has shape ``(N,)`` or ``(N, 1)``.
    """
    target = _repository.flat_target(target, logits_student)
    return functional.dkd_loss(logits_student, logits_teacher.detach(), target, alpha, beta, temperature)


_FUNCTIONS = {"distillers.KD.kd_loss": kd_loss, "distillers.DKD.dkd_loss": dkd_loss}


def install(package: str = "mdistiller") -> list[str]:
    """Puts these functions into a checkout of mdistiller, or of a repository made from it, that is on Python's path.

    They replace ``kd_loss`` of ``distillers/KD.py`` and ``dkd_loss`` of ``DKD.py`` in all modules that hold them, until
    :func:`uninstall`; files stay as they are. Returns the replaced functions' names. A second call changes nothing.

    Raises:
        ImportError: ``package`` cannot be imported.
        RuntimeError: it has neither function, or one with other parameters; nothing was replaced.
    """
    return _repository.install(package, _FUNCTIONS)


def uninstall(package: str = "mdistiller") -> list[str]:
    """Puts the checkout's own functions back and returns their names."""
    return _repository.uninstall(package, _FUNCTIONS)
