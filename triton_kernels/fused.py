"""Steps 1 to 3 in one launch, for samples that fit on chip: logits are read once and the gradient is written once.

A program holds all classes of a block of samples. It serves rows (classes next to one another; several rows a program
when they are short) and pixels (samples next to one another) alike: the compiler lays a tile out as memory is.
"""

import triton
import triton.language as tl
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
    by_rank,
    has_single,
    number,
    only_targets,
)
from kdkernels.triton_kernels.partition import group_sizes, masks_of, partition
from kdkernels.triton_kernels.samples import read_factor, read_samples, write_results
from kdkernels.triton_kernels.saved import save_members, save_term, store_columns
from kdkernels.triton_kernels.standardize import (
    sample_moments,
    slope_of_sample,
    standardization_of_sample,
    standardize,
    standardize_by_class,
)
from kdkernels.triton_kernels.stats import (
    add_folded,
    exponentials,
    groups_with,
    larger,
    logits_of_groups,
    only,
    origins_from,
    softmax_statistics,
    start,
    statistics,
    statistics_from,
    statistics_of_single,
    summands,
)


@triton.jit
def masks_again(t, c: tl.constexpr, class_count, targets, found, nothing, KIND: tl.constexpr, LARGEST: tl.constexpr):
    """``(single, top)`` of tile ``c``, computed anew.

    ``nothing`` is 0, which the compiler does not know: it would keep what was computed before in registers.
    """
    begin = c * t.shape[1] + nothing.to(tl.int32)
    if by_rank(KIND):
        found = (found[0] + nothing, found[1] - begin, found[2] - begin)
    classes = tl.arange(0, t.shape[1])
    return masks_of(t, classes, class_count - begin, targets - begin, found, KIND, LARGEST)


@triton.jit
def exponentials_again(s, t, single, top, of_top, of_rest, exponent, nothing, KIND: tl.constexpr):
    """The exponentials of a tile, likewise."""
    of_top = (of_top[0] + nothing, of_top[1] + nothing)
    of_rest = (of_rest[0] + nothing, of_rest[1] + nothing)
    return exponentials(s, t, single, top, of_top, of_rest, exponent, KIND)


@triton.jit
def statistics_again(
    s,
    t,
    class_count,
    targets,
    found,
    exponent,
    nothing,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """``(statistics of top, statistics of rest)`` of whole rows, of which no masks or exponentials remain."""
    largest = ()
    for c in tl.static_range(len(s)):
        single, top = masks_again(t[c], c, class_count, targets, found, nothing, KIND, LARGEST)
        largest = larger(largest, logits_of_groups(s[c], t[c], single, top, KIND))
    of_top, of_rest = origins_from(largest, exponent)
    sums = ()
    for c in tl.static_range(len(s)):
        single, top = masks_again(t[c], c, class_count, targets, found, 2 * nothing, KIND, LARGEST)
        exps = exponentials(s[c], t[c], single, top, of_top, of_rest, exponent, KIND)
        sums = add_folded(sums, summands(exps, top, KIND, FORWARD, REVERSE))
    return statistics_from(of_top, of_rest, sums, len(s), FORWARD, REVERSE)


@triton.jit
def tile_gradient(
    s,
    t,
    classes,
    class_count,
    targets,
    kept,
    c: tl.constexpr,
    numbers,
    low,
    TERMS: tl.constexpr,
    POKE: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """The gradient of a tile in the logits that the terms see; with ``POKE`` 0 at the targets."""
    result = s
    for i in tl.static_range(len(TERMS)):
        stats, coefficients, found, exps, single, top = kept[i]
        if AGAIN:
            exponent = number(numbers, low, TERMS[i][5] + EXPONENT)
            nothing = number(numbers, low, NOTHING)
            of_single, of_top = masks_again(t, c, class_count, targets, found, 3 * nothing, TERMS[i][0], TERMS[i][1])
            top_origins, rest_origins = stats[max(len(stats) - 2, 0)], stats[len(stats) - 1]
            of_tile = exponentials_again(
                s, t, of_single, of_top, top_origins, rest_origins, exponent, nothing, TERMS[i][0]
            )
        else:
            of_tile, of_single, of_top = exps[c], single[c], top[c]
        of_term = gradient_of(of_tile, of_single, of_top, stats, coefficients, TERMS[i][0], TERMS[i][4], not POKE)
        if i == 0:
            result = of_term
        else:
            result += of_term
    return result


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
    weights = weights * read_factor(scale, divisor).to(dtype)
    classes = ()
    raw = ()
    s = ()
    t = ()
    for c in tl.static_range(TILES):
        of_tile = c * BLOCK_C + tl.arange(0, BLOCK_C)
        at = (outer, within, of_tile, class_count, valid, there, sizes)
        classes = classes + (of_tile,)
        raw = raw + (load_tile(student, at, student_strides, AXIS, WIDE, dtype),)
        t = t + (load_tile(teacher, at, teacher_strides, AXIS, WIDE, dtype),)
    at = (outer, within, classes[0], class_count, valid, there, sizes)
    s = raw
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
    for i in tl.static_range(len(TERMS)):
        exponent = number(numbers, low, TERMS[i][5] + EXPONENT)
        single, top, found = partition(t, classes, class_count, targets, reveal(ks[i]), TERMS[i][0], TERMS[i][1])
        exps = ()
        if AGAIN:
            nothing = number(numbers, low, NOTHING)
            of_top, of_rest = statistics_again(
                s,
                t,
                class_count,
                targets,
                found,
                exponent,
                nothing,
                TERMS[i][0],
                TERMS[i][1],
                TERMS[i][2],
                TERMS[i][3],
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
            result = tile_gradient(
                s[c], t[c], classes[c], class_count, targets, kept, c, numbers, low, TERMS, POKE, AGAIN
            )
            results = results + (result,)
        high, factor, offset, slope = of_student
        slope = slope_of_sample(results, s, slope)
        of_student = (high, factor, offset, slope)
    if saved is not None:
        header = (tl.where(valid, weights, 0.0),) + softmax + of_student + of_teacher
        store_columns(saved, header, samples, there, COLUMNS[1], 0)
    if gradient is not None:
        for c in tl.static_range(TILES):
            if STANDARDIZE == BY_SAMPLE:
                result = chain(results[c], s[c], 0.0, slope[:, None], (factor * weights)[:, None])
            else:
                result = tile_gradient(
                    s[c], t[c], classes[c], class_count, targets, kept, c, numbers, low, TERMS, POKE, AGAIN
                )
            if CE:
                origin = softmax[0]
                if AGAIN:
                    origin += number(numbers, low, NOTHING)
                result += softmax_gradient(raw[c], (origin[:, None], softmax[1][:, None]), of_entropy[:, None])
                if not POKE:
                    result -= tl.where(at_target[c], of_entropy[:, None], 0.0)
            of_tile = classes[c]
            if AGAIN:
                of_tile = tl.arange(0, BLOCK_C) + (c * BLOCK_C + WIDE * number(numbers, low, NOTHING).to(tl.int32))
            of_tile = (outer, within, of_tile, class_count, valid, there, sizes)
            store_gradient(gradient, result, of_tile, gradient_strides, gradient_classes, AXIS, WIDE)
        if POKE:
            value = tl.zeros([BLOCK_N], dtype)
            for i in tl.static_range(len(TERMS)):
                value += gradient_of_single(kept[i][0], kept[i][1])
            if CE:
                value += softmax_gradient(of_target[0], softmax, of_entropy) - of_entropy
            tl.debug_barrier()  # the tiles are written
            store_one(gradient, value, at, gradient_strides, targets, AXIS, WIDE)
