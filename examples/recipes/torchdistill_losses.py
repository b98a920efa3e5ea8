"""Registers the losses of kdkernels with torchdistill: name this module under ``dependencies`` of the YAML file."""

from __future__ import annotations

from typing import Any

import check  # noqa: F401  before torchdistill, which imports torchvision
from torch import Tensor, nn
from torchdistill.losses.registry import register_low_level_loss, register_mid_level_loss

import kdkernels

for _name in kdkernels.__all__:
    if _name.endswith("Loss"):
        register_low_level_loss(key=f"kdkernels.{_name}")(getattr(kdkernels, _name))


@register_mid_level_loss
class FusedLoss(nn.Module):
    """Any module of kdkernels, by its name, with the labels as its target.

    Args:
        loss: a module's name, as ``"DKDLoss"``.
        student_module_path, teacher_module_path: whose output are the logits; ``"."`` is the whole model.
        **kwargs: the module's arguments.
    """

    def __init__(self, loss: str, student_module_path: str, teacher_module_path: str, **kwargs: Any) -> None:
        super().__init__()
        self.loss = getattr(kdkernels, loss)(**kwargs)
        self.student_module_path, self.teacher_module_path = student_module_path, teacher_module_path

    def forward(self, student_io: dict, teacher_io: dict, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        student_logits = student_io[self.student_module_path]["output"]
        teacher_logits = teacher_io[self.teacher_module_path]["output"]
        return self.loss(student_logits, teacher_logits, targets)
