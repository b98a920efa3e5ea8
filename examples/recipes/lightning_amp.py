"""Lightning: bfloat16 AMP and gradient accumulation, with micro-batches of unequal counts.

What Lightning's words mean here:

- ``precision="bf16-mixed"`` runs ``training_step`` under autocast, so the logits are bfloat16. kdkernels takes them
  as they are and computes in float32; no ``.float()`` copy. The gradient of the logits is bfloat16.
- ``accumulate_grad_batches=k`` divides each returned loss by k and adds up the gradients. That is the gradient of the
  whole batch only if every micro-batch counts as many samples. Where they do not (padding, ``ignore_index``), give
  the count of the whole step: ``denominator=count / k``.

Compared below: loss and gradient of the bfloat16 logits with the formula in float64; the weights after 4 accumulated
micro-batches with those after one big batch, in float32 (equal) and under AMP (equal up to bfloat16's rounding,
2^-8).

    python examples/recipes/lightning_amp.py
"""

from __future__ import annotations

import argparse
import logging
import warnings

import check
import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdkernels

SAMPLES, FEATURES, CLASSES = 64, 16, 20
ALPHA, TEMPERATURE = 0.3, 4.0

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, CLASSES))


def data() -> TensorDataset:
    """Inputs and labels; some samples are ignored, more of them in the later micro-batches."""
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,))
    ignored = torch.rand(SAMPLES) < torch.linspace(0.0, 0.9, SAMPLES)
    return TensorDataset(2 * torch.randn(SAMPLES, FEATURES), labels.masked_fill(ignored, -100))


class Distillation(lightning.LightningModule):
    """A student that is distilled with ``ALPHA`` * CE + (1 - ``ALPHA``) * KD. ``count``: labels of a whole step."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.student, self.teacher = network(8, seed=1), network(64, seed=2).requires_grad_(False).eval()
        self.count = count

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, labels = batch
        logits = self.student(inputs)
        teacher_logits = self.teacher(inputs)
        loss = kdkernels.kd_loss(
            logits,
            teacher_logits,
            TEMPERATURE,
            target=labels,
            ce_weight=ALPHA,
            weight=1 - ALPHA,
            denominator=self.count / self.trainer.accumulate_grad_batches,
        )
        self.last = logits, teacher_logits, labels, loss
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients = check.gradients(self.student)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def formula(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The loss as scripts write it."""
    valid = labels != -100
    logs, soft = F.log_softmax(logits[valid] / TEMPERATURE, 1), F.softmax(teacher_logits[valid] / TEMPERATURE, 1)
    kd = F.kl_div(logs, soft, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * F.cross_entropy(logits, labels) + (1 - ALPHA) * kd


def step(precision: str, accumulated: int) -> Distillation:
    """One optimizer step over all samples."""
    samples = data()
    module = Distillation(int((samples.tensors[1] != -100).sum()))
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        accumulate_grad_batches=accumulated,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(samples, batch_size=SAMPLES // accumulated))
    return module


def compare_logits(module: Distillation) -> None:
    """The last step's loss, and the gradient in its logits, with the formula in float64 on the same logits."""
    logits, teacher_logits, labels, loss = module.last
    check.require(f"logits of both models are {logits.dtype}", logits.dtype == teacher_logits.dtype == torch.bfloat16)
    exact, leaf = logits.detach().double().requires_grad_(), logits.detach().requires_grad_()
    expected = formula(exact, teacher_logits.double(), labels)
    expected.backward()
    kdkernels.kd_loss(leaf, teacher_logits, TEMPERATURE, target=labels, ce_weight=ALPHA, weight=1 - ALPHA).backward()
    check.same("loss of bfloat16 logits and the formula in float64", loss, expected)
    check.same("gradient of bfloat16 logits and the formula's", leaf.grad, exact.grad, tolerance=4e-3)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    whole, accumulated = step("32-true", 1), step("32-true", 4)
    student, (inputs, labels) = network(8, seed=1).double(), data().tensors
    expected = formula(student(inputs.double()), network(64, seed=2).double()(inputs.double()), labels)
    expected.backward()
    check.same("float32: gradients of the whole batch and the formula's", whole.gradients, check.gradients(student))
    check.same("float32: 4 x 16 accumulated and 1 x 64", accumulated.gradients, whole.gradients)
    amp, amp_accumulated = step("bf16-mixed", 1), step("bf16-mixed", 4)
    compare_logits(amp)
    check.same("AMP: 4 x 16 accumulated and 1 x 64", amp_accumulated.gradients, amp.gradients, tolerance=2**-7)
    check.same("AMP and float32", amp.gradients, whole.gradients, tolerance=2**-6)


if __name__ == "__main__":
    main()
