"""Time against size: ``python bench/scaling.py`` draws docs/scaling.png.

The loss with its gradient, over five orders of magnitude of N x C, on one thread and on all: a straight line says that
nothing in it grows faster than the logits, and where it begins, what a call costs by itself.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from pathlib import Path

import report
import torch
from losses import LOSSES, make_logits
from measure import CpuClock, time_interleaved
from shapes import Shape

#: Exponents of two of N x C, with four times as many classes as samples.
SIZES = range(10, 27, 2)


def shape_of(exponent: int) -> Shape:
    samples = 1 << (exponent // 2 - 1)
    return Shape((samples, (1 << exponent) // samples))


def seconds_of(names: list[str], shape: Shape, seconds: float) -> dict[str, float]:
    """Median seconds of a step of each loss, and of reading both matrices and writing a third (``floor``)."""
    student, teacher, target = make_logits(shape, torch.float32)

    def step_of(name: str):
        def step() -> None:
            student.grad = None
            LOSSES[name].call_ours(student, teacher, target, shape).backward()

        return step

    steps = {name: step_of(name) for name in names}
    detached, written = student.detach(), torch.empty_like(teacher)
    steps["floor"] = lambda: torch.add(detached, teacher, out=written)
    return {name: statistics.median(times) for name, times in time_interleaved(steps, seconds, CpuClock()).items()}


def draw(times: dict[int, dict[int, dict[str, float]]], path: Path) -> None:
    """One panel a number of threads: nanoseconds a logit."""
    import matplotlib as mpl  # noqa: PLC0415, as in plot.py

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, len(times), figsize=(5 * len(times), 4), sharey=True, squeeze=False)
    for axis, (threads, by_size) in zip(axes[0], times.items(), strict=True):
        for name in next(iter(by_size.values())):
            colour = "#9aa5b1" if name == "floor" else None
            sizes = [2**exponent for exponent in by_size]
            axis.loglog(sizes, [row[name] * 1e3 for row in by_size.values()], marker=".", label=name, color=colour)
        axis.set_title(f"{threads} thread{'s' if threads > 1 else ''}", fontsize=10)
        axis.set_xlabel("N x C")
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("loss + gradient, ms")
    axes[0][0].legend(frameon=False)
    facts = report.machine(torch.device("cpu"))
    figure.suptitle(f"{facts['cpu']}, {facts['instruction_set'] or 'no kernels'}, torch {facts['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=["dkd", "gdkd", "pr_dkd"])
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each size (default 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/scaling.png")
    options = parser.parse_args()
    all_threads = torch.get_num_threads()
    times: dict[int, dict[int, dict[str, float]]] = {}
    lines = []
    for threads in dict.fromkeys((1, all_threads)):
        torch.set_num_threads(threads)
        times[threads] = {}
        for exponent in SIZES:
            row = times[threads][exponent] = seconds_of(options.losses, shape_of(exponent), options.seconds)
            gc.collect()
            per_logit = [report.show(value * 1e9 / 2**exponent) for value in row.values()]
            lines.append(
                [f"{threads} x {shape_of(exponent).name}", *(report.show(v * 1e3) for v in row.values()), *per_logit]
            )
    names = list(row)
    header = ["threads x shape", *(f"{name} ms" for name in names), *(f"{name} ns/logit" for name in names)]
    print(report.describe(report.machine(torch.device("cpu"))), "\n\n" + report.table(header, lines))
    draw(times, options.out)
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
