"""Distil a segmentation network, pixel by pixel: ``python examples/segment.py``. Under a minute, no download.

The images are scikit-learn's two photographs. A pixel's class is its colour cluster: k-means of the colours of the
blurred photographs; pixels almost as near to a second cluster get no class (255, ignored by every loss). So the label
of a pixel depends on its neighbourhood, and a network with a wider view does better. The left three fifths of each
photograph are for training, the right two fifths for testing.

The teacher sees all labels of the training part. Students, with a twentieth of its weights, see the labels of one small
crop a photograph, and the teacher's logits ``(N, C, H, W)`` of random crops. Their loss is the distillation of these
plus cross entropy where there is a label; the first student has the cross entropy alone. Each is trained twice
from the same seed, with the fused kernels and with the reference backend (plain PyTorch). The two differ only in
rounding: the program checks that their losses agree step by step, and fails otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import kdkernels
from kdkernels import dispatch

mpl.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 8
IGNORED = 255
CROP = 64
BATCH = 4
TEACHER_STEPS = 120
#: The crops whose labels the students know.
LABELLED = (
    (0, ..., slice(20, 20 + CROP), slice(30, 30 + CROP)),
    (1, ..., slice(60, 60 + CROP), slice(60, 60 + CROP)),
)
#: Largest |fused - reference| / max(1, |reference|) of the loss in any step: float32 rounding, amplified by training.
TOLERANCE = 1e-4

LOSSES: dict[str, Callable[..., Tensor] | None] = {
    "CE only": None,
    "KD": partial(kdkernels.kd_loss, temperature=2.0),
    "DKD": partial(kdkernels.dkd_loss, alpha=1.0, beta=2.0, temperature=2.0),
    "GDKD": partial(kdkernels.gdkd_loss, k=3, w0=1.0, w1=1.0, w2=2.0, temperature=2.0),
    "PR-KD": partial(kdkernels.kd_loss, temperature=2.0, standardize="class"),
}


class Photographs(NamedTuple):
    """Both photographs, ``(2, 3, H, W)`` about zero mean, and their labels, ``(2, H, W)``."""

    images: Tensor
    labels: Tensor

    @property
    def split(self) -> int:
        """The first column for testing."""
        return self.images.shape[-1] * 3 // 5


def load_photographs() -> Photographs:
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    images = F.avg_pool2d(images, 2)
    blurred = F.avg_pool2d(images, 9, stride=1, padding=4, count_include_pad=False)
    colours = blurred.permute(0, 2, 3, 1).reshape(-1, 3)
    centres = KMeans(CLASSES, n_init=1, random_state=0).fit(colours[::7].numpy()).cluster_centers_
    nearest = torch.cdist(colours, torch.as_tensor(centres, dtype=colours.dtype)).topk(2, largest=False)
    unclear = nearest.values[:, 0] > 0.9 * nearest.values[:, 1]
    labels = nearest.indices[:, 0].masked_fill(unclear, IGNORED)
    return Photographs((images - 0.5) * 4, labels.view(2, *images.shape[-2:]))


def network(width: int, depth: int) -> nn.Module:
    """Smooth on purpose: at a kink of a ReLU, one rounding can change a whole gradient."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GELU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, CLASSES, 1))


def crops(photographs: Photographs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BATCH random crops of the training part: images, labels."""
    height = photographs.images.shape[-2]
    images, labels = [], []
    for i in range(BATCH):
        top = int(torch.randint(height - CROP, (1,), generator=generator))
        left = int(torch.randint(photographs.split - CROP, (1,), generator=generator))
        place = (i % 2, ..., slice(top, top + CROP), slice(left, left + CROP))
        images.append(photographs.images[place])
        labels.append(photographs.labels[place])
    return torch.stack(images), torch.stack(labels)


def train_teacher(photographs: Photographs) -> nn.Module:
    torch.manual_seed(0)
    teacher, generator = network(32, 4), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(TEACHER_STEPS):
        images, labels = crops(photographs, generator)
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), labels, ignore_index=IGNORED).backward()
        optimizer.step()
    return teacher.requires_grad_(False)


class Run(NamedTuple):
    """A trained student, the loss of each step and the time of the losses and their gradients."""

    student: nn.Module
    losses: Tensor
    seconds: float


def train_student(
    photographs: Photographs, teacher: nn.Module, loss: Callable[..., Tensor] | None, steps: int, backend: str
) -> Run:
    """The seed is the same for every loss and backend. A step has random crops and the labelled ones."""
    torch.manual_seed(1)
    student, generator = network(8, 2), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    labelled = torch.stack([photographs.images[place] for place in LABELLED])
    labels = torch.stack([photographs.labels[place] for place in LABELLED])
    losses, seconds = [], 0.0
    for _ in range(steps):
        images, _ = crops(photographs, generator)
        optimizer.zero_grad()
        value = F.cross_entropy(student(labelled), labels, ignore_index=IGNORED)
        value.backward()
        losses.append(value.item())
        if loss is not None:
            logits, soft = student(images), teacher(images)
            # A loss with a target takes the teacher's own prediction: the random crops have no labels.
            hard = {"target": soft.argmax(1)} if loss.func is kdkernels.dkd_loss else {}
            # Backward in two halves, loss -> logits -> weights, only so that the loss can be timed by itself.
            leaf = logits.detach().requires_grad_()
            start = time.perf_counter()
            distillation = loss(leaf, soft, backend=backend, **hard)
            distillation.backward()
            seconds += time.perf_counter() - start
            logits.backward(leaf.grad)
            losses[-1] += distillation.item()
        optimizer.step()
    return Run(student, torch.tensor(losses, dtype=torch.float64), seconds)


@torch.no_grad()
def predict(model: nn.Module, photographs: Photographs) -> Tensor:
    return model(photographs.images)[..., photographs.split :].argmax(1)


def scores(predicted: Tensor, photographs: Photographs) -> tuple[float, float]:
    """Pixel accuracy and mean intersection over union on the testing part, in per cent."""
    labels = photographs.labels[..., photographs.split :]
    valid = labels != IGNORED
    pairs = (labels[valid] * CLASSES + predicted[valid]).bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)
    union = pairs.sum(0) + pairs.sum(1) - pairs.diag()
    present = pairs.sum(1) > 0
    return (100 * pairs.diag().sum() / pairs.sum()).item(), (100 * pairs.diag() / union)[present].mean().item()


def draw(photographs: Photographs, predictions: dict[str, Tensor], path: Path) -> None:
    """The testing part of both photographs, its labels and everybody's prediction."""
    shown = {"labels": photographs.labels[..., photographs.split :]} | predictions
    figure, axes = plt.subplots(2, 1 + len(shown), figsize=(2.1 * (1 + len(shown)), 4.6), layout="constrained")
    for row, axis in enumerate(axes):
        axis[0].imshow((photographs.images[row, :, :, photographs.split :] / 4 + 0.5).permute(1, 2, 0))
        for panel, (name, classes) in zip(axis[1:], shown.items(), strict=True):
            picture = classes[row].double().masked_fill(classes[row] == IGNORED, float("nan"))
            panel.imshow(picture, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
            panel.set_title(name, fontsize=9)
        for panel in axis:
            panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each student (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if reason := dispatch.why_not("cpu", "cpu"):
        print(f"NO FUSED KERNELS HERE: {reason}.\nBoth columns below are the reference backend; compare nothing.\n")
    photographs = load_photographs()
    teacher = train_teacher(photographs)
    predictions = {"teacher": predict(teacher, photographs)}
    accuracy, union = scores(predictions["teacher"], photographs)
    print(f"teacher: {accuracy:.1f} % of the test pixels, mean IoU {union:.1f} %\n")
    print(
        f"{'':10}{'pixels, %':>11}{'mean IoU, %':>13}{'loss + gradient, ms a step: fused':>36}{'reference':>11}", end=""
    )
    print(f"{'ratio':>8}{'largest gap':>13}")
    apart = []
    for name, loss in LOSSES.items():
        fused = train_student(photographs, teacher, loss, options.steps, "auto")
        predictions[name] = predict(fused.student, photographs)
        accuracy, union = scores(predictions[name], photographs)
        line = f"{name:10}{accuracy:11.1f}{union:13.1f}"
        if loss is not None:
            plain = train_student(photographs, teacher, loss, options.steps, "reference")
            gap = ((fused.losses - plain.losses).abs() / plain.losses.abs().clamp(min=1.0)).max().item()
            fused_ms, plain_ms = (1e3 * run.seconds / options.steps for run in (fused, plain))
            line += f"{fused_ms:36.2f}{plain_ms:11.1f}{plain_ms / fused_ms:7.0f}x{gap:13.1e}"
            if not gap <= TOLERANCE:
                apart.append(name)
        print(line, flush=True)
    path = options.out / "segment.png"
    draw(photographs, predictions, path)
    print(f"\npicture: {path}. The largest gap allowed between the backends is {TOLERANCE:.0e}.")
    if apart:
        sys.exit(f"FAILED: the backends' training curves disagree for {', '.join(apart)}")


if __name__ == "__main__":
    main()
