"""Benchmark of the losses, on a GPU if there is one: ``python bench/run.py [--quick]``.

Contenders, on the same logits: ``eager`` (the papers' formulas, bench/eager.py), ``compile`` (torch.compile of them),
``fused`` and ``recompute`` (ours, both modes, through the public API) and ``floor`` (``torch.add(s, t, out=g)``, the
two reads and one write that a loss with its gradient cannot do without). ``floor+alloc`` is the same sum into a new
tensor, which a gradient in training is too. On a GPU the floor is the time of those bytes at the best measured rate of
a large copy, calls are timed by CUDA events with cold caches, and ``liger`` is Liger-Kernel's KL where it is installed.

Every contender's loss and gradient are checked against the float64 reference first; a wrong one is neither timed nor
compared with. Two phases are timed: ``forward`` (no grad) and ``forward+backward`` (the gradient reset to None before
each call). All contenders are charged the same bytes: 2 reads of the N x C logits forward, 2 reads and 1 write of them
with the gradient. float16 gradients are taken through a loss scale, as in training: a mean's would underflow without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported: the profiler's banners would tear the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import report
import roofline
import table
import torch
from losses import LOSSES, make_logits
from measure import (
    Clock,
    OtherProcesses,
    clock_of,
    copy_rate,
    median_ratio,
    peak_extra_bytes,
    quantiles,
    time_interleaved,
)
from report import FORWARD, TRAINING, Case, Row
from shapes import IGNORED, Shape, parse_shape
from torch import Tensor
from tqdm import tqdm

from kdkernels import dispatch

SHAPES: list[Shape] = [
    Shape((64, 100)),  # CIFAR-100
    Shape((256, 100)),
    Shape((256, 1000)),  # ImageNet
    Shape((1024, 1000)),
    Shape((256, 21841)),  # ImageNet-21k
    Shape((64, 32000)),  # tokens over language models' vocabularies
    Shape((128, 128256)),
    Shape((16384, 10)),  # CIFAR-10
    Shape((16384, 19)),  # rows of pixels
    Shape((2, 19, 512, 1024)),  # Cityscapes, per pixel
    Shape((2, 19, 512, 1024), channels_last=True),
    Shape((2, 150, 128, 128)),  # ADE20K at a network's own resolution
]
LARGE_SHAPES: list[Shape] = [
    Shape((512, 128256)),
    Shape((4, 512, 32000)),  # sequences of tokens
    Shape((4, 512, 32000), padding=75),
]
QUICK_SHAPES: list[Shape] = [Shape((256, 100)), Shape((256, 1000)), Shape((1024, 1000)), Shape((2, 19, 128, 256))]
QUICK_LOSSES = ["dkd", "gdkd"]
#: Compiling stops when the next one might run past this, so that --quick stays under a minute.
QUICK_COMPILE_UNTIL = 45.0

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}

#: |loss error| / max(1, |loss|) and norm(gradient error) / norm(gradient), against the float64 reference.
OUR_TOLERANCE = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (2e-6, 2e-6),
    torch.float16: (2e-6, 5e-4),
    torch.bfloat16: (2e-6, 4e-3),
}
#: The plain formulas round every intermediate to the logits' dtype: generous, enough to catch a wrong formula.
PLAIN_TOLERANCE = {
    torch.float64: (1e-11, 1e-9),
    torch.float32: (1e-5, 2e-5),
    torch.float16: (5e-3, 3e-2),
    torch.bfloat16: (1e-1, 1e-1),
}

#: Rows of the float64 reference are computed in blocks of about this many logits, to bound its memory.
REFERENCE_BLOCK = 1 << 21


@dataclass(frozen=True)
class Contender:
    """A way to compute the loss; ``loss`` maps ``(student, teacher, target)`` to the mean loss."""

    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    tolerance: tuple[float, float]
    ours: bool = False
    phases: tuple[str, ...] = (FORWARD, TRAINING)


@dataclass(frozen=True)
class Place:
    """Where the benchmark runs, and how it is timed there."""

    device: torch.device
    clock: Clock
    #: Of a GPU, in bytes a second.
    copy_rate: float | None

    @classmethod
    def of(cls, device: torch.device) -> Place:
        return cls(device, clock_of(device), copy_rate(device) if device.type == "cuda" else None)


# Contenders ------------------------------------------------------------------------------------------------------


def our_contenders(case: Case, device: torch.device, backends: list[str], modes: list[str]) -> Iterator[Contender]:
    """Ours on every backend that is here. The reference backend has one mode and is marked as what it is."""
    loss, shape, dtype = LOSSES[case.loss], case.shape, case.dtype
    for backend in backends:
        if dispatch.why_not(backend, device.type) is not None:
            continue
        if backend == "reference":

            def plain(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
                return loss.call_ours(student, teacher, target, shape, backend="reference")

            yield Contender("reference", plain, PLAIN_TOLERANCE[dtype], ours=True)
            continue
        for mode in modes:

            def fast(
                student: Tensor, teacher: Tensor, target: Tensor, backend: str = backend, mode: str = mode
            ) -> Tensor:
                return loss.call_ours(student, teacher, target, shape, backend=backend, mode=mode)

            # Without a gradient both modes are the same computation.
            phases = (FORWARD, TRAINING) if mode == modes[0] else (TRAINING,)
            name = mode if backend == backends[0] else f"{backend} {mode}"
            yield Contender(name, fast, OUR_TOLERANCE[dtype], ours=True, phases=phases)


def eager_contender(case: Case) -> Contender:
    """The formulas as a script calls them: of flattened logits, which is a copy of those of pixels, without padding."""
    loss, shape = LOSSES[case.loss], case.shape

    def plain(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return loss.call_eager(*shape.valid_rows(student, teacher, target))

    return Contender("eager", plain, PLAIN_TOLERANCE[case.dtype])


def compiled_contender(case: Case) -> Contender:
    torch._dynamo.reset()  # each case compiles for its own shape, as a training run would
    torch._dynamo.config.capture_dynamic_output_shape_ops = True  # to select what is no padding
    compiled = torch.compile(eager_contender(case).loss, dynamic=False, fullgraph=True)
    return Contender("compile", compiled, PLAIN_TOLERANCE[case.dtype])


def liger_contender(case: Case) -> Contender | None:
    """Liger-Kernel's KL, where it is installed and is the loss of the case."""
    loss = LOSSES[case.loss].call_liger
    if loss is None:
        return None

    def plain(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return loss(*case.shape.valid_rows(student, teacher, target))

    return Contender("liger", plain, PLAIN_TOLERANCE[case.dtype])


def loss_scale(contender: Contender, student: Tensor) -> float:
    """What backward starts from: 1, and a loss scale for float16, since a mean's gradients underflow without one."""
    if student.dtype != torch.float16:
        return 1.0
    # From 512 on, T^2 * beta * scale overflows inside the eager formulas; ours is limited by the gradient itself.
    return min(2.0**15, 512.0 * student.shape[0]) if contender.ours else 256.0


def backward(contender: Contender, loss: Tensor, student: Tensor) -> None:
    scale = loss_scale(contender, student)
    loss.backward(None if scale == 1.0 else torch.tensor(scale, dtype=loss.dtype, device=loss.device))


# Correctness -----------------------------------------------------------------------------------------------------


def reference(case: Case, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """Mean loss and gradient in float64, by blocks of rows where the rows do not depend on each other."""
    loss, shape = LOSSES[case.loss], case.shape
    student, teacher, target = shape.rows(student.detach()), shape.rows(teacher), target.flatten()
    valid = int((target != IGNORED).sum())
    block = max(1, REFERENCE_BLOCK // shape.classes) if loss.rows_are_independent else shape.samples
    total, gradients = 0.0, []
    for rows in torch.arange(shape.samples).split(block):
        part = student[rows].double().requires_grad_()
        flat = Shape((len(rows), shape.classes), shape.padding)
        options = {"backend": "reference", "reduction": "mean", "denominator": valid}
        value = loss.call_ours(part, teacher[rows].double(), target[rows], flat, **options)
        value.backward()
        total += value.item()
        gradients.append(part.grad)
    return total, shape.lay_out(torch.cat(gradients))


def check(
    contender: Contender, logits: tuple[Tensor, Tensor, Tensor], truth: tuple[float, Tensor]
) -> tuple[str, float, float, float]:
    """``(status, loss error, gradient error, seconds of the first calls)``; without grad the loss must be right too."""
    student = logits[0]
    student.grad = None
    start = time.perf_counter()
    loss = contender.loss(*logits)
    backward(contender, loss, student)
    values = [loss.detach().double()]
    if FORWARD in contender.phases:
        with torch.no_grad():
            values.append(contender.loss(*logits).double())
    seconds = time.perf_counter() - start
    expected, gradient = truth
    loss_error = (torch.stack(values) - expected).abs().max().item() / max(1.0, abs(expected))  # a NaN prevails
    found = student.grad.double() / loss_scale(contender, student)
    gradient_error = ((found - gradient).norm() / gradient.norm()).item()
    student.grad = None
    # Written so that a NaN is wrong.
    right = loss_error <= contender.tolerance[0] and gradient_error <= contender.tolerance[1]
    return "ok" if right else "WRONG", loss_error, gradient_error, seconds


# One case --------------------------------------------------------------------------------------------------------


def run_case(case: Case, contenders: list[Contender], seconds: float, where: Place) -> list[Row]:
    """Checks and then times all contenders of a case, both phases."""
    student, teacher, target = (tensor.detach().to(where.device) for tensor in make_logits(case.shape, case.dtype))
    logits = student.requires_grad_(), teacher, target
    truth = reference(case, *logits)
    rows: dict[tuple[str, str], Row] = {}
    checked = []
    for contender in contenders:
        try:
            status, loss_error, gradient_error, first_call = check(contender, logits, truth)
        except Exception as error:  # one contender that cannot run must not end the others' benchmark
            reason = str(error).strip().splitlines() or [""]
            status, loss_error, gradient_error, first_call = f"failed: {type(error).__name__}: {reason[0]}", *3 * [None]
        for phase in contender.phases:
            row = rows[phase, contender.name] = new_row(case, phase, contender.name, status)
            row.loss_error, row.gradient_error = loss_error, gradient_error
            row.first_call_seconds = first_call if contender.name == "compile" else None
        if status == "ok":
            checked.append(contender)
    del truth
    for phase in (FORWARD, TRAINING):
        steps = {c.name: make_step(c, phase, logits) for c in checked if phase in c.phases}
        for name, step in steps.items():
            step()
            logits[0].grad = None  # else the step would start by releasing it, and that is no memory of the step
            fill_memory(rows[phase, name], case, peak_extra_bytes(step, where.device))
            logits[0].grad = None
        if phase == TRAINING:
            steps |= floor_steps(logits)
            if where.copy_rate is None:
                steps["read"] = roofline.read_step(logits[0].detach(), logits[1])
        with OtherProcesses() as others:
            samples = time_interleaved(steps, seconds, where.clock)
        reads = samples.pop("read", [])
        if phase == TRAINING and where.copy_rate is not None:
            samples["floor"] = [3 * case.matrix_bytes / where.copy_rate] * len(samples["floor+alloc"])
        for name in samples:
            rows.setdefault((phase, name), new_row(case, phase, name))
        fill_times(rows, case, phase, samples)
        fill_bounds(rows, case, samples, reads)
        for name in samples:
            rows[phase, name].cpu_used_by_others = others.share
    return list(rows.values())


def new_row(case: Case, phase: str, contender: str, status: str = "ok") -> Row:
    shape = case.shape
    return Row(
        case.loss,
        shape.name,
        shape.samples,
        shape.classes,
        str(case.dtype).removeprefix("torch."),
        phase,
        contender,
        status,
    )


def make_step(contender: Contender, phase: str, logits: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            contender.loss(*logits)

    def training() -> None:
        logits[0].grad = None
        backward(contender, contender.loss(*logits), logits[0])

    return forward if phase == FORWARD else training


def floor_steps(logits: tuple[Tensor, Tensor, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Two reads and one write of the matrix, into a standing buffer (on a CPU) and into a new one."""
    student, teacher = logits[0].detach(), logits[1]
    steps: dict[str, Callable[[], Tensor]] = {"floor+alloc": lambda: torch.add(student, teacher)}
    if student.is_cpu:
        gradient = torch.empty_like(student)
        steps["floor"] = lambda: torch.add(student, teacher, out=gradient)
    return steps


def fill_memory(row: Row, case: Case, peak: int) -> None:
    row.peak_extra_megabytes = peak / 1e6
    row.peak_extra_matrices = peak / case.matrix_bytes


def fill_times(rows: dict[tuple[str, str], Row], case: Case, phase: str, samples: dict[str, list[float]]) -> None:
    """Times, bandwidth and ratios of one phase."""
    moved = (3 if phase == TRAINING else 2) * case.matrix_bytes
    for name, times in samples.items():
        row = rows[phase, name]
        low, median, high = quantiles(times)
        row.rounds = len(times)
        row.milliseconds_20, row.milliseconds, row.milliseconds_80 = low * 1e3, median * 1e3, high * 1e3
        row.gigabytes_per_second = moved / median / 1e9
        if "floor" in samples:
            row.times_the_floor = median_ratio(times, samples["floor"])
        if not name.startswith("floor"):
            for other, column in (("eager", "times_faster_than_eager"), ("compile", "times_faster_than_compile")):
                if other in samples:
                    setattr(row, column, median_ratio(samples[other], times))


def fill_bounds(
    rows: dict[tuple[str, str], Row], case: Case, samples: dict[str, list[float]], reads: list[float]
) -> None:
    """Ratios of our times to the least the machine allows, round by round (see bench/roofline.py)."""
    if not reads or roofline.bound_seconds(LOSSES[case.loss], case.shape, 0.0, 0.0) is None:
        return
    measured = zip(samples["floor"], reads, strict=True)
    bounds = [roofline.bound_seconds(LOSSES[case.loss], case.shape, *times) for times in measured]
    for name in filter(report.is_ours, samples):
        rows[TRAINING, name].times_the_bound = median_ratio(samples[name], bounds)


# Command line ----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes, two losses: under a minute")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        metavar="NxC",
        help="instead of the usual ones; also BxTxC, NxCxHxW, NxCxHxW:channels_last (classes side by side in memory) "
        "and, with 75 %% of the samples ignored, e.g. BxTxC@75",
    )
    parser.add_argument("--large", action="store_true", help="also 512x128256 and 4x512x32000 (up to 14 GB of memory)")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--modes", nargs="+", choices=["fused", "recompute"], default=["fused", "recompute"])
    parser.add_argument("--device", type=torch.device, help="default: cuda where there is a GPU, else cpu")
    backends = [backend for backend in dispatch.BACKENDS if backend != "auto"]
    parser.add_argument("--backends", nargs="+", choices=backends, help="default: the device's fastest that is here")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--seconds", type=float, help="time of each case and phase (default 2, with --quick 0.25)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for results.*, %(default)s")
    parser.add_argument("--save", action="store_true", help="write to bench/results/ under the machine's name instead")
    parser.add_argument("--table", type=Path, metavar="PAGE", help="also rewrite this page's figures (bench/table.py)")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    if options.large:
        options.shapes = [*options.shapes, *LARGE_SHAPES]
    options.losses = options.losses or (QUICK_LOSSES if options.quick else list(LOSSES))
    options.seconds = options.seconds or (0.25 if options.quick else 2.0)
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fastest = dispatch.preference(options.device.type)
    here = [backend for backend in fastest if dispatch.why_not(backend, options.device.type) is None]
    options.backends = options.backends or here[:1]
    return options


def run_all(options: argparse.Namespace) -> list[Row]:
    """Every case of the options, with its table printed as it is done."""
    start = time.perf_counter()
    where = Place.of(options.device)
    longest_compile = 15.0  # a guess for the first, which also loads the compiler
    rows: list[Row] = []
    grid = itertools.product(options.dtypes, options.shapes, options.losses)
    cases = [Case(loss, shape, DTYPES[dtype]) for dtype, shape, loss in grid]
    with tqdm(cases, unit="case", dynamic_ncols=True) as bar:
        for case in bar:
            bar.set_postfix_str(str(case))
            contenders = [eager_contender(case)]
            left = QUICK_COMPILE_UNTIL - (time.perf_counter() - start)
            if not options.no_compile and not (options.quick and longest_compile > left):
                contenders.append(compiled_contender(case))
            contenders += our_contenders(case, options.device, options.backends, options.modes)
            if options.device.type == "cuda" and (liger := liger_contender(case)):
                contenders.append(liger)
            done = run_case(case, contenders, options.seconds, where)
            compiling = [row.first_call_seconds for row in done if row.first_call_seconds]
            longest_compile = max(compiling) if compiling else longest_compile
            rows += done
            bar.write(report.case_table(case, done))
            for backend in options.backends:
                if reason := dispatch.why_not(backend, options.device.type):
                    bar.write(f"  backend {backend} left out: {reason}\n")
    return rows


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = report.machine(options.device)
    print(f"{report.describe(facts)}\n")
    if options.backends == ["reference"]:
        fastest, *_ = dispatch.preference(options.device.type)
        reason = dispatch.why_not(fastest, options.device.type) or "asked for"
        print(
            f"ONLY THE REFERENCE BACKEND RUNS ({reason}).\n'reference' below is plain PyTorch for checking "
            "kernels, not the fused kernels: its figures say nothing about them.\n"
        )
    print(f"{report.LEGEND}\n")
    # A cold cache of its own, so that the compile times shown are what a first run pays.
    cache = tempfile.mkdtemp(prefix="kdkernels-bench-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    try:
        rows = run_all(options)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    print(report.summary(rows))
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "save", "table")}
    settings["shapes"] = [shape.name for shape in options.shapes]
    settings["device"] = str(options.device)
    folder, stem = options.out, "results"
    if options.save:
        folder, stem = Path(__file__).parent / "results", report.machine_name(facts)
    paths = report.save(folder, stem, facts, settings, rows)
    print("\nwritten:", *paths)
    if options.table:
        table.rewrite(options.table, json.loads(paths[0].read_text()))
    wrong = sorted({f"{row.contender} {row.loss}" for row in rows if row.status != "ok"})
    if wrong:
        print(f"NOT RIGHT: {', '.join(wrong)}", file=sys.stderr)
    return int(any(row.status != "ok" and report.is_ours(row.contender) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
