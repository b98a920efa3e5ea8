"""The Triton backend's kernels compiled ahead of time for every target: registers, spills, memory.

Kernels are specialised on what the host code decides, so the public API is called on CPU tensors and its launches are
compiled in place of run. :data:`SIZES` are calls that between them choose every tile that calls of any size choose;
:data:`KINDS` differ in anything but size: dtypes, layouts, modes. What several calls share is compiled once for each
target.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from helpers import name_of
from losses import LOSSES, STANDARDIZED
from triton.runtime.jit import JITFunction
from triton_targets import TARGETS, compiler

pytestmark = pytest.mark.triton

ALL = LOSSES | STANDARDIZED
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
#: Kernels that read or write the matrices.
SWEEPS = ("fused_kernel", "split_kernel", "gradient_kernel", "scale_kernel")


@dataclass(frozen=True)
class Call:
    """A training step; backward gets a factor, so that its kernels are launched too."""

    loss: str
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.loss, *map(name_of, (self.shape, self.dtype)), *map(str, self.options.values())])

    @property
    def aligned(self) -> bool:
        """Whether these are rows that begin at a multiple of 16 bytes."""
        return len(self.shape) == 2 and self.shape[1] * self.dtype.itemsize % 16 == 0

    def run(self) -> None:
        case = ALL[self.loss]
        student = torch.zeros(self.shape, dtype=self.dtype, requires_grad=True)
        target = torch.zeros(self.shape[:1] + self.shape[2:], dtype=torch.int64)
        loss = case.call(student, torch.zeros_like(student), target=target, backend="triton", **self.options)
        loss.backward(torch.full_like(loss, 2.0))


SIZE_OPTIONS = ("BLOCK", "BLOCK_N", "BLOCK_C", "TILES", "AGAIN", "PARTS", "CANDIDATES", "num_warps")


@contextmanager
def choices() -> Iterator[set[tuple[Any, ...]]]:
    """Kernels and tiles that host code would launch meanwhile; nothing is compiled or run."""
    seen: set[tuple[Any, ...]] = set()

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = (*SIZE_OPTIONS, "WIDE") if options.get("AGAIN") else SIZE_OPTIONS
        seen.add((kernel.fn.__name__, *((name, options[name]) for name in names if name in options)))

    before, JITFunction.run = JITFunction.run, note
    try:
        with compiler("sm_90"):
            yield seen
    finally:
        JITFunction.run = before


def calls_of_all_sizes() -> Iterator[Call]:
    """Rows and pixels, few classes to many; of losses with one tile, that with the most registers comes first."""
    # Around the powers of two that a tile may be wide, with 16-byte accesses and without; then what is split.
    short = [10, 15, 16, 28, 30, 60, 64, 66, 100, 127, 128, 200, 255, 500, 512]
    long = [2**n - odd for n in range(10, 15) for odd in (0, 1)] + [30000, 70000, 130000]
    pixels = [(1, c, 16, 16) for c in (10, 19, 50, 100, 200, 500, 1000)]
    shapes = [(2, c) for c in short + long] + pixels
    ranked = ["gdkd3_worst_both", "gdkd_both_ce", "gdkd3", "gdkd_k20"]
    for loss in ["everything", "whole_and_topk", "ls_gdkd", "pr_gdkd", *ranked, "bdd", "dkd", "kd"]:
        for dtype in (F32, BF16, F64):
            yield from (Call(loss, shape, dtype) for shape in shapes if shape[1] > ALL[loss].smallest)


def cover(calls: Iterator[Call]) -> list[Call]:
    """The calls that choose a tile which none before them chose, in single or double precision."""
    known: set[tuple[Any, ...]] = set()
    needed = []
    for call in calls:
        with choices() as tiles:
            call.run()
        chosen = {(call.dtype == F64, *tile) for tile in tiles}
        if chosen - known:
            known |= chosen
            needed.append(call)
    return needed


SIZES = cover(calls_of_all_sizes())
RECOMPUTE = {"mode": "recompute"}
#: For one target; what differs between losses is the same on all.
EACH_LOSS = [Call(loss, (64, 100), options=RECOMPUTE) for loss in ALL]
KINDS = [
    Call("dkd", (64, 4096), BF16),
    Call("dkd", (64, 4095), BF16),
    Call("gdkd", (64, 1000), torch.float16),
    # What takes the most registers of a tile is not known beforehand where exponentials are computed again.
    *(Call(loss, (2, 16384 - odd), dtype) for loss in ("gdkd", "bdd") for dtype in (F32, BF16) for odd in (0, 1)),
    Call("gdkd", (2, 128256), BF16),
    Call("gdkd", (2, 21, 5, 7)),
    Call("kd", (2, 19, 16, 16), BF16),
    # Two selections, of split rows and pixels.
    Call("best_and_worst", (2, 33000)),
    Call("best_and_worst", (1, 150, 16, 16)),
    Call("best_and_worst", (2, 4097), F64),
    Call("pr_dkd", (64, 1000), BF16),
    Call("dkd", (64, 1000), BF16, options={**RECOMPUTE, "reduction": "none"}),
    Call("kd", (64, 1000), options={"reduction": "none"}),
]


@pytest.mark.parametrize(
    ("call", "target"),
    [*itertools.product([*SIZES, *KINDS], TARGETS), *((call, "sm_90") for call in EACH_LOSS)],
    ids=str,
)
def test_compiles(call: Call, target: str) -> None:
    with compiler(target) as driver:
        call.run()
    assert driver.compiled
    for kernel in driver.compiled.values():
        check = check_amd if TARGETS[target].backend == "hip" else check_nvidia
        check(kernel)
        wide = has_wide_amd if TARGETS[target].backend == "hip" else has_wide_nvidia
        if call.aligned and kernel.metadata.name in SWEEPS:
            assert wide(kernel), f"{kernel.metadata.name} has no 16-byte access"


def test_a_training_run_compiles_little() -> None:
    """Class counts, batches, k, temperatures and weights are run-time arguments: only tiles and alignments differ."""
    with compiler("sm_90") as driver:
        for step, classes in enumerate(range(600, 1000, 25)):
            options = {"k": 1 + step, "temperature": 1.0 + step / 4, "w0": step / 2, "w2": 8.0 - step / 8}
            Call("gdkd", (1 + 5 * step, classes), options=options).run()
            Call("dkd", (2 + step % 2, 30, 1 + step, 7), options={"ignore_index": step, "alpha": 1.0 + step}).run()
    compiled = Counter(kernel.metadata.name for kernel in driver.compiled.values())
    # Rows: of 4, 8 and 16 bytes' alignment. Pixels: batches of images have one shape of strides.
    assert compiled == {"fused_kernel": 3 + 1, "scale_kernel": 3 + 1, "sum_rows_kernel": 1, "weight_sum_kernel": 1}


# Reports of the compilers -----------------------------------------------------------------------------------------

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def resources(kernel: Any) -> dict[str, int]:
    """What ptxas says of a binary: registers, bytes of stack (spills are there), of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(rf"Function {kernel.metadata.name}:\s+(REG:.*)", report)
    assert usage, report
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", usage[1])}


#: Bytes of stack that a call of the compiler's own division in double precision takes: no spill.
CALL_FRAME = 8


def check_nvidia(kernel: Any) -> None:
    used, threads = resources(kernel), 32 * kernel.metadata.num_warps
    if used["STACK"] <= CALL_FRAME:
        used["STACK"] = 0
    assert used["STACK"] == used["LOCAL"] == 0, f"{kernel.metadata.name} spills: {used}"
    assert used["REG"] * threads <= 65536
    assert kernel.metadata.shared <= 99 * 1024  # what a block may have on any GPU since sm_80
    assert threads <= 1024


def has_wide_nvidia(kernel: Any) -> bool:
    """Whether loads, where there are any, and stores of matrices move 16 bytes a thread."""
    wide = r"{}\.global\S*\.(v4\.b32|v2\.b64)"
    ptx = kernel.asm["ptx"]
    names = kernel.src.fn.arg_names
    stores = "gradient" in names and (names.index("gradient"),) not in kernel.src.constants  # a constant is None
    return bool(re.search(wide.format("ld"), ptx)) and (not stores or bool(re.search(wide.format("st"), ptx)))


def check_amd(kernel: Any) -> None:
    text = kernel.asm["amdgcn"]
    used = {name: int(number) for name, number in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
    # Scalar registers spill into lanes of vector registers, which are counted; only scratch is memory.
    assert used["private_segment_fixed_size"] == used["vgpr_spill_count"] == 0, f"{kernel.metadata.name} spills"
    assert used["vgpr_count"] <= 512
    assert used["group_segment_fixed_size"] <= 65536
    assert kernel.metadata.num_warps * 64 <= 1024


def has_wide_amd(kernel: Any) -> bool:
    """Whether loads move 16 bytes a thread, or 8 where a single warp, of twice the threads, has no more for each."""
    most = "[24]" if kernel.metadata.num_warps == 1 else "4"
    return bool(re.search(rf"(global|buffer)_load_dwordx{most}", kernel.asm["amdgcn"]))


# That the checks can fail -----------------------------------------------------------------------------------------


@triton.jit
def _copy_many(source, out, stride, BLOCK: tl.constexpr, COPIES: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    total = tl.load(source + at)
    values = ()
    for i in tl.static_range(COPIES):
        values = values + (tl.load(source + (i + 1) * stride + at),)  # noqa: RUF005
        total += values[i]
    for i in tl.static_range(COPIES):
        tl.store(out + (i + 1) * stride + at, values[i] * tl.sum(total, 0))


def test_spills_are_seen() -> None:
    source, out = torch.zeros(1 << 16), torch.zeros(1 << 16)
    for stride, spills, wide in ((3, False, False), (1024, False, True), (1024, True, True)):
        with compiler("sm_90") as driver:
            limit = {"maxnreg": 32} if spills else {}
            _copy_many[(1,)](source, out, stride, BLOCK=1024, COPIES=16, num_warps=4, enable_fp_fusion=True, **limit)
        (kernel,) = driver.compiled.values()
        assert (resources(kernel)["STACK"] > 0) == spills
        assert ("st.global.b32" in kernel.asm["ptx"]) != wide
