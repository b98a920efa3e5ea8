"""What the benchmark reports: one row a measurement, as tables on the terminal, JSON, CSV and charts."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import numpy
import plot
import torch
from shapes import Shape

import kdkernels
from kdkernels import ops

FORWARD, TRAINING = "forward", "forward+backward"


def is_ours(contender: str) -> bool:
    """Whether a contender is ours: a mode, after the backend's name where there are several."""
    return contender.rsplit(maxsplit=1)[-1] in ("fused", "recompute", "reference")


@dataclass(frozen=True)
class Case:
    """What one table compares."""

    loss: str
    shape: Shape
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.loss} {self.shape.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def matrix_bytes(self) -> int:
        return self.shape.samples * self.shape.classes * self.dtype.itemsize


@dataclass
class Row:
    """One measurement: a contender in a phase of a case. The columns of the CSV."""

    loss: str
    shape: str
    samples: int
    classes: int
    dtype: str
    phase: str
    contender: str
    status: str = "ok"
    loss_error: float | None = None
    gradient_error: float | None = None
    first_call_seconds: float | None = None
    rounds: int | None = None
    milliseconds: float | None = None
    milliseconds_20: float | None = None
    milliseconds_80: float | None = None
    gigabytes_per_second: float | None = None
    times_faster_than_eager: float | None = None
    times_faster_than_compile: float | None = None
    times_the_floor: float | None = None
    times_the_bound: float | None = None
    cpu_used_by_others: float | None = None
    peak_extra_megabytes: float | None = None
    peak_extra_matrices: float | None = None


def show(value: float | None) -> str:
    """A number with three significant digits, no exponent; '-' where there is none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: list[str], lines: list[list[str]]) -> str:
    """Columns aligned, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(line, widths, strict=True))) for line in (header, *lines))
    )


def case_table(case: Case, rows: list[Row]) -> str:
    """All figures of a case as text."""
    lines = []
    for phase in (FORWARD, TRAINING):
        lines += [[f"{phase}:"] + [""] * 9]
        for row in rows:
            if row.phase != phase:
                continue
            if row.status != "ok":
                lines.append([f"  {row.contender}", row.status.split(":", maxsplit=1)[0], *[""] * 8])
                continue
            memory = "-"
            if row.peak_extra_matrices is not None:
                memory = f"{row.peak_extra_matrices:.2f} = {row.peak_extra_megabytes:.3f} MB"
            lines.append(
                [
                    f"  {row.contender}",
                    show(row.milliseconds),
                    f"{show(row.milliseconds_20)}..{show(row.milliseconds_80)}",
                    show(row.gigabytes_per_second),
                    show(row.times_faster_than_eager),
                    show(row.times_faster_than_compile),
                    show(row.times_the_floor),
                    show(row.times_the_bound),
                    memory,
                    show(row.first_call_seconds),
                ]
            )
    ratios = ["x eager", "x compile", "x floor", "x bound"]
    header = ["", "ms", "20..80 %", "GB/s", *ratios, "extra memory, matrices", "compiling s"]
    text = [f"{case}  (matrix: {case.matrix_bytes / 1e6:.3g} MB)", table(header, lines)]
    for row in rows:
        if row.status != "ok" and row.phase == TRAINING:
            errors = ""
            if row.status == "WRONG":
                errors = f": loss off by {row.loss_error:.1e}, gradient by {row.gradient_error:.1e}"
            text.append(f"  {row.contender} is {row.status}{errors}")
    disturbed = max((row.cpu_used_by_others or 0.0 for row in rows), default=0.0)
    if disturbed > plot.DISTURBED:
        text.append(f"  DISTURBED: other processes used {disturbed:.0%} of the CPUs meanwhile: not times to quote")
    return "\n".join(text) + "\n"


def summary(rows: list[Row]) -> str:
    """Forward+backward of ours, one line a case."""
    lines = []
    for row in rows:
        if row.phase != TRAINING or not is_ours(row.contender):
            continue
        lines.append(
            [
                row.contender,
                row.loss,
                row.shape,
                row.dtype,
                show(row.milliseconds) if row.status == "ok" else row.status.split(":", maxsplit=1)[0],
                show(row.times_faster_than_eager),
                show(row.times_faster_than_compile),
                show(row.times_the_floor),
                show(row.times_the_bound),
                "-" if row.peak_extra_matrices is None else f"{row.peak_extra_matrices:.2f}",
                f"{row.cpu_used_by_others or 0.0:.0%}",
            ]
        )
    ratios = ["x eager", "x compile", "x floor", "x bound"]
    header = ["", "loss", "shape", "dtype", "ms", *ratios, "extra matrices", "CPU of others"]
    return f"{TRAINING}, ours:\n{table(header, lines)}"


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were taken on and with."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())):
        model = match[1]
    return {
        "cpu": model,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": kdkernels.cpu_instruction_set() if ops.unavailable is None else None,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "kdkernels": kdkernels.__version__,
        "native_extension": ops.unavailable or "built",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe(facts: dict[str, object]) -> str:
    kernels = f"kernels use {facts['instruction_set']}" if facts["instruction_set"] else "no CPU kernels"
    gpu = f"{facts['gpu']}; " if facts["gpu"] else ""
    return (
        f"{gpu}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; {kernels}, torch's "
        f"{facts['torch_instruction_set']}\nkdkernels {facts['kdkernels']}, torch {facts['torch']}, Python "
        f"{facts['python']}, {facts['system']}"
    )


def machine_name(facts: dict[str, object]) -> str:
    """A file name that tells machines apart."""
    name = facts["gpu"] or f"{facts['cpu']} {facts['instruction_set'] or 'reference'} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


LEGEND = """\
x eager, x compile: how many times faster than those; x floor: time in units of torch.add(s, t, out=g), on a GPU of as
many bytes at the rate of a large copy, lower is better. x bound: in units of the floor or, where it is longer, of the
exponentials (bench/roofline.py, CPU only). All are medians of the ratios within one round; ms are medians. GB/s counts
2 reads of the N x C matrix forward,
2 reads + 1 write with the gradient, for every contender. Extra memory: the peak of what the step allocates, the
student's gradient included. Compiling: first calls of both phases, with a cold compiler cache."""


def save(folder: Path, stem: str, facts: dict[str, object], settings: dict[str, object], rows: list[Row]) -> list[Path]:
    """Writes JSON, CSV and charts; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"machine": facts, "settings": settings, "results": [asdict(row) for row in rows]}
    as_json, as_csv = folder / f"{stem}.json", folder / f"{stem}.csv"
    as_json.write_text(json.dumps(results, indent=1) + "\n")
    with as_csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(results["results"])
    return [as_json, as_csv, *plot.draw(results, folder, stem)]
