"""Steps 1 to 3 in one launch, for samples that fit on chip: logits are read once and the gradient is written once.

A program holds all classes of a block of samples. It serves rows (classes next to one another; several rows a program
when they are short) and pixels (samples next to one another) alike: the compiler lays a tile out as memory is.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.again import gradient_again, hold, statistics_again
from kdkernels.triton_kernels.evaluate import evaluate
from kdkernels.triton_kernels.gradient import (
    chain,
    gradient_of,
    gradient_of_single,
    softmax_gradient,
    store_gradient,
    weigh,
)
from kdkernels.triton_kernels.layout import SAMPLES, load_one, load_tile, locate, reveal, store_one
from kdkernels.triton_kernels.objective import (
    BY_CLASS,
    BY_SAMPLE,
    CE_WEIGHT,
    CORRECTION,
    EPS,
    EXPONENT,
    NOTHING,
    has_single,
    number,
    only_targets,
)
from kdkernels.triton_kernels.partition import group_sizes, partition
from kdkernels.triton_kernels.samples import read_factor, read_samples, write_results
from kdkernels.triton_kernels.saved import save_members, save_term, store_columns
from kdkernels.triton_kernels.standardize import (
    chain_sums,
    sample_moments,
    standardization_of_sample,
    standardize,
    standardize_by_class,
)
from kdkernels.triton_kernels.stats import (
    groups_with,
    only,
    softmax_statistics,
    start,
    statistics,
    statistics_of_single,
)


@triton.jit
def tile_gradient(s, kept, c: tl.constexpr, TERMS: tl.constexpr, POKE: tl.constexpr):
    """The gradient of tile ``c`` in the logits that the terms see; with ``POKE`` 0 at the targets."""
    result = s
    for i in tl.static_range(len(TERMS)):
        stats, coefficients, _, exps, single, top = kept[i]
        of_term = gradient_of(exps[c], single[c], top[c], stats, coefficients, TERMS[i][0], TERMS[i][4], not POKE)
        if i == 0:
            result = of_term
        else:
            result += of_term
    return result


@triton.jit
def finish_tile(
    gradient,
    result,
    logits,
    at,
    strides,
    gradient_classes,
    targets,
    softmax,
    of_entropy,
    CE: tl.constexpr,
    POKE: tl.constexpr,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds the gradient of the cross entropy and writes the tile."""
    if CE:
        result += softmax_gradient(logits, (softmax[0][:, None], softmax[1][:, None]), of_entropy[:, None])
        if not POKE:
            result -= tl.where(at[2][None, :] == targets[:, None], of_entropy[:, None], 0.0)
    store_gradient(gradient, result, at, strides, gradient_classes, AXIS, WIDE)


@triton.jit(do_not_specialize=["class_count", "gradient_classes", "ignore_index"])
def fused_kernel(
    student,
    teacher,
    gradient,
    target,
    weight,
    divisor,
    affines,
    losses,
    parts,
    saved,
    members,
    sizes,
    student_strides,
    teacher_strides,
    gradient_strides,
    class_count,
    gradient_classes,
    ks,
    ignore_index: tl.int64,
    scale: tl.float64,
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
    TILES: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """One block of samples a program. Outputs that are None are not wanted.

    With ``AGAIN`` a program keeps nothing of the classes but their logits, and computes the exponentials twice.

    ``losses`` and ``parts`` get a number of each sample or a sum of each block, as ``EACH`` says.
    """
    dtype: tl.constexpr = tl.float64 if len(low) > 0 else tl.float32
    # Whether the targets' logits are read, and their gradients written, one by one: that spares two passes over a tile.
    # Where samples are next to one another, that would be a good part of all there is to move.
    POKE: tl.constexpr = only_targets(TERMS) and STANDARDIZE == 0 and AXIS != SAMPLES
    block = tl.program_id(0)
    outer, within, samples, there = locate(block, sizes, BLOCK_N)
    targets, weights, valid = read_samples(target, weight, samples, there, class_count, ignore_index, dtype)
    weights = tl.where(valid, weights * read_factor(scale, divisor).to(dtype), 0.0)
    classes = ()
    raw = ()
    t = ()
    loaded_s = ()
    loaded_t = ()
    for c in tl.static_range(TILES):
        of_tile = c * BLOCK_C + tl.arange(0, BLOCK_C)
        at = (outer, within, of_tile, class_count, valid, there, sizes)
        classes = classes + (of_tile,)
        of_s = load_tile(student, at, student_strides, AXIS, WIDE)
        of_t = load_tile(teacher, at, teacher_strides, AXIS, WIDE)
        raw = raw + (of_s.to(dtype),)
        t = t + (of_t.to(dtype),)
        loaded_s = loaded_s + (of_s,)
        loaded_t = loaded_t + (of_t,)
    at = (outer, within, classes[0], class_count, valid, there, sizes)
    s = raw
    held = (hold(loaded_s), hold(loaded_t)) if AGAIN else ()
    matrices = (student, teacher)
    of_student = ()
    of_teacher = ()
    if STANDARDIZE == BY_CLASS:
        s = ()
        of_t = ()
        for c in tl.static_range(TILES):
            s = s + (standardize_by_class(raw[c], affines, 0, classes[c], class_count),)
            of_t = of_t + (standardize_by_class(t[c], affines, 1, classes[c], class_count),)
        t = of_t
    if STANDARDIZE == BY_SAMPLE:
        correction, eps = number(numbers, low, CORRECTION), number(numbers, low, EPS)
        of_student = standardization_of_sample(sample_moments(raw), correction, eps, dtype)
        of_teacher = standardization_of_sample(sample_moments(t), correction, eps, dtype)
        s = ()
        of_t = ()
        for c in tl.static_range(TILES):
            s = s + (standardize(raw[c], of_student[0][:, None], of_student[1][:, None], of_student[2][:, None]),)
            of_t = of_t + (standardize(t[c], of_teacher[0][:, None], of_teacher[1][:, None], of_teacher[2][:, None]),)
        t = of_t
        of_teacher = (of_teacher[0], of_teacher[1], of_teacher[2])

    at_target = ()
    if CE and not POKE:
        for c in tl.static_range(TILES):
            at_target = at_target + (classes[c][None, :] == targets[:, None],)
    of_target = (tl.zeros([BLOCK_N], dtype), tl.zeros([BLOCK_N], dtype))
    if POKE:
        of_target = (
            load_one(student, at, student_strides, targets, AXIS, WIDE, dtype),
            load_one(teacher, at, teacher_strides, targets, AXIS, WIDE, dtype),
        )
    elif CE:
        of_target = (only(raw, at_target), of_target[1])

    loss = tl.zeros([BLOCK_N], dtype)
    entropy = tl.zeros([BLOCK_N], dtype)
    softmax = (loss, loss)
    if CE:
        origin, total = softmax_statistics(raw)
        softmax = (origin, (1.0 / total).to(dtype))
        entropy = (tl.log(total) - (of_target[0] - start(origin))).to(dtype)
        loss += number(numbers, low, CE_WEIGHT) * entropy
    values = (entropy,)
    kept = ()
    nothing = number(numbers, low, NOTHING)
    for i in tl.static_range(len(TERMS)):
        exponent = number(numbers, low, TERMS[i][5] + EXPONENT)
        single, top, found = partition(t, classes[0], class_count, targets, reveal(ks[i]), TERMS[i][0], TERMS[i][1])
        exps = ()
        if AGAIN:
            of_top, of_rest = statistics_again(
                held,
                matrices,
                (class_count, targets, found),
                exponent,
                nothing,
                TILES,
                TERMS,
            )
        else:
            of_top, of_rest, exps = statistics(s, t, single, top, exponent, TERMS[i][0], TERMS[i][2], TERMS[i][3])
        of_single = of_rest
        if POKE:
            of_single = statistics_of_single(of_target[0], of_target[1])
        elif has_single(TERMS[i][0]):
            of_single = statistics_of_single(only(s, single), only(t, single))
        stats = groups_with(of_single, of_top, of_rest, TERMS[i][0])
        sizes_of = group_sizes(class_count, reveal(ks[i]), TERMS[i][0])
        of_term, of_parts, coefficients = evaluate(
            stats,
            sizes_of,
            numbers,
            low,
            TERMS[i][5],
            TERMS[i][0],
            TERMS[i][2],
            TERMS[i][3],
            TERMS[i][8] if parts is not None else 0,
        )
        loss += of_term
        values = values + of_parts
        if saved is not None:
            save_term(saved, samples, there, stats, coefficients, COLUMNS[1], TERMS[i][6])
            save_members(members, found, samples, there, COLUMNS[2], TERMS[i][7])
        if STANDARDIZE != BY_SAMPLE:
            coefficients = weigh(coefficients, weights, valid)
        kept = kept + ((stats, coefficients, found, exps, single, top),)

    write_results(tl.where(valid, loss * weights, 0.0), 0, losses, block, samples, there, 1, EACH)
    if parts is not None:
        for i in tl.static_range(len(values)):
            value = tl.where(valid, values[i] * weights, 0.0)
            write_results(value, i, parts, block, samples, there, len(values), EACH)

    of_entropy = number(numbers, low, CE_WEIGHT) * weights
    results = ()
    if STANDARDIZE == BY_SAMPLE:
        for c in tl.static_range(TILES):
            results = results + (tile_gradient(s[c], kept, c, TERMS, POKE),)
        high, factor, offset, slope, level = of_student
        product, sum_ = chain_sums(results, s)
        slope, level = slope * product.to(dtype), level * sum_.to(dtype)
        of_student = (high, factor, offset, slope, level)
    if saved is not None:
        header = (weights,) + softmax + of_student + of_teacher
        store_columns(saved, header, samples, there, COLUMNS[1], 0)
    if gradient is not None:
        ending = (gradient_strides, gradient_classes, targets, softmax, of_entropy)
        for c in tl.static_range(TILES):
            if AGAIN:
                if c * BLOCK_C < gradient_classes:
                    tile, logits = gradient_again(
                        held,
                        matrices,
                        (class_count, targets, kept[0][2]),
                        kept[0][0],
                        kept[0][1],
                        number(numbers, low, TERMS[0][5] + EXPONENT),
                        nothing,
                        c,
                        TERMS,
                        not POKE,
                    )
                    position = tl.arange(0, BLOCK_C) + (c * BLOCK_C + WIDE * nothing.to(tl.int32))
                    where = (outer, within, position, class_count, valid, there, sizes)
                    finish_tile(gradient, tile, logits, where, *ending, CE, POKE, AXIS, WIDE)
            else:
                if STANDARDIZE == BY_SAMPLE:
                    result = chain(results[c], s[c], level[:, None], slope[:, None], (factor * weights)[:, None])
                else:
                    result = tile_gradient(s[c], kept, c, TERMS, POKE)
                at = (outer, within, classes[c], class_count, valid, there, sizes)
                finish_tile(gradient, result, raw[c], at, *ending, CE, POKE, AXIS, WIDE)
        if POKE:
            value = tl.zeros([BLOCK_N], dtype)
            for i in tl.static_range(len(TERMS)):
                value += gradient_of_single(kept[i][0], kept[i][1])
            if CE:
                value += softmax_gradient(of_target[0], softmax, of_entropy) - of_entropy
            tl.debug_barrier()  # the tiles are written
            store_one(gradient, value, at, gradient_strides, targets, AXIS, WIDE)
