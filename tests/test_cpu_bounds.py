"""The CPU kernels touch no memory beyond the logits: the next page is one that nobody may touch.

Lanes of a vector that are not there are masked; an access under one of them ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from helpers import instruction_sets, make_inputs, name_of, require
from torch import Tensor

import kdkernels

pytestmark = [pytest.mark.whole, pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs mprotect")]

#: Classes of a row, or pixels of a line: tails of all lengths, alone and after whole vectors, unrolled and not.
SIZES = [*range(2, 40), 63, 64, 65, 99, 100, 127, 128, 129, 200, 1000, 2047, 2049]
LOSSES = {
    "kd": lambda s, t, y: kdkernels.kd_loss(s, t, reduction="none"),
    "dkd_ce": lambda s, t, y: kdkernels.dkd_loss(s, t, y, ce_weight=1.0, reduction="none"),
    "gdkd": lambda s, t, y: kdkernels.gdkd_loss(s, t, min(5, s.shape[1] - 1), kl_type="both", reduction="none"),
    "pr_dkd": lambda s, t, y: kdkernels.dkd_loss(s, t, y, standardize="class"),
    "ls_kd": lambda s, t, y: kdkernels.kd_loss(s, t, standardize="sample", reduction="none"),
}


def at_the_end_of_memory(tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor that ends where memory ends."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return copy.view(tensor.shape).copy_(tensor)


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    require("cpu")
    kdkernels.set_cpu_instruction_set(request.param)
    yield request.param
    kdkernels.set_cpu_instruction_set("auto")


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("layout", ["rows", "pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", LOSSES)
def test_memory_ends_with_the_logits(name: str, dtype: torch.dtype, layout: str) -> None:
    for size in SIZES:
        shape = (2, size) if layout == "rows" else (1, min(size, 20), 1, size)
        student, teacher, target = make_inputs(shape, dtype)
        guarded = at_the_end_of_memory(student), at_the_end_of_memory(teacher)
        results = []
        for s, t in ((student, teacher), guarded):
            loss = LOSSES[name](s.requires_grad_(), t, target)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), s)))
        for got, want in zip(results[1], results[0], strict=True):
            assert torch.equal(got, want), size
