"""Channel-wise distillation (CWD; Shu et al., ICCV 2021) is KD with the channels as samples and the pixels as classes.

CWD takes a softmax over the H x W positions of each channel of a feature map or a logit map, and adds up T^2 / C *
KL(teacher || student) over the channels. In the words of kdkernels: ``flatten(2)`` makes ``(N, C, H * W)``, a view
without a copy; ``class_dim=-1`` compares positions; ``reduction="mean"`` is the mean over N * C channels.

Compared below, in loss and gradient, with the authors' formula, for contiguous and channels-last maps.

    python examples/recipes/cwd.py
"""

from __future__ import annotations

import argparse

import check
import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels

TEMPERATURE = 4.0  # of the paper, for logit maps


def cwd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """CWD of two maps ``(N, C, H, W)``."""
    return kdkernels.kd_loss(student.flatten(2), teacher.flatten(2), TEMPERATURE, class_dim=-1)


def authors_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula of the authors' code: ``CriterionCWD`` with norm_type "channel" and divergence "kl"."""
    n, c, h, w = student.shape
    logs = F.log_softmax(student.reshape(n * c, h * w) / TEMPERATURE, dim=1)
    soft = F.softmax(teacher.reshape(n * c, h * w) / TEMPERATURE, dim=1)
    return F.kl_div(logs, soft, reduction="sum") * TEMPERATURE**2 / (n * c)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        student, teacher = (
            (3 * torch.randn(2, 19, 32, 48)).to(memory_format=memory_format).requires_grad_(grad)
            for grad in (True, False)
        )
        loss = cwd_loss(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        exact = student.detach().double().requires_grad_()
        expected = authors_loss(exact, teacher.double())
        (expected_gradient,) = torch.autograd.grad(expected, exact)
        name = str(memory_format).removeprefix("torch.")
        check.same(f"loss and the authors' formula, {name}", loss, expected)
        check.same(f"gradient and the authors' formula, {name}", gradient, expected_gradient)
        check.require("flatten(2) is a view", student.flatten(2).data_ptr() == student.data_ptr())


if __name__ == "__main__":
    main()
