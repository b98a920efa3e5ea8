"""Where logits are: samples and classes of a tile, for any strides.

Sample dimensions that all matrices walk alike are merged. A program takes a block of samples of the innermost one; the
others are unpacked from the block's number. ``sizes`` are those of the sample dimensions, innermost first; ``strides``
of a matrix are the class dimension's, then theirs.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

#: What is next to one another in memory: the classes of a sample, the samples of a class, or neither.
NEITHER, CLASSES, SAMPLES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WIDTH = 16  #: bytes that one thread can move at a time


class Layout(NamedTuple):
    """Shape and strides of a call, as the kernels take them; hashable."""

    samples: int
    sizes: tuple[int, ...]
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    gradient: tuple[int, ...]
    classes: int
    gradient_classes: int
    #: CLASSES, SAMPLES or NEITHER.
    axis: int
    #: How many elements along the axis are sure to be aligned, at every sample and class: 1 or a full width.
    wide: int

    @property
    def run_time(self) -> tuple[tuple[int, ...] | int, ...]:
        """The arguments of the kernels that are not constants."""
        return self.sizes, self.student, self.teacher, self.gradient, self.classes, self.gradient_classes


@functools.lru_cache(maxsize=1024)
def find_layout(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    class_dim: int,
    classes: int,
    bytes_of: tuple[int, ...],
    aligned: bool,
) -> Layout:
    """The layout of logits of ``shape`` (the student's) from the ``strides`` of student, teacher and gradient.

    ``bytes_of`` are their elements' sizes; ``aligned``: whether all of them begin at a multiple of 16 bytes.
    """
    dims: list[tuple[int, list[int]]] = []
    samples = 1
    for dim, size in enumerate(shape):
        if dim == class_dim:
            continue
        samples *= size
        steps = [stride[dim] for stride in strides]
        if size == 1:
            continue
        if dims and all(last == size * step for last, step in zip(dims[-1][1], steps, strict=True)):
            dims[-1] = (dims[-1][0] * size, steps)
        else:
            dims.append((size, steps))
    dims = dims[::-1] or [(1, [0] * len(strides))]
    sizes = tuple(size for size, _ in dims)
    of_matrix = [
        (stride[class_dim] if shape[class_dim] > 1 else 1, *(steps[i] for _, steps in dims))
        for i, stride in enumerate(strides)
    ]
    axis = NEITHER.value
    if all(stride[0] == 1 for stride in of_matrix):
        axis = CLASSES.value
    elif all(stride[1] == 1 for stride in of_matrix):
        axis = SAMPLES.value
    wide = WIDTH // min(bytes_of)
    along = {CLASSES.value: 0, SAMPLES.value: 1}.get(axis)
    length = (classes, sizes[0])[along] if along is not None else 1
    multiples = [length] if along is not None else [1]
    if along == 0:
        multiples.append(shape[class_dim])
    if along is not None:
        multiples += [step for stride in of_matrix for i, step in enumerate(stride) if i != along]
    if not aligned or any(multiple % wide for multiple in multiples):
        wide = 1
    return Layout(samples, sizes, *of_matrix, classes, shape[class_dim], axis, wide)


@triton.jit
def multiple(number, factor: tl.constexpr):
    """``number``, which the host knows to be a multiple of ``factor``, so that the compiler knows it too."""
    if factor == 1:
        return number
    else:
        return number // factor * factor


@triton.jit
def locate(block, sizes, AXIS: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Samples of a block: ``(outer index, indices in the inner dimension, numbers overall, whether they exist)``."""
    inner = sizes[0]
    if AXIS == SAMPLES:
        inner = multiple(inner, WIDE)
    blocks = tl.cdiv(inner, BLOCK_N)
    outer = (block // blocks).to(tl.int64)
    within = (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return outer, within, outer * inner + within, within < inner


@triton.jit
def sample_offsets(outer, within, sizes, strides, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a block of samples."""
    base = tl.full((), 0, tl.int64)
    for d in tl.static_range(1, len(sizes)):
        base += (outer % sizes[d]) * multiple(strides[d + 1], WIDE)
        outer = outer // sizes[d]
    if AXIS == SAMPLES:
        return base + within.to(tl.int64)
    else:
        return base + within.to(tl.int64) * multiple(strides[1], WIDE)


@triton.jit
def offsets(outer, within, classes, sizes, strides, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets ``[samples, classes]`` of the elements of a tile."""
    of_samples = sample_offsets(outer, within, sizes, strides, AXIS, WIDE)
    if AXIS == CLASSES:
        return of_samples[:, None] + classes[None, :]
    else:
        return of_samples[:, None] + classes.to(tl.int64)[None, :] * multiple(strides[0], WIDE)


@triton.jit
def load_one(matrix, at, strides, classes_of, AXIS: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr):
    """One logit of each sample of a tile, of class ``classes_of``, as ``dtype``; -inf where none counts."""
    outer, within, _, class_count, valid, _, sizes = at
    of_samples = sample_offsets(outer, within, sizes, strides, AXIS, WIDE)
    mask = valid & (classes_of < class_count)
    where = of_samples + classes_of.to(tl.int64) * strides[0]
    return tl.load(matrix + where, mask=mask, other=float("-inf")).to(dtype)


@triton.jit
def store_one(matrix, values, at, strides, classes_of, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Writes one number of each sample of a tile that counts, at class ``classes_of``."""
    outer, within, _, _, valid, _, sizes = at
    where = sample_offsets(outer, within, sizes, strides, AXIS, WIDE) + classes_of.to(tl.int64) * strides[0]
    tl.store(matrix + where, values, mask=valid)


@triton.jit
def load_tile(matrix, at, strides, AXIS: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr):
    """A tile of logits, ``[samples, classes]``, as ``dtype``; -inf where there is none that counts.

    ``at``: ``(outer, within, classes, class_count, valid, there, sizes)``.
    """
    outer, within, classes, class_count, valid, there, sizes = at
    where = offsets(outer, within, classes, sizes, strides, AXIS, WIDE)
    inside = classes < class_count
    if AXIS == CLASSES:
        inside = classes < multiple(class_count, WIDE)
    if AXIS == SAMPLES:
        # A mask of single samples would break wide loads up: what does not count is dropped after loading.
        logits = tl.load(matrix + where, mask=there[:, None] & inside[None, :], other=float("-inf"))
        logits = tl.where(valid[:, None], logits, float("-inf"))
    else:
        logits = tl.load(matrix + where, mask=valid[:, None] & inside[None, :], other=float("-inf"))
    return logits.to(dtype)
