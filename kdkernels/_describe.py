"""Short descriptions of values for error messages: one line, whatever the value is and however large."""

from __future__ import annotations

import reprlib

from torch import Tensor

_LONGEST = 120


class _Short(reprlib.Repr):
    """``repr`` that shortens long lists, strings and numbers, and names arrays by dtype and shape, at any depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60

    def repr1(self, x: object, level: int) -> str:
        shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
        if isinstance(x, Tensor):
            return f"a {str(dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)} on {x.device}"
        if isinstance(shape, tuple) and dtype is not None and shape != ():  # of NumPy's scalars the shape is ()
            return f"a {dtype} array of shape {shape}"
        return super().repr1(x, level)


_shortener = _Short()


def short(value: object) -> str:
    """``value`` in at most 120 characters: its repr if that is short; tensors and arrays by dtype and shape."""
    text = " ".join(_shortener.repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def describe(value: object) -> str:
    """:func:`short`, and the type where the description does not say it: for errors about a value's type."""
    text = short(value)
    return text if isinstance(value, Tensor) or text.startswith("a ") else f"{text} ({type(value).__name__})"
