"""Standardisation of samples that do not fit on chip: moments before the statistics, slope and level after them."""

import triton
import triton.language as tl
from kdkernels.triton_kernels.layout import load_tile, locate
from kdkernels.triton_kernels.objective import CORRECTION, EPS, SAVED_HEADER, number
from kdkernels.triton_kernels.samples import read_samples
from kdkernels.triton_kernels.saved import load_columns, store_columns
from kdkernels.triton_kernels.standardize import chain_sums, sample_moments, standardization_of_sample
from kdkernels.triton_kernels.sweep import read_kept, standardized_tile, term_gradients

MOMENTS = tl.constexpr(3)  # count, mean and sum of squared deviations
_SLOPE = tl.constexpr(SAVED_HEADER.value + 3)


@triton.jit(do_not_specialize=["ignore_index", "class_count"])
def sample_moments_kernel(
    student,
    teacher,
    target,
    weight,
    moments,
    sizes,
    student_strides,
    teacher_strides,
    class_count,
    ignore_index: tl.int64,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    dtype: tl.constexpr,
):
    """Moments of one part of a block of samples: the student's, then the teacher's."""
    parts = tl.cdiv(class_count, BLOCK_C)
    part = tl.program_id(0) % parts
    outer, within, samples, there = locate(tl.program_id(0) // parts, sizes, BLOCK_N)
    classes = part * BLOCK_C + tl.arange(0, BLOCK_C)
    _, _, valid = read_samples(target, weight, samples, there, class_count, ignore_index, dtype)
    at = (outer, within, classes, class_count, valid, there, sizes)
    of_student = sample_moments((load_tile(student, at, student_strides, AXIS, WIDE).to(dtype),))
    of_teacher = sample_moments((load_tile(teacher, at, teacher_strides, AXIS, WIDE).to(dtype),))
    store_columns(moments, of_student + of_teacher, samples * parts + part, there, 2 * MOMENTS, 0)


@triton.jit(do_not_specialize=["count", "parts"])
def settle_moments_kernel(
    moments,
    saved,
    count,
    parts,
    numbers,
    low,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merges the parts' moments and keeps what standardises the samples; slope and level are still for sums of 1."""
    dtype: tl.constexpr = saved.dtype.element_ty
    samples = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = samples < count
    part = tl.arange(0, PARTS)
    row = samples[:, None] * parts + part[None, :]
    mask = there[:, None] & (part < parts)[None, :]
    kept = ()
    for side in tl.static_range(2):
        counts = tl.load(moments + row * 2 * MOMENTS + MOMENTS * side, mask=mask, other=0.0)
        means = tl.load(moments + row * 2 * MOMENTS + MOMENTS * side + 1, mask=mask, other=0.0)
        m2s = tl.load(moments + row * 2 * MOMENTS + MOMENTS * side + 2, mask=mask, other=0.0)
        number_of = tl.sum(counts, 1)
        mean = tl.sum(counts * means, 1) / tl.maximum(number_of, 1.0)
        away = tl.where(counts == 0, 0.0, means - mean[:, None])
        m2 = tl.sum(m2s + counts * away * away, 1)
        correction, eps = number(numbers, low, CORRECTION), number(numbers, low, EPS)
        numbers_of = standardization_of_sample((number_of, mean, m2), correction, eps, dtype)
        if side == 0:
            kept = numbers_of
        else:
            kept = kept + (numbers_of[0], numbers_of[1], numbers_of[2])
    store_columns(saved, kept, samples, there, COLUMNS[1], SAVED_HEADER)


@triton.jit(do_not_specialize=["class_count"])
def products_kernel(
    student,
    teacher,
    target,
    saved,
    members,
    products,
    sizes,
    student_strides,
    teacher_strides,
    class_count,
    numbers,
    low,
    TERMS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of the terms' gradient, and of it times the standardised logits, over one part of a block of samples."""
    dtype: tl.constexpr = saved.dtype.element_ty
    parts = tl.cdiv(class_count, BLOCK_C)
    part = tl.program_id(0) % parts
    outer, within, samples, there = locate(tl.program_id(0) // parts, sizes, BLOCK_N)
    classes = part * BLOCK_C + tl.arange(0, BLOCK_C)
    targets, weights, valid = read_kept(target, None, saved, samples, there, COLUMNS, False)
    at = (outer, within, classes, class_count, valid, there, sizes)
    s = load_tile(student, at, student_strides, AXIS, WIDE).to(dtype)
    t = load_tile(teacher, at, teacher_strides, AXIS, WIDE).to(dtype)
    s = standardized_tile(s, 0, at, samples, saved, saved, COLUMNS, STANDARDIZE)
    t = standardized_tile(t, 1, at, samples, saved, saved, COLUMNS, STANDARDIZE)
    one = tl.zeros_like(weights) + 1.0
    gradient = term_gradients(s, t, at, samples, targets, one, saved, members, numbers, low, TERMS, COLUMNS)
    store_columns(products, chain_sums((gradient,), (s,)), samples * parts + part, there, 2, 0)


@triton.jit(do_not_specialize=["count", "parts"])
def slope_kernel(products, saved, count, parts, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Settles slope and level of the chain rule from the parts' sums."""
    samples = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = samples < count
    part = tl.arange(0, PARTS)
    mask = there[:, None] & (part < parts)[None, :]
    at = products + (samples[:, None] * parts + part[None, :]) * 2
    product = tl.sum(tl.load(at, mask=mask, other=0.0), 1)
    sum_ = tl.sum(tl.load(at + 1, mask=mask, other=0.0), 1)
    slope, level = load_columns(saved, samples, there, COLUMNS[1], _SLOPE, 2)
    store_columns(saved, (slope * product, level * sum_), samples, there, COLUMNS[1], _SLOPE)
