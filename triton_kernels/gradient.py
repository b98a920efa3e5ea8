"""Step 3: coefficients and logits in, gradient out. One elementwise sweep."""

import triton
import triton.language as tl
from kdkernels.triton_kernels.layout import CLASSES, multiple, offsets
from kdkernels.triton_kernels.objective import by_rank, groups_of, has_single
from kdkernels.triton_kernels.stats import LOG2E, power_of_single, start


@triton.jit
def weigh(coefficients, weight):
    """The coefficients of each group times each sample's weight."""
    weighed = ()
    for g in tl.static_range(len(coefficients)):
        student, tilt, teacher = coefficients[g]
        weighed = weighed + ((student * weight, tilt * weight, teacher * weight),)
    return weighed


@triton.jit
def gradient_of(exps, single, top, stats, coefficients, KIND: tl.constexpr, TILT: tl.constexpr):
    """The gradient of one term in the logits it sees, from a tile's exponentials (see :mod:`stats`).

    ``stats`` and ``coefficients`` have one entry a group; only the origins of ``stats`` are used.
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
    if TILT:
        gradient = tl.where(es > 0, es * (student + tilt * gap), es) - et * teacher
    else:
        gradient = es * student - et * teacher
    if has_single(KIND):
        of_single = (
            power_of_single(stats[0][0]) * coefficients[0][0] - power_of_single(stats[0][1]) * coefficients[0][2]
        )
        gradient = tl.where(single, of_single[:, None], gradient)
    return gradient


@triton.jit
def chain(gradient, h, level, slope, factor):
    """The chain rule through standardised logits h. Nothing flows to masked classes."""
    return tl.where(h == float("-inf"), 0.0, (gradient - level - h * slope) * factor)


@triton.jit
def softmax_gradient(logits, at_target, softmax, weight):
    """The gradient of the cross entropy; ``softmax``: origin and inverse sum of each row."""
    origin, inverse = softmax
    p = tl.exp2((logits - start(origin)[:, None]) * LOG2E) * (inverse * weight)[:, None]
    return p - tl.where(at_target, weight[:, None], 0.0)


@triton.jit
def store_gradient(gradient, values, at, strides, gradient_classes, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Writes a tile; 0 for samples that do not count and for classes that are not compared."""
    outer, within, classes, class_count, valid, there, sizes = at
    where = offsets(outer, within, classes, sizes, strides, AXIS, WIDE)
    values = tl.where(valid[:, None] & (classes < class_count)[None, :], values, 0.0)
    inside = classes < gradient_classes
    if AXIS == CLASSES:
        inside = classes < multiple(gradient_classes, WIDE)
    tl.store(gradient + where, values, mask=there[:, None] & inside[None, :])
