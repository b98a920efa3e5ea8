"""Several teachers: a weighted sum of losses, in three ways, and the memory of each.

1. The sum: ``sum(w * kd_loss(student, teacher))``. Any losses, temperatures and weights. Each call keeps a gradient
   of the student's size until backward, so K teachers keep K of them, and autograd adds them up.
2. The same gradient with two buffers at most: call backward after each teacher, on a detached copy of the logits;
   ``leaf.grad`` adds up, and the network's backward follows once.
3. Forward KL at one temperature only: KL to each teacher, weighted, is KL to the mixture of the teachers plus a
   number that does not depend on the student. Mix the probabilities, not the logits: one call, one buffer, the same
   gradient. The loss is smaller by that number, the weighted KL of each teacher to the mixture.

Compared below, in loss and gradient, with the sum that PyTorch's ``F.kl_div`` gives in float64.

    python examples/recipes/several_teachers.py
"""

from __future__ import annotations

import argparse

import check
import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels

TEMPERATURE = 2.0
WEIGHTS = (0.5, 0.3, 0.2)


def summed(student: Tensor, teachers: list[Tensor]) -> Tensor:
    losses = [
        kdkernels.kd_loss(student, teacher, TEMPERATURE, weight=w) for w, teacher in zip(WEIGHTS, teachers, strict=True)
    ]
    return torch.stack(losses).sum()


def one_after_the_other(student: Tensor, teachers: list[Tensor]) -> Tensor:
    """Runs the backward of the losses; returns the gradient for ``logits.backward(gradient)``."""
    leaf = student.detach().requires_grad_()
    for w, teacher in zip(WEIGHTS, teachers, strict=True):
        kdkernels.kd_loss(leaf, teacher, TEMPERATURE, weight=w).backward()
    return leaf.grad


def mixture(teachers: list[Tensor]) -> Tensor:
    """Logits of the teachers' mixture: T * log(sum of w * p)."""
    logs = [
        torch.log_softmax(teacher.float() / TEMPERATURE, 1) + torch.tensor(w).log()
        for w, teacher in zip(WEIGHTS, teachers, strict=True)
    ]
    return TEMPERATURE * torch.logsumexp(torch.stack(logs), 0)


def formula(student: Tensor, teachers: list[Tensor]) -> Tensor:
    logs = F.log_softmax(student / TEMPERATURE, 1)
    losses = [
        w * F.kl_div(logs, F.softmax(teacher / TEMPERATURE, 1), reduction="batchmean")
        for w, teacher in zip(WEIGHTS, teachers, strict=True)
    ]
    return torch.stack(losses).sum() * TEMPERATURE**2


def buffers(loss: Tensor, student: Tensor) -> int:
    """How many tensors of the student's size the graph of a loss keeps, without the student and the teachers."""
    kept, nodes = 0, [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        kept += sum(tensor.shape == student.shape for tensor in getattr(node, "saved_tensors", ()))
        nodes += [following for following, _ in node.next_functions if following is not None]
    return kept


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    student = (2 * torch.randn(64, 1000)).requires_grad_()
    teachers = [2 * torch.randn(64, 1000) for _ in WEIGHTS]
    exact = student.detach().double().requires_grad_()
    expected = formula(exact, [teacher.double() for teacher in teachers])
    (expected_gradient,) = torch.autograd.grad(expected, exact)

    loss = summed(student, teachers)
    print(f"the graph of the sum keeps {buffers(loss, student)} gradient buffers")
    (gradient,) = torch.autograd.grad(loss, student)
    check.same("the sum and PyTorch's", loss, expected)
    check.same("its gradient and PyTorch's", gradient, expected_gradient)
    check.same("gradient of one teacher after the other", one_after_the_other(student, teachers), expected_gradient)

    mixed = kdkernels.kd_loss(student, mixture(teachers), TEMPERATURE)
    print(f"the graph of the mixture keeps {buffers(mixed, student)}")
    (gradient,) = torch.autograd.grad(mixed, student)
    check.same("gradient of the mixture", gradient, expected_gradient)
    spread = formula(mixture(teachers).double(), [teacher.double() for teacher in teachers])
    check.same("loss of the mixture + the teachers' own spread", mixed + spread, expected)


if __name__ == "__main__":
    main()
