"""What the machine allows at best: ``python bench/roofline.py``.

Two things cannot be had for less: the logits have to be read and the gradient written, and every logit takes an
exponential (one a temperature, unless one temperature is half of the other). Both are measured, the memory's share for
each shape by torch's own sums (cache and memory alike), the exponentials by the kernels' own ``exp2`` in registers
(bench/exp2_throughput.cpp, for which a C++ compiler has to be here). As the two can go on at the same time, a loss with
its gradient takes at least the longer of both; classes that standardise the logits have to be read once before.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import report
import torch
from losses import LOSSES, Loss
from measure import CpuClock, Step, time_interleaved
from shapes import Shape, parse_shape
from torch import Tensor

import kdkernels
from kdkernels import ops

#: How csrc/cpu builds each instruction set: macros and what the compiler may use.
_FLAGS = {
    "avx512": ["-DKDK_AVX512", "-DKDK_VECTOR_BYTES=64", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
    "avx2": ["-DKDK_AVX2", "-DKDK_VECTOR_BYTES=32", "-mavx2", "-mfma", "-mf16c"],
    "baseline": ["-DKDK_VECTOR_BYTES=16"],
}
_SHAPES = ["256x100", "256x1000", "1024x1000", "64x32000", "128x128256"]


@functools.cache
def exp2_seconds(instruction_set: str | None) -> float | None:
    """Seconds one exponential takes one thread; None where there is no compiler to find out with."""
    compiler = shutil.which("c++")
    if compiler is None or instruction_set is None:
        return None
    source = Path(__file__).with_name("exp2_throughput.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "exp2.so"
        command = [compiler, "-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
        command += ["-fPIC", "-shared", "-w", *_FLAGS[instruction_set], str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).exp2_nanoseconds
        function.restype = ctypes.c_double
        return function() * 1e-9


def exponentials(loss: Loss) -> int:
    """Exponentials a class: of student and teacher, at each temperature."""
    return 2 * len({value for name, value in loss.numbers.items() if "temperature" in name})


def bound_seconds(loss: Loss, shape: Shape, floor: float, read: float) -> float | None:
    """The least time of the loss with its gradient, from those of reading both matrices, and of writing a third too."""
    one = exp2_seconds(kdkernels.cpu_instruction_set() if ops.unavailable is None else None)
    if one is None:
        return None
    arithmetic = exponentials(loss) * shape.samples * shape.classes * one / torch.get_num_threads()
    before = 0.0 if loss.rows_are_independent else read
    return before + max(floor, arithmetic)


def read_step(student: Tensor, teacher: Tensor) -> Step:
    """Two reads of the matrix."""
    return lambda: (student.sum(), teacher.sum())


def memory_steps(student: Tensor, teacher: Tensor) -> dict[str, Step]:
    """Two reads of the matrix, two reads and a write, one of each."""
    gradient = torch.empty_like(student)
    return {
        "read": read_step(student, teacher),
        "floor": lambda: torch.add(student, teacher, out=gradient),
        "copy": lambda: gradient.copy_(student),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[parse_shape(text) for text in _SHAPES])
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=["kd", "bdd", "dkd", "gdkd", "pr_dkd"])
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each shape (default 1)")
    options = parser.parse_args()
    print(report.describe(report.machine(torch.device("cpu"))), "\n")
    for name in ops.INSTRUCTION_SETS if ops.unavailable is None else ():
        one = exp2_seconds(name)
        print(f"exp2, {name}: {'no C++ compiler' if one is None else f'{one * 1e9:.3f} ns a thread'}")
    lines = []
    for shape in options.shapes:
        student, teacher = torch.randn(2, shape.samples, shape.classes).unbind()
        samples = time_interleaved(memory_steps(student, teacher), options.seconds, CpuClock())
        read, floor, copy = (statistics.median(samples[name]) for name in ("read", "floor", "copy"))
        matrix = student.nbytes
        rates = [f"{times * matrix / seconds / 1e9:.3g}" for times, seconds in ((2, read), (2, copy), (3, floor))]
        bounds = []
        for name in options.losses:
            bound = bound_seconds(LOSSES[name], shape, floor, read)
            bounds.append("-" if bound is None else f"{bound * 1e3:.3g}")
        lines.append([shape.name, *rates, f"{floor * 1e3:.3g}", *bounds])
    header = ["float32", "read GB/s", "copy GB/s", "add GB/s", "floor ms", *(f"{name} ms" for name in options.losses)]
    print(f"\nleast time of the loss with its gradient:\n{report.table(header, lines)}")


if __name__ == "__main__":
    main()
