"""Standardisation by class: moments of each class over the samples, and the sums that its gradient needs.

A program takes a block of classes and a stretch of the blocks of samples; stretches are added up in order.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.layout import load_tile, locate
from kdkernels.triton_kernels.samples import read_samples
from kdkernels.triton_kernels.sweep import read_kept, standardized_tile, term_gradients


@triton.jit
def tile_moments(logits, valid):
    """Count, mean and sum of squared deviations of each class of a tile, in float64, without masked logits."""
    counted = valid[:, None] & (logits != float("-inf"))
    count = tl.sum(counted.to(tl.int32), 0).to(tl.float64)
    some = tl.maximum(count, 1.0)
    centre = (tl.sum(tl.where(counted, logits, 0.0), 0).to(tl.float64) / some).to(logits.dtype)
    # From close to the mean, so that nothing cancels in the squares.
    deviations = tl.where(counted, logits - centre[None, :], 0.0)
    sum_ = tl.sum(deviations, 0).to(tl.float64)
    square = tl.sum(deviations * deviations, 0).to(tl.float64)
    return count, centre.to(tl.float64) + sum_ / some, tl.maximum(square - sum_ * sum_ / some, 0.0)


@triton.jit
def merge_moments(a, b):
    """Moments of two sets of samples together."""
    count = a[0] + b[0]
    share = b[0] / tl.maximum(count, 1.0)
    difference = tl.where(b[0] == 0, 0.0, b[1] - a[1])
    return count, a[1] + difference * share, a[2] + b[2] + difference * difference * a[0] * share


@triton.jit
def store_moments(moments, row, classes, class_count, values):
    """Writes the moments of one side."""
    for i in tl.static_range(3):
        at = moments + (row * 3 + i) * class_count.to(tl.int64) + classes
        tl.store(at, values[i], mask=classes < class_count)


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
    dtype: tl.constexpr,
):
    """Moments of a block of classes over one stretch of the samples: of the student, then of the teacher."""
    tiles = tl.cdiv(class_count, BLOCK_C)
    classes = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(0) // tiles * stretch
    zero = tl.zeros([BLOCK_C], tl.float64)
    of_student = (zero, zero, zero)
    of_teacher = (zero, zero, zero)
    for block in range(begin, tl.minimum(begin + stretch, blocks)):
        outer, within, samples, there = locate(block, sizes, BLOCK_N)
        _, _, valid = read_samples(target, weight, samples, there, class_count, ignore_index, dtype)
        at = (outer, within, classes, class_count, valid, there, sizes)
        s = load_tile(student, at, student_strides, AXIS, WIDE).to(dtype)
        t = load_tile(teacher, at, teacher_strides, AXIS, WIDE).to(dtype)
        of_student = merge_moments(of_student, tile_moments(s, valid))
        of_teacher = merge_moments(of_teacher, tile_moments(t, valid))
    row = (tl.program_id(0) // tiles).to(tl.int64) * 2
    store_moments(moments, row, classes, class_count, of_student)
    store_moments(moments, row + 1, classes, class_count, of_teacher)


@triton.jit(do_not_specialize=["stretches", "class_count"])
def merge_class_moments_kernel(partial, moments, stretches, class_count, BLOCK: tl.constexpr):
    """Merges the stretches' moments, those of one side a program."""
    tiles = tl.cdiv(class_count, BLOCK)
    classes = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    side = (tl.program_id(0) // tiles).to(tl.int64)
    zero = tl.zeros([BLOCK], tl.float64)
    merged = (zero, zero, zero)
    for stretch in range(stretches):
        at = partial + (stretch * 2 + side) * 3 * class_count + classes
        count = tl.load(at, mask=classes < class_count, other=0.0)
        mean = tl.load(at + class_count, mask=classes < class_count, other=0.0)
        m2 = tl.load(at + 2 * class_count.to(tl.int64), mask=classes < class_count, other=0.0)
        merged = merge_moments(merged, (count, mean, m2))
    store_moments(moments, side, classes, class_count, merged)


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
    sum_ = tl.zeros([BLOCK_C], tl.float64)
    product = tl.zeros([BLOCK_C], tl.float64)
    for block in range(begin, tl.minimum(begin + stretch, blocks)):
        outer, within, samples, there = locate(block, sizes, BLOCK_N)
        targets, weights, valid = read_kept(target, grad_loss, saved, samples, there, COLUMNS, EACH)
        at = (outer, within, classes, class_count, valid, there, sizes)
        s = load_tile(student, at, student_strides, AXIS, WIDE).to(dtype)
        t = load_tile(teacher, at, teacher_strides, AXIS, WIDE).to(dtype)
        s = standardized_tile(s, 0, at, samples, affines, saved, COLUMNS, STANDARDIZE)
        t = standardized_tile(t, 1, at, samples, affines, saved, COLUMNS, STANDARDIZE)
        gradient = term_gradients(s, t, at, samples, targets, weights, saved, members, numbers, low, TERMS, COLUMNS)
        counts = valid[:, None] & (s != float("-inf"))  # nothing comes from masked classes
        sum_ += tl.sum(tl.where(counts, gradient, 0.0), 0).to(tl.float64)
        product += tl.sum(tl.where(counts, gradient * s, 0.0), 0).to(tl.float64)
    row = (tl.program_id(0) // tiles).to(tl.int64) * 2
    inside = classes < class_count
    tl.store(sums + row * class_count + classes, sum_, mask=inside)
    tl.store(sums + (row + 1) * class_count + classes, product, mask=inside)


@triton.jit(do_not_specialize=["stretches", "width"])
def add_stretches_kernel(partial, out, stretches, width, BLOCK: tl.constexpr):
    """The sum of the rows of ``partial``, a stretch each, in order."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum_ = tl.zeros([BLOCK], tl.float64)
    for stretch in range(stretches):
        sum_ += tl.load(partial + stretch * width.to(tl.int64) + columns, mask=columns < width, other=0.0)
    tl.store(out + columns, sum_, mask=columns < width)
