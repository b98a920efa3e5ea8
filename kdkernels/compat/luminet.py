"""Signature of the LumiNet authors' repository (``mdistiller/distillers/Luminet.py``)."""

from __future__ import annotations

from torch import Tensor

from kdkernels.compat import _repository
from kdkernels.functional import distillation_loss
from kdkernels.objective import WHOLE, Objective, Term, check_number


def luminet_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor | None, alpha: float, temperature: float
) -> Tensor:
    """alpha^2 * KL(teacher || student) of ``(N, C)`` logits standardised by class, averaged over the samples.

    LumiNet (Hossain et al., arXiv 2310.03669): PR-KD with alpha^2 in the place of T^2. ``target`` is taken for the
    signature's sake; the loss does not look at it.
    """
    alpha = check_number("alpha", alpha)
    # A product, not a power: Python raises OverflowError for a power where a product is inf.
    weight = check_number("alpha^2", alpha * alpha)
    term = Term(temperature, WHOLE, groups=((weight, 0.0),), square_temperature=False)
    return distillation_loss(logits_student, logits_teacher.detach(), Objective((term,), standardize="class"))


_FUNCTIONS = {"distillers.Luminet.luminet_loss": luminet_loss}


def install(package: str = "mdistiller") -> list[str]:
    """Puts ``luminet_loss`` into a checkout of LumiNet's repository that is on Python's path, whose package has
    mdistiller's name. As :func:`kdkernels.compat.mdistiller.install`, which serves its KD and DKD.
    """
    return _repository.install(package, _FUNCTIONS)


def uninstall(package: str = "mdistiller") -> list[str]:
    """Puts the checkout's own function back and returns its name."""
    return _repository.uninstall(package, _FUNCTIONS)
