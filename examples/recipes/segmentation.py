"""Segmentation: logits (N, C, H, W), an ignore label, channels-last memory. ``examples/segment.py`` trains with it.

What segmentation codes write, and what it is here:

- ``permute(0, 2, 3, 1).reshape(-1, C)[labels != 255]``: nothing. Logits are read where they are (``class_dim=1``), in
  either memory format; ignored pixels are named by ``target=labels, ignore_index=255``.
- ``F.kl_div(..., reduction="batchmean")`` of the selected pixels: our ``"mean"``, over the pixels that count.
- the same of whole maps (N, C, H, W): its sum over pixels, divided by N: our ``"batchmean"``.
- ``F.kl_div(..., reduction="mean")`` divides by the classes, too: our ``"mean"`` divided by C.
- ``F.cross_entropy(..., ignore_index=255)``: ``ce_weight`` of the same call.

Compared below, in loss and gradient, with these formulas in float64.

    python examples/recipes/segmentation.py
"""

from __future__ import annotations

import argparse
from functools import partial

import check
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels

CLASSES, IGNORED, TEMPERATURE = 19, 255, 2.0


def distillation(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy + KD over the labelled pixels, in one call."""
    return kdkernels.kd_loss(student, teacher, TEMPERATURE, target=labels, ignore_index=IGNORED, ce_weight=1.0)


def frameworks_formula(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The same as segmentation codes write it: two copies of each map."""
    selected = [
        maps.permute(0, 2, 3, 1).reshape(-1, CLASSES)[labels.flatten() != IGNORED] for maps in (student, teacher)
    ]
    logs, soft = F.log_softmax(selected[0] / TEMPERATURE, 1), F.softmax(selected[1] / TEMPERATURE, 1)
    kd = F.kl_div(logs, soft, reduction="batchmean") * TEMPERATURE**2
    return F.cross_entropy(student, labels, ignore_index=IGNORED) + kd


def network(width: int) -> nn.Module:
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, CLASSES, 1)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def compare_one_step() -> None:
    """A step of a network: the loss, the gradients of its weights, and the memory format of the logits' gradient."""
    student, teacher = network(8), network(32).requires_grad_(False)
    images = torch.randn(2, 3, 48, 64).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (2, 48, 64)).masked_fill(torch.rand(2, 48, 64) < 0.3, IGNORED)

    logits = student(images)
    seen: list[Tensor] = []
    logits.register_hook(seen.append)  # retain_grad() would change the memory format
    loss = distillation(logits, teacher(images), labels)
    loss.backward()
    ours = check.gradients(student)
    check.require("logits are channels-last", logits.is_contiguous(memory_format=torch.channels_last))
    check.require("so is their gradient", seen[0].is_contiguous(memory_format=torch.channels_last))
    check.require("ignored pixels have gradient 0", not seen[0].movedim(1, -1)[labels == IGNORED].any())

    student, teacher = student.double(), teacher.double()
    student.zero_grad()
    expected = frameworks_formula(student(images.double()), teacher(images.double()), labels)
    expected.backward()
    check.same("loss and the framework's formula", loss, expected)
    check.same("gradients of the weights and the framework's", ours, check.gradients(student))


def compare_reductions() -> None:
    """kl_div's reductions of whole maps."""
    student, teacher = torch.randn(2, 2, CLASSES, 24, 32, dtype=torch.float64)
    kl_div = partial(F.kl_div, F.log_softmax(student, 1), F.softmax(teacher, 1))
    loss = partial(kdkernels.kd_loss, student.float(), teacher.float(), 1.0)
    check.same(
        '"batchmean" and F.kl_div(reduction="batchmean")', loss(reduction="batchmean"), kl_div(reduction="batchmean")
    )
    check.same('"mean" / C and F.kl_div(reduction="mean")', loss() / CLASSES, kl_div(reduction="mean"))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    compare_one_step()
    compare_reductions()


if __name__ == "__main__":
    main()
