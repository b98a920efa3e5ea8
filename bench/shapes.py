"""Shapes of the benchmark's logits, and how they lie in memory."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """Two sizes are samples x classes, three batch x tokens x classes, four images x classes x height x width.

    Args:
        sizes: of the logits, contiguous in this order.
        padding: percent of the samples that are ignored: the last ones of every sequence (of the batch, if it is one).
        channels_last: images whose classes are side by side in memory.
    """

    sizes: tuple[int, ...]
    padding: int = 0
    channels_last: bool = False

    @property
    def class_dim(self) -> int:
        return 1 if len(self.sizes) in (2, 4) else 2

    @property
    def classes(self) -> int:
        return self.sizes[self.class_dim]

    @property
    def samples(self) -> int:
        return math.prod(self.sizes) // self.classes

    @property
    def sample_sizes(self) -> tuple[int, ...]:
        return self.sizes[: self.class_dim] + self.sizes[self.class_dim + 1 :]

    @property
    def name(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        return " x ".join(map(str, self.sizes)) + layout + (f", {self.padding} % padding" if self.padding else "")

    def lay_out(self, rows: Tensor) -> Tensor:
        """``(samples, classes)`` as logits of this shape."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        logits = rows.reshape(*self.sample_sizes, self.classes).movedim(-1, self.class_dim)
        return logits.contiguous(memory_format=memory_format)

    def rows(self, logits: Tensor) -> Tensor:
        """Logits as ``(samples, classes)``: a copy where the classes are not the last dimension, as scripts make it."""
        return logits.movedim(self.class_dim, -1).reshape(-1, self.classes)

    def pad(self, target: Tensor) -> Tensor:
        """``target`` of all samples, in the sample dimensions' shape, with the padding ignored."""
        target = target.reshape(self.sample_sizes).clone()
        length = target.shape[-1]
        target[..., length - length * self.padding // 100 :] = IGNORED
        return target

    def valid_rows(self, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a script hands to the papers' functions: flattened logits, without the padding if there is any."""
        student, teacher, target = self.rows(student), self.rows(teacher), target.reshape(-1)
        if self.padding:
            valid = (target != IGNORED).nonzero().squeeze(1)
            student, teacher, target = student[valid], teacher[valid], target[valid]
        return student, teacher, target


def parse_shape(text: str) -> Shape:
    """``256x1000``, ``2x19x512x1024``, ``2x19x512x1024:channels_last`` or ``4x512x32000@75`` (75 % padding)."""
    match = re.fullmatch(r"(\d+(?:x\d+){1,3})(:channels_last)?(?:@(\d+))?", text)
    shape = Shape(tuple(map(int, match[1].split("x"))), int(match[3] or 0), bool(match[2])) if match else None
    wrong = shape is None or min(shape.sizes) < 1 or shape.classes < 9 or not 0 <= shape.padding < 100
    if wrong or (shape.channels_last and len(shape.sizes) != 4):
        raise argparse.ArgumentTypeError(
            "expected samples x classes, batch x tokens x classes or images x classes x height x width with 9 classes "
            "or more, for images :channels_last if wanted, and @percent of padding if any, as 256x1000, "
            f"2x19x512x1024:channels_last or 4x512x32000@75, got {text!r}"
        )
    return shape
