"""Standardised logits, by class over the batch or by sample over its classes, and the moments they take.

Logits of -inf are no part of the moments and stay -inf: such a class is masked.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.stats import maxima, square_scale, total_pair, totals


@triton.jit
def standardize(logits, high, factor, offset):
    """(logit - mean) * factor, where the mean is ``high`` and what is left of it has gone into ``offset``.

    The multiply-add is explicit: keys of ranks must come out the same in every kernel.
    """
    return tl.fma(logits - high, tl.zeros_like(logits) + factor, tl.zeros_like(logits) + offset)


@triton.jit
def affine(mean, factor, dtype: tl.constexpr):
    """``(high, factor, offset)`` for :func:`standardize` from numbers in float64."""
    high = mean.to(dtype)
    return high, factor.to(dtype), ((high.to(tl.float64) - mean) * factor).to(dtype)


@triton.jit
def degrees(count, correction):
    return tl.maximum(count - correction, 1.0)


@triton.jit
def inverse_deviation(deviation):
    """Without deviation and eps it is next to 0, as the logit is 0, but not 0: a masked class stays at -inf."""
    return tl.where(deviation == 0, 1e-30, 1.0 / tl.where(deviation == 0, 1.0, deviation))


# By class -----------------------------------------------------------------------------------------------------------

# Rows of the table that :func:`affines_kernel` writes, a column a class: high, factor, offset of either side, and the
# chain rule's level and slope.
STUDENT, LEVEL, SLOPE, ROWS = (tl.constexpr(row) for row in (0, 6, 7, 8))
FACTOR = tl.constexpr(1)  # from the side's first row


@triton.jit(do_not_specialize=["class_count"])
def affines_kernel(moments, sums, affines, class_count, correction: tl.float64, eps: tl.float64, BLOCK: tl.constexpr):
    """What standardises each class and, with the ``sums`` of its gradient, what the chain rule takes off."""
    classes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = classes < class_count
    dtype: tl.constexpr = affines.dtype.element_ty
    for side in tl.static_range(2):
        of_side = moments + side * 3 * class_count.to(tl.int64)
        count = tl.load(of_side + classes, mask=inside, other=0.0)
        mean = tl.load(of_side + class_count + classes, mask=inside, other=0.0)
        m2 = tl.load(of_side + 2 * class_count + classes, mask=inside, other=0.0)
        factor = inverse_deviation(tl.sqrt(m2 / degrees(count, correction) + eps))
        numbers = affine(mean, factor, dtype)
        for i in tl.static_range(3):
            tl.store(affines + (STUDENT + 3 * side + i) * class_count.to(tl.int64) + classes, numbers[i], mask=inside)
        if side == 0 and sums is not None:
            level = tl.load(sums + classes, mask=inside, other=0.0) / tl.maximum(count, 1.0)
            slope = tl.load(sums + class_count + classes, mask=inside, other=0.0) / degrees(count, correction)
            tl.store(affines + LEVEL * class_count.to(tl.int64) + classes, level.to(dtype), mask=inside)
            tl.store(affines + SLOPE * class_count.to(tl.int64) + classes, slope.to(dtype), mask=inside)


@triton.jit
def read_row(affines, row: tl.constexpr, classes, class_count):
    """A row of the table, for the classes of a tile."""
    at = affines + row * class_count.to(tl.int64) + classes
    return tl.load(at, mask=classes < class_count, other=1.0)[None, :]


@triton.jit
def standardize_by_class(logits, affines, side: tl.constexpr, classes, class_count):
    """A tile of logits, standardised by the table's numbers for the student (0) or the teacher (1)."""
    first: tl.constexpr = STUDENT + 3 * side
    return standardize(
        logits,
        read_row(affines, first, classes, class_count),
        read_row(affines, first + 1, classes, class_count),
        read_row(affines, first + 2, classes, class_count),
    )


# By sample ----------------------------------------------------------------------------------------------------------


@triton.jit
def deviation_sums(logits, scale, centre):
    """Sums over each row of deviations from its centre and of their squares, without masked classes; and the count.

    ``logits``, in one or several tiles, are multiplied by ``scale`` first.
    """
    counts = ()
    sums = ()
    squares = ()
    for c in tl.static_range(len(logits)):
        masked = logits[c] == float("-inf")
        deviations = tl.where(masked, 0.0, tl.fma(logits[c], scale[:, None], -centre[:, None]))
        counts = counts + (tl.where(masked, 0.0, 1.0).to(deviations.dtype),)
        sums = sums + (deviations,)
        squares = squares + (deviations * deviations,)
    return totals(counts), totals(sums), totals(squares)


@triton.jit
def sample_moments(logits):
    """Count, mean and sum of squared deviations of each row, in float64; ``logits`` in one or several tiles."""
    sizes = ()
    for c in tl.static_range(len(logits)):
        sizes = sizes + (tl.where(logits[c] == float("-inf"), 0.0, tl.abs(logits[c])),)
    scale, unit = square_scale(maxima(sizes))
    count, sum_, _ = deviation_sums(logits, scale, tl.zeros_like(scale))
    some = tl.maximum(count, 1.0)
    centre = (sum_ / some).to(logits[0].dtype)
    # The second time from close to the mean, so that nothing cancels in the squares.
    _, sum_, square = deviation_sums(logits, scale, centre)
    mean, m2 = centre.to(tl.float64) + sum_ / some, tl.maximum(square - sum_ * sum_ / some, 0.0)
    unit = unit.to(tl.float64)
    return count, mean * unit, m2 * unit * unit


@triton.jit
def standardization_of_sample(moments, correction, eps, dtype: tl.constexpr):
    """``(high, factor, offset)`` of each row, and slope and level of the chain rule for sums of 1, from its moments."""
    count, mean, m2 = moments
    deviation = tl.sqrt(m2 / degrees(count, correction))
    factor = inverse_deviation(deviation + eps)
    constant = deviation == 0
    slope = tl.where(constant, 0.0, 1.0 / (tl.where(constant, 1.0, deviation) * factor * degrees(count, correction)))
    level = 1.0 / tl.maximum(count, 1.0)
    return affine(mean, factor, dtype) + (slope.to(dtype), level.to(dtype))


@triton.jit
def chain_sums(gradient, h):
    """``(sum of the gradient times h, sum of the gradient)`` of each row, of which all tiles are given.

    The terms do not change when all logits of a sample move together, so the second one is 0 but for rounding, which
    equal logits have in common.
    """
    product = tl.zeros_like(gradient[0])
    sum_ = tl.zeros_like(gradient[0])
    for c in tl.static_range(len(h)):
        counted = tl.where(h[c] == float("-inf"), 0.0, gradient[c])
        product += counted * tl.where(h[c] == float("-inf"), 0.0, h[c])
        sum_ += counted
    return total_pair(product, sum_, len(h))
