"""torchdistill: losses chosen in a YAML file, ``torchdistill_kd.yaml``, and registered by ``torchdistill_losses.py``.

What torchdistill's words mean here:

- ``alpha`` of its KDLoss weighs the cross entropy: ``ce_weight``. Its ``beta`` (1 - alpha by default) is ``weight``.
- ``reduction: 'batchmean'``, its default, is our ``"mean"`` for logits ``(N, C)``.
- With ``alpha`` 0 or None, or without labels, its KDLoss drops the factor T^2; here T^2 stays, unless
  ``square_temperature: False``.

Compared below, in the loss and the gradients of a student in its ``DistillationBox``: with its own KDLoss, and, for
DKD, with the paper's formula. The data are random.

    python examples/recipes/torchdistill_yaml.py
"""

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path
from typing import Any

import check
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox

CONFIG = Path(__file__).with_name("torchdistill_kd.yaml")
FEATURES, CLASSES, SAMPLES, TEMPERATURE = 16, 10, 64, 4.0


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, CLASSES))


def data() -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(4 * torch.randn(SAMPLES, FEATURES), torch.randint(CLASSES, (SAMPLES,)))


def forward_backward(config: dict[str, Any], criterion: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and gradients of the student in a torchdistill stage with this criterion, over the data in one batch."""
    stage = copy.deepcopy(config["train"]) | {"criterion": copy.deepcopy(criterion)}
    student, teacher = network(8, seed=1), network(64, seed=2)
    box = DistillationBox(teacher, student, {"random/train": data()}, stage, torch.device("cpu"), [], False, 1)
    (batch,) = box.train_data_loader
    loss = box.forward_process(*batch)
    loss.backward()
    return loss, check.gradients(student)


def dkd_formula(logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """Cross entropy + DKD of the paper (Zhao et al., CVPR 2022), by its equations."""
    own = F.one_hot(labels, CLASSES).bool()
    s, t = (F.softmax(z / TEMPERATURE, 1) for z in (logits, teacher_logits))
    s_pair, t_pair = (torch.stack([p[own], 1 - p[own]], 1) for p in (s, t))
    s_rest, t_rest = (
        p[~own].view(-1, CLASSES - 1) / p[~own].view(-1, CLASSES - 1).sum(1, keepdim=True) for p in (s, t)
    )
    target, rest = ((q * (q / p).log()).sum(1).mean() * TEMPERATURE**2 for p, q in ((s_pair, t_pair), (s_rest, t_rest)))
    return F.cross_entropy(logits, labels) + alpha * target + beta * rest


def exact(formula: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradients of a formula of logits, teacher's logits and labels, in float64."""
    student, teacher = network(8, seed=1).double(), network(64, seed=2).double()
    inputs, labels = data().tensors
    loss = formula(student(inputs.double()), teacher(inputs.double()).detach(), labels)
    loss.backward()
    return loss, check.gradients(student)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.disable(logging.INFO)
    config = load_yaml_file(str(CONFIG))
    import_dependencies(config["dependencies"])
    expected = {
        "kd": forward_backward(config, config["theirs"]["kd"]),
        "dkd": exact(lambda *inputs: dkd_formula(*inputs, alpha=1.0, beta=2.0)),
        "kd_without_labels": exact(
            lambda s, t, _: (
                0.9
                * TEMPERATURE**2
                * F.kl_div(F.log_softmax(s / TEMPERATURE, 1), F.softmax(t / TEMPERATURE, 1), reduction="batchmean")
            )
        ),
    }
    sources = {"kd": "torchdistill's KDLoss", "dkd": "the paper's formula", "kd_without_labels": "F.kl_div"}
    for name, criterion in config["criteria"].items():
        loss, gradients = forward_backward(config, criterion)
        check.same(f"{name}: loss and that of {sources[name]}", loss, expected[name][0])
        check.same(f"{name}: gradients and those of {sources[name]}", gradients, expected[name][1])


if __name__ == "__main__":
    main()
