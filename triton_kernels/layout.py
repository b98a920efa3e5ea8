"""Where logits are: samples and classes of a tile, for any strides.

Where classes are next to one another, a thread moves as many at a time as alignment allows, up to 16 bytes. Where
samples are, it moves one: the threads of a warp take neighbours, which are whole sectors of memory, and each thread has
to know the numbers of one sample only.

Sample dimensions that all matrices walk alike are merged. A program takes a block of samples of the innermost one; the
others are unpacked from the block's number. ``sizes`` are those of the sample dimensions, innermost first; ``strides``
of a matrix are the class dimension's, then theirs, in units of ``WIDE``. Both are :func:`opaque`.
"""

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl

#: What is next to one another in memory: the classes of a sample, the samples of a class, or neither.
NEITHER, CLASSES, SAMPLES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WIDTH = 16  #: bytes that one thread can move at a time


class Layout(NamedTuple):
    """Shape and strides of a call, as the kernels take them; hashable."""

    samples: int
    #: How many samples the innermost dimension has.
    inner: int
    sizes: tuple[int, ...]
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    gradient: tuple[int, ...]
    classes: int
    gradient_classes: int
    #: CLASSES, SAMPLES or NEITHER.
    axis: int
    #: How many classes next to one another a thread may move at a time, as far as alignment allows; a power of two.
    wide: int
    #: Whether no matrix has more than 16 bits an element.
    narrow: bool


def opaque(*numbers: int) -> tuple[int, ...]:
    """Numbers in a code that kernels :func:`reveal`: odd and more than 1.

    Kernels are compiled anew for members of a tuple that are 1 or multiples of 16, whatever ``do_not_specialize`` says.
    """
    return tuple(2 * number + 3 for number in numbers)


@triton.jit
def reveal(code):
    """The number of an :func:`opaque` code."""
    return (code - 3) >> 1


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
    wide = 1
    if axis == CLASSES.value and aligned:
        steps = [step for stride in of_matrix for step in stride[1:]]
        wide = math.gcd(WIDTH // min(bytes_of), classes, shape[class_dim], *steps)
    codes = [opaque(stride[0], *(step // wide for step in stride[1:])) for stride in of_matrix]
    return Layout(samples, sizes[0], opaque(*sizes), *codes, classes, shape[class_dim], axis, wide, max(bytes_of) <= 2)


@triton.jit
def multiple(number, factor: tl.constexpr):
    """``number``, which the host knows to be a multiple of ``factor``, so that the compiler knows it too."""
    if factor == 1:
        return number
    else:
        return number // factor * factor


@triton.jit
def locate(block, sizes, BLOCK_N: tl.constexpr, TILES: tl.constexpr = 1):
    """Samples of a block: ``(outer index, indices in the inner dimension, numbers overall, whether they exist)``.

    Of a block of several tiles, one after the other, those of the first.
    """
    inner = reveal(sizes[0])
    blocks = tl.cdiv(inner, BLOCK_N * TILES)
    outer = block // blocks
    within = (block % blocks) * (BLOCK_N * TILES) + tl.arange(0, BLOCK_N)
    return outer, within, outer.to(tl.int64) * inner + within, within < inner


@triton.jit
def sample_offsets(outer, within, sizes, strides, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a block of samples."""
    base = tl.full((), 0, tl.int64)
    for d in tl.static_range(1, len(sizes)):
        index = outer
        if d < len(sizes) - 1:
            index = outer % reveal(sizes[d])
            outer = outer // reveal(sizes[d])
        base += index.to(tl.int64) * reveal(strides[d + 1]) * WIDE
    if AXIS == SAMPLES:
        return base + tl.multiple_of(within, 1).to(tl.int64)  # lest a thread take several
    else:
        return base + within.to(tl.int64) * reveal(strides[1]) * WIDE


@triton.jit
def class_offsets(classes, strides, AXIS: tl.constexpr):
    """Offsets of classes from their samples."""
    if AXIS == CLASSES:
        return classes
    else:
        return classes.to(tl.int64) * reveal(strides[0])


@triton.jit
def offsets(outer, within, classes, sizes, strides, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets ``[samples, classes]`` of the elements of a tile."""
    of_samples = sample_offsets(outer, within, sizes, strides, AXIS, WIDE)
    return of_samples[:, None] + class_offsets(classes, strides, AXIS)[None, :]


@triton.jit
def load_one(matrix, at, strides, classes_of, AXIS: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr):
    """One logit of each sample of a tile, of class ``classes_of``, as ``dtype``; -inf where none counts."""
    outer, within, _, class_count, valid, _, sizes = at
    where = sample_offsets(outer, within, sizes, strides, AXIS, WIDE) + class_offsets(classes_of, strides, AXIS)
    return tl.load(matrix + where, mask=valid & (classes_of < class_count), other=float("-inf")).to(dtype)


@triton.jit
def store_one(matrix, values, at, strides, classes_of, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Writes one number of each sample of a tile that counts, at class ``classes_of``."""
    outer, within, _, _, valid, _, sizes = at
    where = sample_offsets(outer, within, sizes, strides, AXIS, WIDE) + class_offsets(classes_of, strides, AXIS)
    tl.store(matrix + where, values, mask=valid)


@triton.jit
def load_tile(matrix, at, strides, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """A tile of logits, ``[samples, classes]``, as they are; -inf where there is none that counts.

    ``at``: ``(outer, within, classes, class_count, valid, there, sizes)``.
    """
    outer, within, classes, class_count, valid, there, sizes = at
    where = offsets(outer, within, classes, sizes, strides, AXIS, WIDE)
    inside = classes < class_count
    if AXIS == CLASSES:
        inside = classes < multiple(class_count, WIDE)
    return tl.load(matrix + where, mask=valid[:, None] & inside[None, :], other=float("-inf"))
