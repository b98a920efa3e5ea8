"""What a training step moves, without a GPU: ``python bench/traffic.py``. A MODEL, NOT A MEASUREMENT.

Bytes between a GPU and its memory, and the time they take at the rate at which an H100 was measured to copy (3.0 TB/s),
for loss and gradient by

* ``eager``: the papers' formulas (bench/eager.py). Each PyTorch operation is charged the bytes of the tensors that it
  reads and of those that it writes, as if each were one perfect kernel: a lower bound. Views are free.
* ``fused`` and ``recompute``: the two modes of the backend that ``--backend`` names. Its compiled kernels run in the
  simulator (tests/ptxsim), which counts what they ask for. Targets, losses and statistics count once, being in the
  cache after.
* ``floor``: two reads and one write of the matrix.

The model knows no launch overhead, latency or arithmetic. The kernels' thread-instructions (PTX) an element are shown
for that: an H100 issues about 10 in the time it takes to move a byte, so fewer than that times the bytes leave the
memory the bottleneck.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from losses import LOSSES, Loss, make_logits
from report import show, table
from shapes import Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the simulator is a tool of the tests
from ptxsim import device_bytes


def simulator(backend: str, arch: int) -> Any:
    """Where a backend's launches on CPU tensors run in the simulator; what takes part is imported when it is wanted."""
    if backend == "cuda":
        from cuda_simulator import simulated  # noqa: PLC0415

        return simulated(arch)
    from ptxsim.triton_driver import patched_triton  # noqa: PLC0415

    return patched_triton(arch)


#: Bytes a second of a copy on an H100, reads and writes counted.
COPY_RATE = 3.0e12
#: The time is given for this many logits, whatever the simulated shape: large enough to fill a GPU.
ELEMENTS = 1 << 28
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ((64, 100), (16, 1000), (8, 4096), (4, 32000), (2, 128256))

_FACTORIES = re.compile(r"(empty|zeros|ones|full|new_\w+|\w+_like|arange|scalar_tensor)$")
_SCATTERS = re.compile(r"scatter_?$")


class ByteCount(TorchDispatchMode):
    """Counts the bytes that operations read and write, and the operations that are not mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        moved = operation_bytes(func.overloadpacket.__name__, func.is_view, inputs, outputs)
        self.bytes += moved
        self.kernels += moved > 0
        return out


def operation_bytes(name: str, is_view: bool, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """What one operation moves as one perfect kernel."""
    if is_view or name in ("detach", "alias", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"):
        return 0
    if _FACTORIES.match(name):
        return sum(map(stored_bytes, outputs))
    if _SCATTERS.match(name):
        index = inputs[1]
        # Reads and writes what the index names; out of place it copies the rest.
        copied = 0 if name.endswith("_") else stored_bytes(inputs[0]) + stored_bytes(outputs[0])
        return copied + stored_bytes(index) + 2 * index.numel() * outputs[0].element_size()
    distinct = {(tensor.data_ptr(), tensor.shape): tensor for tensor in inputs}
    return sum(map(stored_bytes, distinct.values())) + sum(map(stored_bytes, outputs))


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: those of an expanded dimension are one."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    count = 0 if tensor.numel() == 0 else 1
    for size in sizes:
        count *= size
    return count * tensor.element_size()


@dataclass(frozen=True)
class Cost:
    """Of one step of one contender."""

    contender: str
    bytes: int
    launches: int | None = None
    instructions: int | None = None


def eager_cost(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor) -> Cost:
    with ByteCount() as count:
        loss.call_eager(student, teacher, target).backward()
    student.grad = None
    return Cost("eager", count.bytes, count.kernels)


def our_cost(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor, backend: str, mode: str, arch: int) -> Cost:
    shape = Shape(tuple(student.shape))
    with simulator(backend, arch) as device:
        loss.call_ours(student, teacher, target, shape, backend=backend, mode=mode).backward()
    student.grad = None
    all_stats = [launch.stats for launch in device.log]
    moved = device_bytes(all_stats, student.nbytes)
    return Cost(mode, moved, len(all_stats), sum(stats.thread_instrs for stats in all_stats))


def costs(loss: Loss, shape: tuple[int, int], dtype: torch.dtype, backend: str, arch: int) -> list[Cost]:
    """What all contenders cost."""
    logits = make_logits(Shape(shape), dtype)
    floor = Cost("floor", 3 * logits[0].nbytes)
    ours = (our_cost(loss, *logits, backend, mode, arch) for mode in ("fused", "recompute"))
    return [eager_cost(loss, *logits), *ours, floor]


def lines(name: str, shape: tuple[int, int], dtype: torch.dtype, found: list[Cost]) -> list[list[str]]:
    elements = shape[0] * shape[1]
    floor = found[-1].bytes
    eager = found[0].bytes
    return [
        [
            f"{name} {shape[0]} x {shape[1]} {str(dtype).removeprefix('torch.')}",
            cost.contender,
            f"{cost.bytes / elements:.2f}",
            f"{cost.bytes / floor:.3f}",
            show(eager / cost.bytes),
            show(cost.bytes / elements * ELEMENTS / COPY_RATE * 1e3),
            "-" if cost.launches is None else str(cost.launches),
            "-" if cost.instructions is None else f"{cost.instructions / elements:.1f}",
        ]
        for cost in found
    ]


HEADER = ["case", "contender", "bytes/el", "x floor", "eager/it", f"ms for 2^{ELEMENTS.bit_length() - 1} at 3.0 TB/s"]
HEADER += ["kernels", "instr/el"]


def parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or int(match[1]) < 1 or int(match[2]) < 9:
        raise argparse.ArgumentTypeError(f"expected samples x classes (9 or more), as 8x4096, got {text!r}")
    return int(match[1]), int(match[2])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=["kd", "dkd", "gdkd", "bdd"])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxC", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--backend", choices=["cuda", "triton"], default="cuda", help="whose kernels (%(default)s)")
    parser.add_argument("--arch", type=int, choices=[80, 90], default=90, help="compute capability (%(default)s)")
    options = parser.parse_args(arguments)
    os.environ["KDKERNELS_TRITON_CPU"] = "1"
    print("A model from counted bytes, not a measurement; see --help.\n")
    for dtype in options.dtypes:
        for name in options.losses:
            rows = []
            for shape in options.shapes:
                found = costs(LOSSES[name], shape, DTYPES[dtype], options.backend, options.arch)
                rows += lines(name, shape, DTYPES[dtype], found)
            print(table(HEADER, rows), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
