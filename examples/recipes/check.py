"""What all recipes share: the comparison with a framework's own formula. Import it before the frameworks.

A recipe exits with status 1 as soon as two things differ that have to be equal.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

#: Signatures of the operators that ``import torchvision`` asks for.
_TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def same(what: str, ours: Tensor | float, theirs: Tensor | float, tolerance: float = 1e-5) -> None:
    """Prints ``|ours - theirs| / |theirs|`` (Euclidean norms), and exits with status 1 if it exceeds ``tolerance``."""
    ours, theirs = (torch.as_tensor(value).detach().double() for value in (ours, theirs))
    if ours.shape != theirs.shape:
        sys.exit(f"FAILED: {what} have shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    equal = difference <= tolerance  # false for NaN
    print(
        f"{'same' if equal else 'DIFFERENT':10}{what}: relative difference {difference:.1e} (allowed {tolerance:.0e})"
    )
    if not equal:
        sys.exit(f"FAILED: {what} differ")


def require(what: str, holds: bool) -> None:
    """Prints what holds, and exits with status 1 if it does not."""
    print(f"{'yes' if holds else 'NO':10}{what}")
    if not holds:
        sys.exit(f"FAILED: {what}")


def gradients(model: torch.nn.Module) -> Tensor:
    """The gradients of all parameters as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def parameters(model: torch.nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _let_torchvision_load() -> list[torch.library.Library]:
    """Declares operators of torchvision where its binaries do not load; no recipe calls them.

    PyPI's torchvision for Linux is built for CUDA. Beside a torch without CUDA, ``import torchvision`` fails for want
    of these declarations. So do timm, torchdistill, transformers and lightning, which import it. With a torchvision
    from the same index as torch there is nothing to do.
    """
    found = importlib.util.find_spec("torchvision")
    binaries = [] if found is None else list(Path(found.origin).parent.glob("_C*.so"))
    if not binaries:
        return []
    try:
        torch.ops.load_library(binaries[0])
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for signature in _TORCHVISION_OPERATORS:
            library.define(signature)
        return [library]
    return []


_declarations = _let_torchvision_load()  # they end with their library, so it is kept
