"""Fused knowledge-distillation losses for PyTorch."""

from kdkernels.functional import (
    bdd_loss,
    distillation_loss,
    dkd_loss,
    gdkd3_loss,
    gdkd_loss,
    kd_loss,
    reverse_kd_loss,
)
from kdkernels.modules import BDDLoss, DistillationLoss, DKDLoss, GDKD3Loss, GDKDLoss, KDLoss, ReverseKDLoss
from kdkernels.objective import Objective, Partition, Term
from kdkernels.ops import cpu_instruction_set, set_cpu_instruction_set

__version__ = "0.2.0"

__all__ = [
    "BDDLoss",
    "DKDLoss",
    "DistillationLoss",
    "GDKD3Loss",
    "GDKDLoss",
    "KDLoss",
    "Objective",
    "Partition",
    "ReverseKDLoss",
    "Term",
    "bdd_loss",
    "cpu_instruction_set",
    "distillation_loss",
    "dkd_loss",
    "gdkd3_loss",
    "gdkd_loss",
    "kd_loss",
    "reverse_kd_loss",
    "set_cpu_instruction_set",
]
