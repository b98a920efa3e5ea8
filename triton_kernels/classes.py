"""Standardisation by class: moments of each class over the samples, and the sums that its gradient needs.

A program takes a block of classes and a stretch of the samples. Its threads meet only at the end: until then each place
of a tile adds up its own samples. The stretches' results are added up by one more launch.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.layout import CLASSES, SAMPLES, load_tile, locate, multiple, offsets, reveal
from kdkernels.triton_kernels.samples import read_samples
from kdkernels.triton_kernels.stats import square_scale
from kdkernels.triton_kernels.sweep import read_kept, standardized_tile, term_gradients


@triton.jit
def tile_moments(tiles):
    """Count, mean and sum of squared deviations over the tiles, at each place of them, without masked logits."""
    zero = tl.zeros_like(tiles[0])
    largest = zero
    for c in tl.static_range(len(tiles)):
        largest = tl.maximum(largest, tl.where(tiles[c] != float("-inf"), tl.abs(tiles[c]), 0.0))
    scale, unit = square_scale(largest)
    count = zero
    sum_ = zero
    for c in tl.static_range(len(tiles)):
        counted = tiles[c] != float("-inf")
        count += tl.where(counted, 1.0, 0.0).to(zero.dtype)
        sum_ += tl.where(counted, tiles[c] * scale, 0.0)
    some = tl.maximum(count, 1.0)
    centre = sum_ / some
    # From close to the mean, so that nothing cancels in the squares.
    sum_ = zero
    square = zero
    for c in tl.static_range(len(tiles)):
        deviation = tl.where(tiles[c] != float("-inf"), tl.fma(tiles[c], scale, -centre), 0.0)
        sum_ += deviation
        square = tl.fma(deviation, deviation, square)
    rest = sum_ / some
    square = tl.maximum(square - sum_ * rest, 0.0)
    unit = unit.to(tl.float64)
    return count, (centre.to(tl.float64) + rest.to(tl.float64)) * unit, square.to(tl.float64) * unit * unit


@triton.jit
def merge_moments(a, b):
    """Moments of two sets of samples together; the counts, in the logits' arithmetic, are of one program at most."""
    count = a[0] + b[0]
    share = (b[0] / tl.maximum(count, 1.0)).to(tl.float64)
    difference = tl.where(b[0] == 0, 0.0, b[1] - a[1])
    return count, a[1] + difference * share, a[2] + b[2] + difference * difference * (a[0].to(tl.float64) * share)


@triton.jit
def merge_moments_along(moments):
    """Moments of each column together, in float64."""
    count = moments[0].to(tl.float64)
    count_of_all = tl.sum(count, 0)
    mean = tl.sum(count * moments[1], 0) / tl.maximum(count_of_all, 1.0)
    away = tl.where(count == 0, 0.0, moments[1] - mean[None, :])
    return count_of_all, mean, tl.sum(moments[2] + count * away * away, 0)


@triton.jit
def store_moments(moments, row, classes, class_count, values):
    """Writes the moments of one side."""
    for i in tl.static_range(3):
        at = moments + (row * 3 + i) * class_count.to(tl.int64) + classes
        tl.store(at, values[i], mask=classes < class_count)


@triton.jit
def stretch_moments(
    matrix,
    target,
    weight,
    begin,
    end,
    classes,
    sizes,
    strides,
    class_count,
    ignore_index,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    dtype: tl.constexpr,
):
    """Moments of a block of classes over the samples of some blocks, each of ``TILES`` tiles."""
    zero = tl.zeros([BLOCK_N, classes.shape[0]], tl.float64)
    moments = (zero.to(dtype), zero, zero)
    inside = classes < class_count
    if AXIS == CLASSES:
        inside = classes < multiple(class_count, WIDE)
    for block in range(begin, end):
        outer, within, samples, _ = locate(block, sizes, BLOCK_N, TILES)
        first = matrix + offsets(outer, within, classes, sizes, strides, AXIS, WIDE)
        tiles = ()
        for c in tl.static_range(TILES):
            there = within + c * BLOCK_N < reveal(sizes[0])
            _, _, valid = read_samples(target, weight, samples + c * BLOCK_N, there, class_count, ignore_index, dtype)
            at = first + c * BLOCK_N
            if AXIS != SAMPLES:
                at = first + (c * BLOCK_N * WIDE) * reveal(strides[1]).to(tl.int64)
            tile = tl.load(at, mask=valid[:, None] & inside[None, :], other=float("-inf"))
            tiles = tiles + (tile.to(dtype),)
        moments = merge_moments(moments, tile_moments(tiles))
    return merge_moments_along(moments)


@triton.jit(do_not_specialize=["ignore_index", "class_count", "blocks", "stretch"])
def class_moments_kernel(
    student,
    teacher,
    target,
    weight,
    moments,
    sizes,
    student_strides,
    teacher_strides,
    class_count,
    blocks,
    stretch,
    ignore_index: tl.int64,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
    dtype: tl.constexpr,
):
    """Moments of a block of classes of the student or the teacher over one stretch of the samples."""
    tiles = tl.cdiv(class_count, BLOCK_C)
    classes = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0) // tiles  # a side of a stretch
    begin = row // 2 * stretch
    end = tl.minimum(begin + stretch, blocks)
    if row % 2 == 0:
        of_side = stretch_moments(
            student,
            target,
            weight,
            begin,
            end,
            classes,
            sizes,
            student_strides,
            class_count,
            ignore_index,
            AXIS,
            WIDE,
            BLOCK_N,
            TILES,
            dtype,
        )
    else:
        of_side = stretch_moments(
            teacher,
            target,
            weight,
            begin,
            end,
            classes,
            sizes,
            teacher_strides,
            class_count,
            ignore_index,
            AXIS,
            WIDE,
            BLOCK_N,
            TILES,
            dtype,
        )
    store_moments(moments, row.to(tl.int64), classes, class_count, of_side)


@triton.jit(do_not_specialize=["stretches", "class_count"])
def merge_class_moments_kernel(partial, moments, stretches, class_count, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Merges the moments of all stretches, those of one side and some classes a program."""
    tiles = tl.cdiv(class_count, BLOCK_C)
    classes = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    side = (tl.program_id(0) // tiles).to(tl.int64)
    stretch = tl.arange(0, BLOCK_R)
    mask = (stretch < stretches)[:, None] & (classes < class_count)[None, :]
    at = partial + ((stretch * 2 + side) * 3 * class_count)[:, None] + classes[None, :]
    count = tl.load(at, mask=mask, other=0.0)
    mean = tl.load(at + class_count, mask=mask, other=0.0)
    m2 = tl.load(at + 2 * class_count.to(tl.int64), mask=mask, other=0.0)
    store_moments(moments, side, classes, class_count, merge_moments_along((count, mean, m2)))


@triton.jit(do_not_specialize=["class_count", "blocks", "stretch"])
def class_sums_kernel(
    grad_loss,
    student,
    teacher,
    target,
    affines,
    saved,
    members,
    sums,
    sizes,
    student_strides,
    teacher_strides,
    class_count,
    blocks,
    stretch,
    numbers,
    low,
    TERMS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over one stretch of the samples of the gradient in standardised logits and of its product with them."""
    dtype: tl.constexpr = saved.dtype.element_ty
    tiles = tl.cdiv(class_count, BLOCK_C)
    classes = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(0) // tiles * stretch
    # A stretch is short enough for sums in the arithmetic's type.
    sum_ = tl.zeros([BLOCK_N, BLOCK_C], dtype)
    product = tl.zeros([BLOCK_N, BLOCK_C], dtype)
    end = tl.minimum(begin + stretch, blocks)
    outer, within, samples, there = locate(begin, sizes, BLOCK_N)
    targets, weights, valid = read_kept(target, grad_loss, saved, samples, there, COLUMNS, EACH)
    for block in range(begin, end):
        at = (outer, within, classes, class_count, valid, there, sizes)
        s = load_tile(student, at, student_strides, AXIS, WIDE).to(dtype)
        t = load_tile(teacher, at, teacher_strides, AXIS, WIDE).to(dtype)
        # Which samples of the next block count is read ahead, lest its logits wait for it.
        next_outer, next_within, next_samples, next_there = locate(block + 1, sizes, BLOCK_N)
        next_there = next_there & (tl.full(there.shape, block + 1, tl.int32) < end)
        ahead = read_kept(target, grad_loss, saved, next_samples, next_there, COLUMNS, EACH)
        s = standardized_tile(s, 0, at, samples, affines, saved, COLUMNS, STANDARDIZE)
        t = standardized_tile(t, 1, at, samples, affines, saved, COLUMNS, STANDARDIZE)
        gradient = term_gradients(s, t, at, samples, targets, weights, saved, members, numbers, low, TERMS, COLUMNS)
        counts = valid[:, None] & (s != float("-inf"))  # nothing comes from masked classes
        sum_ += tl.where(counts, gradient, 0.0)
        product += tl.where(counts, gradient * s, 0.0)
        outer, within, samples, there = next_outer, next_within, next_samples, next_there
        targets, weights, valid = ahead
    row = (tl.program_id(0) // tiles).to(tl.int64) * 2
    inside = classes < class_count
    tl.store(sums + row * class_count + classes, tl.sum(sum_.to(tl.float64), 0), mask=inside)
    tl.store(sums + (row + 1) * class_count + classes, tl.sum(product.to(tl.float64), 0), mask=inside)


@triton.jit(do_not_specialize=["stretches", "width"])
def add_stretches_kernel(partial, out, stretches, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of the rows of ``partial``, a stretch each, always in the same order."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    for begin in range(0, stretches, BLOCK_R):
        stretch = begin + tl.arange(0, BLOCK_R)
        mask = (stretch < stretches)[:, None] & (columns < width)[None, :]
        sums += tl.load(partial + stretch.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
    tl.store(out + columns, tl.sum(sums, 0), mask=columns < width)
