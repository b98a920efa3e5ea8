"""timm: mixup and CutMix as two weighted calls, and what bfloat16 autocast does to the formula.

Mixup gives each image two labels, its own and its partner's, with the shares lam and 1 - lam. timm makes a dense
matrix of them. The loss is linear in that matrix, so it is two calls, one for each label, whose weights add up to 1:

    lam * loss(target=labels) + (1 - lam) * loss(target=labels.flip(0))

This also serves losses that need an integer target, as DKD. What timm's words mean here:

- ``SoftTargetCrossEntropy`` of the mixed matrix: ``ce_weight`` in both calls. Label smoothing: not in kdkernels; set
  it to 0.
- ``mode="elem"`` or ``"pair"``, a lam for each image: ``sample_weight=lam``. That is a weighted *mean*, it divides by
  the sum of the weights, so that the sum over N takes ``denominator=N``.
- ``LogitDistillationTask(temperature, task_loss_weight, distill_loss_weight)``: ``temperature, ce_weight, weight``.

Compared below with ``LogitDistillationTask`` on timm's mixed labels, in loss and gradients of the student.

Under bfloat16 autocast the formula rounds to bfloat16 on the way: ``logits / T`` (harmless if T is a power of 2), on
CPUs also the softmaxes. That is percents of the loss or the gradient, and more the nearer the student is to the
teacher. kdkernels computes in float32 from the logits as they are. Printed below is which is right, by the distance
from float64 on the same bfloat16 logits.

    python examples/recipes/timm_mixup.py
"""

from __future__ import annotations

import argparse
from functools import partial

import check
import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.task import LogitDistillationTask
from torch import Tensor, nn

import kdkernels

CLASSES, IMAGES, TEMPERATURE, ALPHA = 100, 8, 3.0, 0.3


class PairMixup(Mixup):
    """timm's Mixup that returns ``(images, lam)`` and not a matrix; the partner's labels are ``labels.flip(0)``.

    lam has the shape ``(N,)``.
    """

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mix = {"elem": self._mix_elem, "pair": self._mix_pair}.get(self.mode, self._mix_batch)
        return images, torch.as_tensor(mix(images), dtype=torch.float32).flatten().expand(len(images))


def mixed_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, lam: Tensor) -> Tensor:
    """``ALPHA`` * CE + (1 - ``ALPHA``) * KD for mixed images: one call for each of their two labels."""
    calls = [
        kdkernels.kd_loss(
            logits,
            teacher_logits,
            TEMPERATURE,
            target=target,
            sample_weight=share,
            denominator=len(labels),
            ce_weight=ALPHA,
            weight=1 - ALPHA,
        )
        for target, share in ((labels, lam), (labels.flip(0), 1 - lam))
    ]
    return calls[0] + calls[1]


def networks() -> tuple[nn.Module, nn.Module]:
    """Random student and teacher; smooth activations, so that rounding moves no gradient across a kink."""
    torch.manual_seed(1)
    names = ("test_vit", "test_vit2")
    return tuple(timm.create_model(name, num_classes=CLASSES, img_size=32, patch_size=8).eval() for name in names)


def compare_mixup(mode: str) -> None:
    """Loss and gradients against timm's own task with timm's own mixed matrix."""
    torch.manual_seed(0)
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.randint(CLASSES, (IMAGES,))
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": mode, "label_smoothing": 0.0, "num_classes": CLASSES}
    np.random.seed(0)
    mixed, lam = PairMixup(**options)(images.clone())
    np.random.seed(0)
    theirs_mixed, matrix = Mixup(**options)(images.clone(), labels)
    check.same(f"{mode}: mixed images and timm's", mixed, theirs_mixed)

    student, teacher = networks()
    with torch.no_grad():
        teacher_logits = teacher(mixed)
    loss = mixed_loss(student(mixed), teacher_logits, labels, lam)
    loss.backward()
    gradients = check.gradients(student)

    student.zero_grad()
    task = LogitDistillationTask(
        student, teacher, SoftTargetCrossEntropy(), task_loss_weight=ALPHA, temperature=TEMPERATURE, verbose=False
    ).double()
    expected = task(mixed.double(), matrix.double())["loss"]
    expected.backward()
    check.same(f"{mode}: loss and LogitDistillationTask's", loss, expected)
    check.same(f"{mode}: gradients and LogitDistillationTask's", gradients, check.gradients(student), tolerance=1e-4)


def formula(logits: Tensor, teacher_logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """KD as scripts write it. ``dtype``: in which autocast computes the softmaxes; None: in that of the logits."""
    logs = F.log_softmax(logits / TEMPERATURE, 1, dtype=dtype)
    soft = F.softmax(teacher_logits / TEMPERATURE, 1, dtype=dtype)
    return F.kl_div(logs, soft, reduction="batchmean") * TEMPERATURE**2


#: KD under autocast, in the order of their errors.
CANDIDATES = {
    "formula, CPU autocast (softmaxes in bfloat16)": formula,
    "formula, CUDA autocast (softmaxes in float32)": partial(formula, dtype=torch.float32),
    "kdkernels": partial(kdkernels.kd_loss, temperature=TEMPERATURE),
}


def compare_autocast() -> None:
    """Distances from float64 on the same bfloat16 logits: a student in mid-training."""
    torch.manual_seed(0)
    teacher_logits = (3 * torch.randn(256, 1000)).bfloat16()
    logits = (teacher_logits + torch.randn(256, 1000)).bfloat16()
    exact = logits.double().requires_grad_()
    expected = formula(exact, teacher_logits.double())
    expected.backward()
    print(f"KD of bfloat16 logits under autocast ({expected:.4f}), relative distance from float64:")
    distances = {}
    for name, loss_of in CANDIDATES.items():
        leaf = logits.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(leaf, teacher_logits)
        loss.backward()
        gradient_distance = (leaf.grad - exact.grad).norm() / exact.grad.norm()
        distances[name] = abs(loss.item() / expected.item() - 1), gradient_distance.item()
        print(f"          {name:47} loss {distances[name][0]:.1e}, gradient {distances[name][1]:.1e}")
    loss_distance, gradient_distance = distances.pop("kdkernels")
    check.require("kdkernels: loss within 1e-5", loss_distance < 1e-5)
    check.require("kdkernels: gradient within bfloat16's rounding, 2^-8", gradient_distance < 2**-8)
    check.require(
        "both formulas are further off in the loss", all(pair[0] > loss_distance for pair in distances.values())
    )
    check.require("and in the gradient", all(pair[1] > gradient_distance for pair in distances.values()))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for mode in ("batch", "elem"):
        compare_mixup(mode)
    compare_autocast()


if __name__ == "__main__":
    main()
