"""Step 3: coefficients and logits in, gradient out. One elementwise sweep."""

import triton
import triton.language as tl
from kdkernels.triton_kernels.layout import CLASSES, multiple, offsets
from kdkernels.triton_kernels.objective import by_rank, groups_of, has_single
from kdkernels.triton_kernels.stats import LOG2E, power_of_single, start


@triton.jit
def weigh(coefficients, weight, valid):
    """The coefficients of each group times each sample's weight; 0 for samples that do not count."""
    weighed = ()
    for g in tl.static_range(len(coefficients)):
        student, tilt, teacher = coefficients[g]
        student = tl.where(valid, student * weight, 0.0)
        weighed = weighed + ((student, tl.where(valid, tilt * weight, 0.0), tl.where(valid, teacher * weight, 0.0)),)
    return weighed


@triton.jit
def gradient_of_single(stats, coefficients):
    """That at the single class of each sample, from the statistics and coefficients of the groups."""
    student, _, teacher = coefficients[0]
    return power_of_single(stats[0][0]) * student - power_of_single(stats[0][1]) * teacher


@triton.jit
def gradient_of(
    exps, single, top, stats, coefficients, KIND: tl.constexpr, TILT: tl.constexpr, WITH_SINGLE: tl.constexpr
):
    """The gradient of one term in the logits it sees, from a tile's exponentials.

    Of the statistics, the origins are enough. Without ``WITH_SINGLE`` the single class gets 0.
    """
    es, et, gap = exps
    GROUPS: tl.constexpr = groups_of(KIND)
    student, tilt, teacher = coefficients[GROUPS - 1]
    student, tilt, teacher = student[:, None], tilt[:, None], teacher[:, None]
    if by_rank(KIND):
        of_top = coefficients[GROUPS - 2]
        student = tl.where(top, of_top[0][:, None], student)
        tilt = tl.where(top, of_top[1][:, None], tilt)
        teacher = tl.where(top, of_top[2][:, None], teacher)
    result = et * -teacher
    if TILT:
        # The gap is infinite at a class that only the teacher masks: a group without reverse weight leaves it out.
        tilted = tl.where(tilt == 0, student, tl.fma(gap, tilt, student))
        result += tl.where(es > 0, es * tilted, es)
    else:
        result = tl.fma(es, student, result)
    if has_single(KIND) and WITH_SINGLE:
        result = tl.where(single, gradient_of_single(stats, coefficients)[:, None], result)
    return result


@triton.jit
def chain(gradient, h, level, slope, factor):
    """The chain rule through standardised logits h. Nothing flows to masked classes."""
    return tl.where(h == float("-inf"), 0.0, (gradient - level - h * slope) * factor)


@triton.jit
def softmax_gradient(logits, softmax, weight):
    """The gradient of the cross entropy but for its target; ``softmax``: origin and inverse sum."""
    origin, inverse = softmax
    return tl.exp2((logits - start(origin)) * LOG2E) * tl.where(weight != 0, inverse * weight, 0.0)


@triton.jit
def store_gradient(gradient, values, at, strides, gradient_classes, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Writes a tile, in which samples that do not count and classes that are not compared have 0 already."""
    outer, within, classes, _, _, there, sizes = at
    where = offsets(outer, within, classes, sizes, strides, AXIS, WIDE)
    inside = classes < gradient_classes
    if AXIS == CLASSES:
        inside = classes < multiple(gradient_classes, WIDE)
    tl.store(gradient + where, values, mask=there[:, None] & inside[None, :])
