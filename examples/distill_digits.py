"""Distil a digit classifier: ``python examples/distill_digits.py``. About a minute on one core, no download.

The data are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels. A convolutional teacher learns from 1,197 of them.
Students, about 50 times smaller, see only 100 of those (10 a class), and are tested on the other 600 images. That is
where distillation is of use: the teacher's soft labels carry what it learned from the images the students never see.

Each student's loss is cross entropy + distillation, fused in one sweep by ``ce_weight=1``; the first student has
cross entropy alone, by torch, at the learning rate (of 0.02, 0.05, 0.1, 0.2, 0.5) that suits it best. Every distilled
student is trained twice from the same seed, once with the fused kernels and once with the reference backend (plain
PyTorch). The two differ only in rounding, so their losses must agree step by step; the program checks that and fails
otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kdkernels
from kdkernels import dispatch, objective

mpl.use("Agg")
import matplotlib.pyplot as plt

TRAIN_IMAGES = 1197
LABELLED_PER_CLASS = 10
TEACHER_EPOCHS = 15
BATCH = 25
MOMENTUM = 0.9

#: Largest |fused - reference| / max(1, |reference|) of the loss in any step. Both backends compute the same function
#: with a float32 rounding (1e-7) of their own, and some hundred steps of training amplify that. A gradient that is
#: wrong by 1 % exceeds this within 10 steps, one that is wrong by 0.01 % within 20.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Recipe:
    """How one student is trained: ``loss(student_logits, teacher_logits, target, backend=...)``."""

    loss: Callable[..., Tensor]
    learning_rate: float
    distils: bool = True


def cross_entropy(student: Tensor, teacher: Tensor, target: Tensor, backend: str) -> Tensor:
    """Torch's cross entropy, for the student without a teacher."""
    return F.cross_entropy(student, target)


def distilled(loss: Callable[..., Tensor], *, learning_rate: float = 0.05, **arguments: Any) -> Recipe:
    """Cross entropy plus the given distillation loss."""

    def total(student: Tensor, teacher: Tensor, target: Tensor, backend: str) -> Tensor:
        return loss(student, teacher, target=target, ce_weight=1.0, backend=backend, **arguments)

    return Recipe(total, learning_rate)


# With 10 classes the groups are small: k = 3, and the rest weighs 2, not the 8 of CIFAR-100.
RECIPES: dict[str, Recipe] = {
    "CE only": Recipe(cross_entropy, 0.2, distils=False),
    "KD": distilled(kdkernels.kd_loss, temperature=4.0),
    "reverse KD": distilled(kdkernels.reverse_kd_loss, temperature=4.0),
    "BDD": distilled(kdkernels.bdd_loss, forward_temperature=4.0, reverse_temperature=4.0),
    "DKD": distilled(kdkernels.dkd_loss, alpha=1.0, beta=2.0, temperature=4.0),
    "GDKD": distilled(kdkernels.gdkd_loss, k=3, w0=1.0, w1=1.0, w2=2.0, temperature=4.0),
    "GDKD3": distilled(kdkernels.gdkd3_loss, k=3, w0=1.0, w1=1.0, w2=2.0, temperature=4.0),
    # Measured against the batch's own spread, the student's logits pass on smaller gradients: a higher rate.
    "PR-KD": distilled(kdkernels.kd_loss, learning_rate=0.2, temperature=4.0, standardize="class"),
    "PR-DKD": distilled(
        kdkernels.dkd_loss, learning_rate=0.2, alpha=1.0, beta=2.0, temperature=4.0, standardize="class"
    ),
    "LSKD": distilled(kdkernels.distillation_loss, objective=objective.lskd(temperature=2.0, weight=9.0)),
}


@dataclass
class Data:
    """The digits, shuffled once: the first TRAIN_IMAGES are for training, the others for testing."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def test(self) -> slice:
        return slice(TRAIN_IMAGES, None)

    def accuracy(self, logits: Tensor) -> float:
        """Share of the test images that these logits, one row a test image, get right."""
        return (logits.argmax(1) == self.labels[self.test]).float().mean().item()

    def labelled_subset(self, generator: torch.Generator) -> Tensor:
        """Indices of the training images a student may see: LABELLED_PER_CLASS of each class."""
        labels = self.labels[:TRAIN_IMAGES]
        picks = []
        for digit in range(10):
            candidates = (labels == digit).nonzero()[:, 0]
            picks.append(candidates[torch.randperm(len(candidates), generator=generator)[:LABELLED_PER_CLASS]])
        return torch.cat(picks)


@dataclass
class Run:
    """One trained student."""

    step_losses: list[float] = field(default_factory=list)
    epoch_accuracies: list[float] = field(default_factory=list)
    loss_seconds: float = 0.0


def load_data() -> Data:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(digits.images, dtype=torch.float32)[order, None] / 16 - 0.3  # about zero mean
    return Data(images, torch.as_tensor(digits.target, dtype=torch.int64)[order])


def make_teacher() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def make_student() -> nn.Module:
    """Smooth on purpose: at a kink of a ReLU or of max-pooling, one rounding can change a whole gradient."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 3 * 3, 10))


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def train_teacher(data: Data) -> nn.Module:
    """Trains the teacher and leaves its logits for all images in ``data``."""
    torch.manual_seed(0)
    teacher = make_teacher()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
    for _ in range(TEACHER_EPOCHS):
        for batch in torch.randperm(TRAIN_IMAGES).split(64):
            loss = F.cross_entropy(teacher(data.images[batch]), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        data.teacher_logits = teacher(data.images)
    return teacher


def train_student(data: Data, recipe: Recipe, seed: int, epochs: int, backend: str) -> Run:
    """Trains one student; the seed fixes its initial weights, its images and their order, whatever the backend."""
    torch.manual_seed(seed)
    student = make_student()
    generator = torch.Generator().manual_seed(seed)
    subset = data.labelled_subset(generator)
    optimizer = torch.optim.SGD(student.parameters(), lr=recipe.learning_rate, momentum=MOMENTUM)
    run = Run()
    for _ in range(epochs):
        for batch in subset[torch.randperm(len(subset), generator=generator)].split(BATCH):
            logits = student(data.images[batch])
            teacher_logits, labels = data.teacher_logits[batch], data.labels[batch]
            # Backward in two halves, loss -> logits -> weights, only so that the loss can be timed by itself.
            leaf = logits.detach().requires_grad_()
            start = time.perf_counter()
            loss = recipe.loss(leaf, teacher_logits, labels, backend=backend)
            loss.backward()
            run.loss_seconds += time.perf_counter() - start
            optimizer.zero_grad()
            logits.backward(leaf.grad)
            optimizer.step()
            run.step_losses.append(loss.item())
        with torch.no_grad():
            run.epoch_accuracies.append(data.accuracy(student(data.images[data.test])))
    return run


def step_gaps(fused: list[Run], reference: list[Run]) -> list[float]:
    """The relative difference of the loss between two backends in each step, the largest of the seeds (or NaN)."""
    one, other = (torch.tensor([run.step_losses for run in runs], dtype=torch.float64) for runs in (fused, reference))
    return ((one - other).abs() / other.abs().clamp(min=1.0)).amax(0).tolist()


def spread(runs: list[Run]) -> str:
    """Mean and standard deviation of the final test accuracy, in per cent."""
    accuracies = [100 * run.epoch_accuracies[-1] for run in runs]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return f"{statistics.mean(accuracies):5.1f} ± {deviation:.1f}"


def draw(results: dict[str, dict[str, list[Run]]], teacher_accuracy: float, path: Path) -> None:
    """Final accuracies, accuracies during training, and the gap between the backends."""
    figure, (final, curves, gaps) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    colours = dict(zip(results, plt.get_cmap("tab10").colors, strict=False))
    lowest = min(run.epoch_accuracies[-1] for runs in results.values() for run in runs["auto"])
    floor = min(75.0, 100 * lowest - 5)
    for position, (name, runs) in enumerate(results.items()):
        accuracies = (100 * torch.tensor([run.epoch_accuracies for run in runs["auto"]]).mean(0)).tolist()
        final.bar(position, accuracies[-1], color=colours[name], alpha=0.6)
        final.text(position, floor + 1, f"{accuracies[-1]:.1f}", ha="center", fontsize=9)
        for backend, marker in (("auto", "."), ("reference", "x")):
            points = [100 * run.epoch_accuracies[-1] for run in runs.get(backend, [])]
            final.plot([position] * len(points), points, marker, color="black", markersize=5, linestyle="none")
        curves.plot(range(1, len(accuracies) + 1), accuracies, color=colours[name], label=name)
        if "reference" in runs:
            steps = step_gaps(runs["auto"], runs["reference"])
            gaps.plot(range(1, len(steps) + 1), steps, color=colours[name], linewidth=0.8)
    gaps.axhline(TOLERANCE, color="grey", linestyle="--", linewidth=1, label="allowed")
    gaps.legend(loc="upper right", fontsize=8)
    for axis in (final, curves):
        axis.axhline(100 * teacher_accuracy, color="grey", linestyle="--", linewidth=1, label="teacher")
        axis.set_ylabel("test accuracy, %")
        axis.set_ylim(floor, 100)
    final.set_xticks(range(len(results)), results, rotation=20)
    final.set_title("final, mean of the seeds (dots: fused, crosses: reference)", fontsize=10)
    curves.set_xlabel("epoch")
    curves.set_title("during training, fused, mean of the seeds", fontsize=10)
    curves.legend(loc="lower right", fontsize=8)
    gaps.set_yscale("log")
    gaps.set_xlabel("step")
    gaps.set_title("|fused - reference| / max(1, |reference|) of a step's loss, largest of the seeds", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="students of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=75, help="epochs of a student (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the chart (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("seeds", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(1)  # such small models only lose by more, and one thread makes their sums reproducible
    start = time.perf_counter()
    reason = dispatch.why_not("cpu", "cpu")
    if reason is None and dispatch.default_backend == "reference":
        reason = f"{dispatch.ENVIRONMENT}=reference is set"
    if reason is not None:
        print(f"NO FUSED KERNELS HERE: {reason}.\nBoth columns below are the reference backend; compare nothing.\n")

    data = load_data()
    teacher = train_teacher(data)
    teacher_accuracy = data.accuracy(data.teacher_logits[data.test])
    print(
        f"teacher: {weights(teacher)} weights, learned from {TRAIN_IMAGES} images, "
        f"{100 * teacher_accuracy:.1f} % of {len(data.labels) - TRAIN_IMAGES} test images right\n"
        f"students: {weights(make_student())} weights, learn from {10 * LABELLED_PER_CLASS} of those images, "
        f"{options.seeds} seeds, {options.epochs} epochs\n\n"
        f"{'':12}{'test accuracy, %':>30}{'loss + gradient, ms a run':>36}{'largest gap':>14}\n"
        f"{'':12}{'fused':>15}{'reference':>15}{'fused':>12}{'reference':>12}{'ratio':>12}{'in any step':>14}"
    )
    results: dict[str, dict[str, list[Run]]] = {}
    gaps = {}
    for name, recipe in RECIPES.items():
        backends = ("auto", "reference") if recipe.distils else ("auto",)
        for backend in backends:
            train_student(data, recipe, seed=0, epochs=1, backend=backend)  # first calls are slow: not timed
        runs: dict[str, list[Run]] = {backend: [] for backend in backends}
        for seed in range(options.seeds):
            for backend in backends:
                runs[backend].append(train_student(data, recipe, seed, options.epochs, backend))
        results[name] = runs
        times = {backend: 1e3 * statistics.mean(run.loss_seconds for run in runs[backend]) for backend in backends}
        if recipe.distils:
            # Not Python's max, which can pass over a NaN.
            gaps[name] = torch.tensor(step_gaps(runs["auto"], runs["reference"])).max().item()
            print(
                f"{name:12}{spread(runs['auto']):>15}{spread(runs['reference']):>15}{times['auto']:12.1f}"
                f"{times['reference']:12.1f}{times['reference'] / times['auto']:11.1f}x{gaps[name]:14.1e}",
                flush=True,
            )
        else:
            print(
                f"{name:12}{spread(runs['auto']):>15}{'':15}{times['auto']:12.1f}   (torch's cross entropy)", flush=True
            )
    path = options.out / "distill_digits.png"
    draw(results, teacher_accuracy, path)
    print(f"\nchart: {path}, {time.perf_counter() - start:.0f} s in all")
    worst = torch.tensor(list(gaps.values())).max()
    print(
        "The gap is |fused - reference| / max(1, |reference|) of a training step's loss: float32 rounding, amplified "
        f"by training.\nIts largest value is {worst:.1e}; {TOLERANCE:.0e} is allowed."
    )
    apart = [name for name, gap in gaps.items() if not gap <= TOLERANCE]
    if apart:
        sys.exit(f"FAILED: the backends' training curves disagree for {', '.join(apart)}")
    print("The backends' training curves agree.")


if __name__ == "__main__":
    main()
