"""The losses and logits that the benchmark runs on. A new loss is one new row of :data:`LOSSES`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import eager
import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor

import kdkernels


@dataclass(frozen=True)
class Loss:
    """One loss, ours and eager, with the same numbers.

    Args:
        ours: the public function, called ``(student, teacher, **numbers, **options)`` with logits of any layout.
        eager: the formula, called ``(student, teacher, target, **numbers)`` with ``(N, C)`` logits.
        numbers: temperature, weights, k.
        liger: the same by Liger-Kernel, called like ``eager``; None where it has no such loss or is not installed.
        takes_target: whether ours is given the target (the losses that do not need it are charged nothing for it).
        options: further keyword arguments of ours, e.g. ``{"standardize": "class"}``.
    """

    ours: Callable[..., Any]
    eager: Callable[..., Tensor]
    numbers: Mapping[str, float]
    takes_target: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    liger: Callable[..., Tensor] | None = None

    @property
    def rows_are_independent(self) -> bool:
        """Whether a sample's loss and gradient depend on that sample alone."""
        return self.options.get("standardize") != "class"

    def call_ours(self, student: Tensor, teacher: Tensor, target: Tensor, shape: Shape, **options: Any) -> Tensor:
        if self.takes_target or shape.padding:
            options["target"] = target
        options["class_dim"] = shape.class_dim
        return self.ours(student, teacher, **self.numbers, **self.options, **options)

    def call_eager(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return self.eager(student, teacher, target, **self.numbers)

    @property
    def call_liger(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        return None if self.liger is None else partial(self.liger, **self.numbers)


def _liger_kd() -> Callable[..., Tensor] | None:
    """Liger-Kernel's KL as users call it: of the softmaxes that it does not take itself."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    divergence = importlib.import_module("liger_kernel.transformers.kl_div").LigerKLDIVLoss(reduction="batchmean")

    def kd_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
        log_student = F.log_softmax(student / temperature, dim=1)
        return divergence(log_student, F.softmax(teacher / temperature, dim=1)) * temperature**2

    return kd_loss


_GDKD = {"w0": 1.0, "w1": 1.0, "w2": 8.0, "temperature": 4.0}

#: The papers' settings for CIFAR-100, at every shape: the work does not depend on the numbers.
LOSSES: dict[str, Loss] = {
    "kd": Loss(kdkernels.kd_loss, eager.kd_loss, {"temperature": 4.0}, liger=_liger_kd()),
    "reverse_kd": Loss(kdkernels.reverse_kd_loss, eager.reverse_kd_loss, {"temperature": 4.0}),
    "bdd": Loss(
        kdkernels.bdd_loss,
        eager.bdd_loss,
        {"forward_weight": 1.0, "reverse_weight": 1.0, "forward_temperature": 4.0, "reverse_temperature": 2.0},
    ),
    "dkd": Loss(kdkernels.dkd_loss, eager.dkd_loss, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}, takes_target=True),
    "gdkd": Loss(kdkernels.gdkd_loss, eager.gdkd_loss, {"k": 5, **_GDKD}),
    "gdkd3": Loss(kdkernels.gdkd3_loss, eager.gdkd3_loss, {"k": 4, **_GDKD}),
}


def _standardized(name: str, standardize: str, **numbers: float) -> Loss:
    """The loss ``name`` of standardised logits, with other numbers if given."""
    inside = LOSSES[name]
    return replace(
        inside,
        liger=None,
        eager=eager.standardized(inside.eager, {"class": eager.by_class, "sample": eager.by_sample}[standardize]),
        numbers={**inside.numbers, **numbers},
        options={"standardize": standardize},
    )


LOSSES |= {
    "pr_kd": _standardized("kd", "class"),
    "pr_dkd": _standardized("dkd", "class"),
    "pr_gdkd": _standardized("gdkd", "class"),
    "lskd": _standardized("kd", "sample", temperature=2.0),  # without its constant factor, 9
    "ls_dkd": _standardized("dkd", "sample", temperature=2.0),
}


def make_logits(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``(student, teacher, target)`` as late in a training run, the same for every contender.

    Logits of scale 3; the student is correlated with the teacher (0.8) and requires grad; four targets of five are the
    teacher's own prediction. The teacher's leading classes stand out by distinct steps, as trained ones do: otherwise
    rounding to bfloat16 makes ties at the edge of the top k, where the right partition is a matter of convention.
    """
    samples, classes = shape.samples, shape.classes
    generator = torch.Generator().manual_seed(samples * 1_000_003 + classes)
    teacher = torch.empty(samples, classes).normal_(0.0, 3.0, generator=generator)
    noise = torch.empty(samples, classes).normal_(0.0, 3.0, generator=generator)
    student = 0.8 * teacher + 0.6 * noise
    leading = torch.topk(teacher, min(8, classes), dim=1)
    steps = torch.arange(leading.indices.shape[1], 0, -1.0)
    teacher.scatter_(1, leading.indices, leading.values.floor() + steps)
    guess = torch.randint(classes, (samples,), generator=generator)
    agrees = torch.rand(samples, generator=generator) < 0.8
    target = torch.where(agrees, leading.indices[:, 0], guess)
    student, teacher = (shape.lay_out(logits.to(dtype)) for logits in (student, teacher))
    return student.requires_grad_(), teacher, shape.pad(target)
