"""Step 3 alone: the gradient of any tile from what forward kept of its samples."""

import triton
import triton.language as tl
from kdkernels.triton_kernels.gradient import (
    chain,
    gradient_of,
    softmax_gradient,
    store_gradient,
    weigh,
)
from kdkernels.triton_kernels.layout import load_tile, locate
from kdkernels.triton_kernels.objective import (
    BY_CLASS,
    BY_SAMPLE,
    CE_WEIGHT,
    EXPONENT,
    SAVED_HEADER,
    number,
)
from kdkernels.triton_kernels.partition import masks_of
from kdkernels.triton_kernels.saved import load_columns, load_members, load_term
from kdkernels.triton_kernels.standardize import (
    FACTOR,
    LEVEL,
    SLOPE,
    STUDENT,
    read_row,
    standardize,
    standardize_by_class,
)
from kdkernels.triton_kernels.stats import exponentials


@triton.jit
def upstream(grad_loss, samples, there, EACH: tl.constexpr, dtype: tl.constexpr):
    """The factor that comes from above: one for all, or one of each sample; 1 where there is none."""
    if grad_loss is None:
        return tl.full(there.shape, 1.0, dtype)
    elif EACH:
        return tl.load(grad_loss + samples, mask=there, other=0.0).to(dtype)
    else:
        return tl.zeros(there.shape, dtype) + tl.load(grad_loss).to(dtype)


@triton.jit
def standardized_tile(
    raw,
    side: tl.constexpr,
    at,
    samples,
    affines,
    saved,
    COLUMNS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
):
    """A tile of logits of the student (0) or teacher (1) as the terms see it."""
    outer, within, classes, class_count, valid, there, sizes = at
    if STANDARDIZE == BY_CLASS:
        return standardize_by_class(raw, affines, side, classes, class_count)
    elif STANDARDIZE == BY_SAMPLE:
        high, factor, offset = load_columns(saved, samples, there, COLUMNS[1], SAVED_HEADER + 5 * side, 3)
        return standardize(raw, high[:, None], factor[:, None], offset[:, None])
    else:
        return raw


@triton.jit
def term_gradients(
    s, t, at, samples, targets, weights, saved, members, numbers, low, TERMS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The gradient of a tile in the logits that the terms see, from what was kept."""
    outer, within, classes, class_count, valid, there, sizes = at
    result = s
    for i in tl.static_range(len(TERMS)):
        origins, coefficients = load_term(saved, samples, there, COLUMNS[1], TERMS[i][6], TERMS[i][0])
        found = load_members(members, samples, there, COLUMNS[2], TERMS[i][7], TERMS[i][0], t.dtype)
        single, top = masks_of(t, classes, class_count, targets, found, TERMS[i][0], TERMS[i][1])
        exponent = number(numbers, low, TERMS[i][5] + EXPONENT)
        of_rest = origins[len(origins) - 1]
        of_top = of_rest
        if len(origins) > 1:
            of_top = origins[len(origins) - 2]
        exps = exponentials(s, t, single, top, of_top, of_rest, exponent, TERMS[i][0])
        coefficients = weigh(coefficients, weights, valid)
        of_term = gradient_of(exps, single, top, origins, coefficients, TERMS[i][0], TERMS[i][4], True)
        if i == 0:
            result = of_term
        else:
            result += of_term
    return result


@triton.jit
def read_kept(target, grad_loss, saved, samples, there, COLUMNS: tl.constexpr, EACH: tl.constexpr):
    """``(targets, weights with the upstream factor, whether each sample counts)``."""
    (kept,) = load_columns(saved, samples, there, COLUMNS[1], 0, 1)
    targets = tl.full(there.shape, 0, tl.int32)
    if target is not None:
        targets = tl.load(target + samples, mask=there, other=0).to(tl.int32)
    return targets, kept * upstream(grad_loss, samples, there, EACH, kept.dtype), there & (kept != 0)


@triton.jit(do_not_specialize=["class_count", "gradient_classes"])
def gradient_kernel(
    grad_loss,
    student,
    teacher,
    gradient,
    target,
    affines,
    saved,
    members,
    sizes,
    student_strides,
    teacher_strides,
    gradient_strides,
    class_count,
    gradient_classes,
    numbers,
    low,
    TERMS: tl.constexpr,
    CE: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes one tile of the gradient a program."""
    dtype: tl.constexpr = saved.dtype.element_ty
    tiles = tl.cdiv(gradient_classes, BLOCK_C)
    outer, within, samples, there = locate(tl.program_id(0) // tiles, sizes, BLOCK_N)
    classes = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    targets, weights, valid = read_kept(target, grad_loss, saved, samples, there, COLUMNS, EACH)
    at = (outer, within, classes, class_count, valid, there, sizes)
    raw = load_tile(student, at, student_strides, AXIS, WIDE).to(dtype)
    t = load_tile(teacher, at, teacher_strides, AXIS, WIDE).to(dtype)
    s = standardized_tile(raw, 0, at, samples, affines, saved, COLUMNS, STANDARDIZE)
    t = standardized_tile(t, 1, at, samples, affines, saved, COLUMNS, STANDARDIZE)
    result = term_gradients(s, t, at, samples, targets, weights, saved, members, numbers, low, TERMS, COLUMNS)
    if STANDARDIZE == BY_CLASS:
        level = read_row(affines, LEVEL, classes, class_count)
        slope = read_row(affines, SLOPE, classes, class_count)
        result = chain(result, s, level, slope, read_row(affines, STUDENT + FACTOR, classes, class_count))
    if STANDARDIZE == BY_SAMPLE:
        factor, _, slope, level = load_columns(saved, samples, there, COLUMNS[1], SAVED_HEADER + FACTOR, 4)
        result = chain(result, s, (level * weights)[:, None], (slope * weights)[:, None], factor[:, None])
    if CE:
        origin, inverse = load_columns(saved, samples, there, COLUMNS[1], 1, 2)
        of_entropy = (number(numbers, low, CE_WEIGHT) * weights)[:, None]
        result += softmax_gradient(raw, (origin[:, None], inverse[:, None]), of_entropy)
        result -= tl.where(classes[None, :] == targets[:, None], of_entropy, 0.0)
    # Where nothing counts there may be 0 times an upstream gradient that is infinite or NaN.
    result = tl.where(valid[:, None] & (classes < class_count)[None, :], result, 0.0)
    store_gradient(gradient, result, at, gradient_strides, gradient_classes, AXIS, WIDE)
