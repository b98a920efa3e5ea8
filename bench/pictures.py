"""The documentation's pictures: ``python bench/pictures.py`` writes docs/pictures/*.svg.

``speed`` draws the times of a benchmark's results.json against the logits' size. ``memory`` measures what a step
allocates against the vocabulary. ``gradients`` computes each loss's gradient for one sample of ten classes.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from losses import LOSSES, make_logits
from measure import peak_extra_bytes
from shapes import Shape

import kdkernels

mpl.use("Agg")
mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["svg.hashsalt"] = "kdkernels"
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/epyc-avx512/results.json"
COLOURS = {"eager": "#d1495b", "compile": "#e9a23b", "fused": "#1f77b4", "floor": "#9aa5b1"}
VOCABULARIES = [8192, 16384, 32768, 65536, 131072]
TOKENS = 64
#: One sample: the teacher prefers class 0, the target; the student prefers class 1 and does not know class 3.
TEACHER = [6.0, 4.0, 3.0, 2.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]
STUDENT = [3.0, 4.5, 2.0, -1.0, 1.5, 1.0, 0.5, 0.0, 1.0, -1.0]


def tidy(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"written: {path}, {path.stat().st_size // 1024} KB")


def draw_speed(path: Path, results_path: Path) -> None:
    """Time of loss and gradient against the number of logits, a panel a loss."""
    results = json.loads(results_path.read_text())
    rows = [row for row in results["results"] if row["phase"] == "forward+backward" and row["milliseconds"]]
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    figure, axes = plt.subplots(1, len(losses), figsize=(3 * len(losses), 3.3), sharey=True, layout="constrained")
    for axis, loss in zip(axes, losses, strict=True):
        for name in ("eager", "compile", "fused", "floor"):
            of_name = [row for row in rows if (row["loss"], row["contender"]) == (loss, name)]
            points = sorted((row["samples"] * row["classes"], row["milliseconds"]) for row in of_name)
            if not points:  # not run, or its error exceeds the tolerance
                continue
            style = "--" if name == "floor" else "-"
            label = "kdkernels" if name == "fused" else name
            axis.loglog(*zip(*points, strict=True), style, marker="o", ms=4, color=COLOURS[name], label=label)
        axis.set_title(loss.upper().replace("_", "-"), fontsize=10)
        axis.set_xlabel("logits, N x C")
        tidy(axis)
    axes[0].set_ylabel("loss + gradient, ms")
    axes[0].legend(frameon=False, fontsize=8)
    facts = results["machine"]
    title = f"{facts['cpu']}, {facts['instruction_set']}, {facts['threads']} threads, torch {facts['torch']}"
    figure.suptitle(f"{title}, {facts['when'][:10]}; floor: two reads and one write", fontsize=9)
    save(figure, path)


def memory_of(call: Callable[[], torch.Tensor], student: torch.Tensor, *, training: bool) -> float:
    """Peak of what a step of the loss, in training with its gradient, allocates, in MB. The first step warms up."""

    def step() -> None:
        with torch.set_grad_enabled(training):
            loss = call()
        if training:
            loss.backward()

    step()
    student.grad = None
    gc.collect()
    peak = peak_extra_bytes(step, torch.device("cpu")) / 1e6
    student.grad = None
    return peak


def draw_memory(path: Path) -> None:
    """Extra memory of GDKD for 64 tokens against the vocabulary."""
    loss = LOSSES["gdkd"]
    found: dict[tuple[str, bool], list[float]] = {
        (name, training): [] for name in ("eager", "kdkernels") for training in (True, False)
    }
    for classes in VOCABULARIES:
        shape = Shape((TOKENS, classes))
        logits = make_logits(shape, torch.float32)
        calls = {
            "eager": lambda logits=logits: loss.call_eager(*logits),
            "kdkernels": lambda logits=logits, shape=shape: loss.call_ours(*logits, shape),
        }
        for (name, training), values in found.items():
            values.append(memory_of(calls[name], logits[0], training=training))
    figure, axis = plt.subplots(figsize=(5, 3.3), layout="constrained")
    for (name, training), values in found.items():
        label = f"{name}, {'loss and gradient' if training else 'loss alone'}"
        print(f"{label}: {', '.join(f'{value:.3g}' for value in values)} MB")
        colour = COLOURS["fused" if name == "kdkernels" else name]
        axis.plot(VOCABULARIES, values, "o-" if training else "o--", ms=4, color=colour, label=label)
    axis.set_xlabel("classes (vocabulary)")
    axis.set_ylabel("extra memory of a step, MB")
    axis.set_title(f"GDKD, {TOKENS} tokens, float32; the gradient is included", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    tidy(axis)
    save(figure, path)


def gradient_of(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[float]:
    """Minus the gradient in one sample's logits: the way a step moves each of them."""
    student = torch.tensor([STUDENT], dtype=torch.float64, requires_grad=True)
    loss(student, torch.tensor([TEACHER], dtype=torch.float64)).backward()
    return (-student.grad[0]).tolist()


def draw_gradients(path: Path) -> None:
    """The logits of one sample, and the way each loss moves the student's: target, top-k and tail."""
    target = torch.tensor([0])
    losses: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "KD, T = 4": kdkernels.kd_loss,
        "reverse KD, T = 4": kdkernels.reverse_kd_loss,
        "BDD, 1, 1, T = 4": kdkernels.bdd_loss,
        "DKD, alpha 1, beta 8, T = 4": lambda s, t: kdkernels.dkd_loss(s, t, target),
        "GDKD, k 5, w 1, 1, 8, T = 4": kdkernels.gdkd_loss,
        "GDKD3, k 4, w 1, 1, 8, T = 4": kdkernels.gdkd3_loss,
        "LSKD, T = 2, without its 9": lambda s, t: kdkernels.kd_loss(s, t, 2.0, standardize="sample"),
    }
    figure, axes = plt.subplots(2, 4, figsize=(12, 5), layout="constrained")
    classes = range(len(TEACHER))
    first, *others = axes.flat
    first.plot(classes, TEACHER, "o-", ms=4, color="#333333", label="teacher")
    first.plot(classes, STUDENT, "s--", ms=4, color=COLOURS["fused"], label="student")
    first.set_title("logits", fontsize=10)
    first.legend(frameon=False, fontsize=8)
    colours = ["#d1495b"] + ["#e9a23b"] * 4 + ["#1f77b4"] * 5
    for axis, (name, loss) in zip(others, losses.items(), strict=True):
        axis.bar(classes, gradient_of(loss), color=colours)
        axis.axhline(0, color="#333333", lw=0.8)
        axis.set_title(name, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks(list(classes))
        tidy(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel("logit" if axis is first else "- gradient")
    figure.suptitle("red: target, orange: rest of the teacher's top 5, blue: tail; scales differ", fontsize=10)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "memory", "gradients"], help="default: all three")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of speed (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures", help="folder (default %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only in (None, "speed"):
        draw_speed(options.out / "speed.svg", options.results)
    if options.only in (None, "memory"):
        draw_memory(options.out / "memory.svg")
    if options.only in (None, "gradients"):
        draw_gradients(options.out / "gradients.svg")


if __name__ == "__main__":
    main()
