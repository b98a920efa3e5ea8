"""Calls that the compiled kernels of both GPU backends make, with the reason for each: rows of a table.

``only`` one backend makes a call whose shape is a border of its own tiles; ``more`` takes a backend minutes and runs by
``pytest -m cuda``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from losses import LOSSES, STANDARDIZED

ALL = LOSSES | STANDARDIZED
BACKENDS = ("cuda", "triton")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Call:
    """A loss on logits of a shape."""

    loss: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)
    mode: str = "fused"
    older: bool = False  # for sm_80
    only: str | None = None
    more: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = [self.loss, *self.shape, *(str(dtype).removeprefix("torch.") for dtype in self.dtypes), self.mode]
        return "-".join(map(str, [*given, *(["sm_80"] if self.older else [])]))


#: Every loss once, in several rows a block or program, and a last one with fewer.
LOSSES_OF_ROWS = [Call(name, (21, 100)) for name in ALL]
#: The gradient by a sweep of its own, from what forward kept, with a factor from above for each sample: one loss of
#: each kind of what is kept (a group, two terms, ranks by thirds, all at once, moments by class and by sample).
RECOMPUTED = [
    Call(name, (9, 100), mode="recompute", options={"reduction": "none"})
    for name in ("kd", "bdd_two_temperatures", "gdkd3", "everything", "pr_dkd", "ls_gdkd")
]
#: 96 classes: whole vectors of every type. Each half type with each kind of sweep, double precision with one and with
#: two terms, and sides that differ both ways.
DTYPES = [
    *(
        Call(name, (5, 96), (dtype, dtype), more=("cuda",))
        for name in ("dkd", "gdkd", "ls_dkd", "pr_kd")
        for dtype in (F16, BF16)
    ),
    *(Call(name, (5, 96), (F64, F64), more=("cuda",)) for name in ("dkd", "everything")),
    *(Call("dkd", (5, 96), dtypes, more=("cuda",)) for dtypes in ((F32, BF16), (BF16, F32))),
    Call("dkd", (5, 96), (F16, F64), only="cuda", more=("cuda",)),
    *(Call("pr_dkd", (5, 96), dtypes, only="cuda", more=("cuda",)) for dtypes in ((F32, BF16), (BF16, F64))),
]
ROW_LENGTHS = [
    Call("dkd", (1, 2)),  # the smallest two groups: one class each
    Call("gdkd", (70, 10)),  # many rows a block or program
    Call("gdkd", (2, 1024), only="cuda"),  # the longest rows that warps take
    Call("dkd", (3, 1025), only="cuda"),  # one class more, misaligned: a block a row
    Call("gdkd", (2, 4095), only="cuda"),  # every row with another head and tail
    Call("dkd", (2, 4096)),  # whole vectors; exactly a tile, in wide accesses
    Call("dkd", (2, 4095), only="triton"),  # and in narrow ones
    Call("dkd", (3, 257), only="triton"),  # one more than a power of two
    Call("gdkd", (2, 1000), only="triton"),  # fewer than the next power of two
    Call("gdkd3", (1, 8192), only="triton"),  # exponentials that do not fit on chip are computed twice
    Call("dkd", (1, 16383), only="triton"),  # likewise, in narrow accesses
    Call("gdkd", (1, 16384), only="triton"),  # the longest rows that fit on chip
    Call("dkd", (2, 9000), only="triton"),  # tiles beyond the last class
    Call("dkd", (2, 16385), only="triton"),  # one class more: split
    Call("gdkd", (1, 40000), only="triton"),  # split, with a selection
]
#: Channels first: what is next to one another in memory are samples.
PIXELS = [
    Call(name, shape, only=only, options={"reduction": "batchmean"})
    for name, shape, only in [
        ("everything", (2, 19, 8, 16), None),  # whole blocks of pixels, in wide accesses
        ("ls_dkd", (2, 19, 8, 16), None),
        ("dkd", (2, 21, 5, 7), None),  # parts of a block, in narrow ones
        ("gdkd3", (2, 21, 5, 7), None),
        ("pr_dkd", (2, 21, 5, 7), None),
        ("gdkd", (1, 1000, 5, 6), None),  # several warps share a pixel; more classes than fit on chip
        ("dkd", (1, 1000, 5, 6), "triton"),
    ]
]
#: A cross-section of all of this for sm_80.
OLDER = [
    Call(name, shape, (dtype, dtype), mode, older=True, more=("cuda",))
    for name, shape, dtype, mode in [
        ("dkd", (21, 100), BF16, "fused"),
        ("gdkd", (2, 4096), F16, "recompute"),
        ("everything", (5, 100), F64, "fused"),
        ("bdd", (9, 101), F32, "recompute"),
        ("dkd", (2, 19, 8, 16), BF16, "fused"),
        ("pr_dkd", (2, 21, 5, 7), F32, "fused"),
        ("ls_gdkd", (9, 100), F32, "fused"),
        ("gdkd3", (2, 17000), F32, "fused"),  # split, without clusters
        ("ls_dkd", (2, 17000), BF16, "fused"),
    ]
]
CALLS = [*LOSSES_OF_ROWS, *RECOMPUTED, *DTYPES, *ROW_LENGTHS, *PIXELS, *OLDER]


def made_by(gpu: str) -> list[Any]:
    """What a backend makes of CALLS, as a test's parameters ``gpu, call``."""
    marks = {"triton": [pytest.mark.triton]}.get(gpu, [])
    return [
        pytest.param(gpu, call, marks=[*marks, *([pytest.mark.cuda] if gpu in call.more else [])], id=f"{gpu}-{call}")
        for call in CALLS
        if call.only in (None, gpu)
    ]
