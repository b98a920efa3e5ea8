"""What is known of each sample besides its logits: its target, whether it counts, and its weight in the result."""

import triton
import triton.language as tl
from kdkernels.triton_kernels.layout import CLASSES, locate, multiple, offsets


@triton.jit
def read_samples(target, weight, samples, there, class_count, ignore_index, dtype: tl.constexpr):
    """``(target, weight, whether the sample counts)``; a target out of range makes the weight NaN."""
    weights = tl.full(there.shape, 1.0, dtype)
    if weight is not None:
        weights = tl.load(weight + samples, mask=there, other=0.0).to(dtype)
    targets = tl.full(there.shape, 0, tl.int64)
    if target is not None:
        targets = tl.load(target + samples, mask=there, other=0)
        weights = tl.where(targets == ignore_index, 0.0, weights)
        wrong = (targets < 0) | (targets >= class_count)
        weights = tl.where(wrong & (weights != 0), float("nan"), weights)
        targets = tl.where(wrong, 0, targets)
    return targets.to(tl.int32), weights, there & (weights != 0)


@triton.jit
def read_factor(scale, divisor):
    """What the weighted sum of the losses is multiplied by, in float64; 0 where there is nothing to divide by."""
    scale = tl.full((), scale, tl.float64)
    if divisor is None:
        return scale
    else:
        by = tl.load(divisor).to(tl.float64)
        return tl.where(by == 0, 0.0, scale / tl.where(by == 0, 1.0, by))


@triton.jit
def write_results(values, column, out, block, samples, there, COLUMNS: tl.constexpr, EACH: tl.constexpr):
    """Writes a number of each sample or, to be added up later, the sum over the block's."""
    if EACH:
        tl.store(out + samples * COLUMNS + column, values, mask=there)
    else:
        tl.store(out + block.to(tl.int64) * COLUMNS + column, tl.sum(values.to(tl.float64), 0))


@triton.jit(do_not_specialize=["count", "ignore_index"])
def weight_sum_kernel(target, weight, out, count, ignore_index: tl.int64, BLOCK: tl.constexpr):
    """The sum of the weights of the samples that count, of one stretch of samples a program."""
    program = tl.program_id(0)
    samples = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weights = (samples < count).to(tl.float64)
    if weight is not None:
        weights = tl.load(weight + samples, mask=samples < count, other=0.0).to(tl.float64)
    if target is not None:
        targets = tl.load(target + samples, mask=samples < count, other=0)
        weights = tl.where(targets == ignore_index, 0.0, weights)
    tl.store(out + program, tl.sum(weights, 0))


@triton.jit(do_not_specialize=["rows", "columns"])
def sum_rows_kernel(values, out, rows, columns, BLOCK: tl.constexpr):
    """The sum of one column of ``values`` a program, in float64 and always in the same order."""
    column = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        sums += tl.load(values + row.to(tl.int64) * columns + column, mask=row < rows, other=0.0)
    tl.store(out + column, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["class_count"])
def scale_kernel(
    gradient,
    factor,
    sizes,
    strides,
    class_count,
    EACH: tl.constexpr,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Multiplies one tile of a gradient in place; a factor of 1 for all touches no memory.

    What is 0 stays 0 even if the factor is infinite or NaN: samples that do not count and padding have no gradient.
    """
    dtype: tl.constexpr = tl.float64 if gradient.dtype.element_ty == tl.float64 else tl.float32
    if not EACH and tl.load(factor) == 1:
        return
    tiles = tl.cdiv(class_count, BLOCK_C)
    outer, within, samples, there = locate(tl.program_id(0) // tiles, sizes, BLOCK_N)
    classes = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    if EACH:
        by = tl.load(factor + samples, mask=there, other=0.0).to(dtype)
    else:
        by = tl.zeros([BLOCK_N], dtype) + tl.load(factor).to(dtype)
    at = gradient + offsets(outer, within, classes, sizes, strides, AXIS, WIDE)
    inside = classes < class_count
    if AXIS == CLASSES:
        inside = classes < multiple(class_count, WIDE)
    mask = there[:, None] & inside[None, :]
    values = tl.load(at, mask=mask, other=0.0).to(dtype)
    tl.store(at, tl.where(values == 0, values, values * by[:, None]), mask=mask)
