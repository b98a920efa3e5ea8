"""Charts of a benchmark's results: ``python bench/plot.py out/bench/results.json``, or called by bench/run.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

#: Fixed colours, so that a contender looks the same in every chart.
COLOURS = {"compile": "#9aa5b1", "liger": "#e9a23b", "fused": "#1f77b4", "recompute": "#17a398", "reference": "#d1495b"}
OTHER_COLOUR = "#7a5195"

#: Share of the CPUs that other processes may use during the timing before a figure is marked.
DISTURBED = 0.05


def draw(results: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """One PNG a dtype: a row a loss, speed-up over eager on the left, time over the floor on the right."""
    import matplotlib as mpl  # noqa: PLC0415, so that a benchmark without charts needs no matplotlib

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    rows = [row for row in results["results"] if row["phase"] == "forward+backward"]
    paths = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        losses = list(dict.fromkeys(row["loss"] for row in of_dtype))
        shapes = list(dict.fromkeys(row["shape"] for row in of_dtype))
        present = {row["contender"] for row in of_dtype}
        contenders = [name for name in COLOURS if name in present]
        contenders += sorted(name for name in present if name.endswith((" fused", " recompute")))
        size = 5 + 1.5 * len(shapes), 0.9 + 2.3 * len(losses)
        figure, axes = plt.subplots(len(losses), 2, figsize=size, squeeze=False, layout="constrained")
        for (faster, floor), loss in zip(axes, losses, strict=True):
            of_loss = [row for row in of_dtype if row["loss"] == loss]
            _bars(faster, of_loss, shapes, contenders, "times_faster_than_eager")
            _bars(floor, of_loss, shapes, contenders, "times_the_floor")
            faster.set_ylabel(loss, fontweight="bold")
        axes[0][0].set_title("times faster than eager (higher is better)", fontsize=10)
        axes[0][1].set_title("time / floor: two reads and one write (lower is better)", fontsize=10)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        facts = results["machine"]
        notes = "\nREFERENCE BACKEND, not the fused kernels" if "reference" in present else ""
        if any((row["cpu_used_by_others"] or 0.0) > DISTURBED for row in of_dtype):
            notes += f"\nhatched: other processes used more than {DISTURBED:.0%} of the CPUs meanwhile, do not quote"
        figure.suptitle(
            f"loss + gradient, {dtype}: {_machine(facts)}, torch {facts['torch']}{notes}",
            fontsize=10,
        )
        path = folder / (f"{stem}.png" if dtype == "float32" else f"{stem}-{dtype}.png")
        figure.savefig(path, dpi=120)
        plt.close(figure)
        paths.append(path)
    return paths


def _machine(facts: dict[str, Any]) -> str:
    if facts.get("gpu"):
        return facts["gpu"]
    return f"{facts['cpu']}, {facts['threads']} threads, {facts['instruction_set'] or 'no kernels'}"


def _bars(axis: Any, rows: list[dict[str, Any]], shapes: list[str], contenders: list[str], column: str) -> None:
    """Bars of one column, grouped by shape, on a log scale with the line of 1."""
    width = 0.8 / max(1, len(contenders))
    for number, name in enumerate(contenders):
        colour = COLOURS.get(name, OTHER_COLOUR)
        found = {row["shape"]: row for row in rows if row["contender"] == name}
        # Bars grow from 1: up is slower or faster than the yardstick, whichever the panel shows.
        for position, shape in enumerate(shapes):
            value = found[shape][column] if shape in found else None
            if value is not None:
                x = position + (number - (len(contenders) - 1) / 2) * width
                hatch = "///" if found[shape]["cpu_used_by_others"] > DISTURBED else None
                bar = axis.bar(
                    x,
                    value - 1,
                    width * 0.92,
                    bottom=1,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white",
                )
                axis.bar_label(bar, [f"{value:.2g}" if value < 10 else f"{value:.0f}"], fontsize=7)
        axis.bar(0, 0, bottom=1, color=colour, label=name)  # in the legend even where it has no bar
    axis.set_yscale("log")
    axis.margins(y=0.15)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.grid(axis="y", alpha=0.25)
    axis.set_xticks(range(len(shapes)), shapes, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    for written in draw(json.loads(source.read_text()), source.parent, source.stem):
        print(written)
