"""Values in error messages: short, on one line, and telling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdkernels._describe import describe, short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (float("nan"), "nan"),
        ("triton", "'triton'"),
        (None, "None"),
        (np.float32(4), repr(np.float32(4))),
        ((1.0, "x"), "(1.0, 'x')"),
        (torch.zeros(2, 3, dtype=torch.int16), "a int16 tensor of shape (2, 3) on cpu"),
        (torch.tensor(4.0), "a float32 tensor of shape () on cpu"),
        (np.zeros((1000, 7), np.int8), "a int8 array of shape (1000, 7)"),
        ([torch.zeros(3), np.zeros(4)], "[a float32 tensor of shape (3,) on cpu, a float64 array of shape (4,)]"),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, ...]"),
    ],
)
def test_short(value: object, text: str) -> None:
    assert short(value) == text


class Raises:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        10**4000,
        {f"key{i}" * 50: "value" * 50 for i in range(1000)},
        [["x" * 1000] * 1000] * 1000,
        torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(50)]),
        Raises(),
    ],
    ids=["string", "integer", "dict", "lists", "module", "no repr"],
)
def test_one_short_line(value: object) -> None:
    for text in (short(value), describe(value).removesuffix(f" ({type(value).__name__})")):
        assert 0 < len(text) <= 120
        assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("4", "'4' (str)"),
        ([1, 2], "[1, 2] (list)"),
        (np.zeros(200), "a float64 array of shape (200,)"),
        (torch.zeros(200), "a float32 tensor of shape (200,) on cpu"),
        ("a string", "'a string' (str)"),
    ],
)
def test_the_type_is_named(value: object, text: str) -> None:
    assert describe(value) == text
