"""Steps 1 and 2 for samples that do not fit on chip: their classes are split between programs.

:func:`split_kernel` writes the statistics of each part, :func:`merge_kernel` merges them and takes step 2; step 3 is
:mod:`sweep`'s. Where the teacher's ranking decides, a part does not know which of its classes lead in the end: it sets
its own k best aside as candidates, and their merge settles it without another pass over the logits. Only a k too large
for that is searched for beforehand, by :func:`select_kernel`.
"""

import itertools

import triton
import triton.language as tl
from kdkernels.triton_kernels.evaluate import evaluate
from kdkernels.triton_kernels.layout import load_tile, locate, reveal
from kdkernels.triton_kernels.objective import (
    CE_WEIGHT,
    EXPONENT,
    TOP1_TOPK,
    by_rank,
    has_single,
    number,
)
from kdkernels.triton_kernels.partition import group_sizes, masks_of, masks_of_rank
from kdkernels.triton_kernels.samples import read_factor, read_samples, write_results
from kdkernels.triton_kernels.saved import load_members, save_members, save_term, store_columns
from kdkernels.triton_kernels.select import first_best, key_of, leads, least_key, middle_of, ranked, select, value_of
from kdkernels.triton_kernels.stats import (
    groups_with,
    merge,
    merge_along,
    only,
    softmax_statistics,
    start,
    statistics,
    statistics_of_single,
)
from kdkernels.triton_kernels.sweep import standardized_tile

# Columns of a part's statistics, in float64: of the cross entropy (origin, sum, logit of the target), then for each
# term the statistics of the rest and, unless candidates are set aside, what there is of the top group's statistics and
# the single class's logits.
_SOFTMAX, _REST, _TOP, _SINGLE = (tl.constexpr(what) for what in range(4))
#: In the place of a candidate that a part does not have.
_NO_CLASS = tl.constexpr(-1)


@triton.constexpr_function
def _term_columns(term, aside):
    """Where the columns of a term begin, from its first one on, and with -1 how many there are."""
    kind, _, forward, reverse = term[:4]
    of_group = 4 + forward + reverse
    widths = {_REST.value: of_group}
    if not (aside and by_rank(kind)):
        if by_rank(kind):
            widths[_TOP.value] = of_group
        if has_single(kind):
            widths[_SINGLE.value] = 2
    return dict(zip([*widths, -1], itertools.accumulate(widths.values(), initial=0), strict=True))


@triton.constexpr_function
def part_column(terms, term, aside, what):
    """The column where ``what`` is known of a term begins. ``aside``: the best classes are candidates."""
    if what == _SOFTMAX:
        return 0
    before = sum(_term_columns(other, aside)[-1] for other in terms[:term])
    return 3 + before + _term_columns(terms[term], aside)[what]


@triton.constexpr_function
def part_columns(terms, aside):
    """How many numbers are known of a part."""
    return 3 + sum(_term_columns(term, aside)[-1] for term in terms)


@triton.jit
def store_part(stats, of_group, row, there, PART: tl.constexpr, column: tl.constexpr, TERM: tl.constexpr):
    """Writes a group's statistics of a part, with the gaps of the divergences that are wanted."""
    store_columns(stats, of_group[:4], row, there, PART, column)
    if TERM[2]:
        store_columns(stats, of_group[4:5], row, there, PART, column + 4)
    if TERM[3]:
        store_columns(stats, of_group[5:], row, there, PART, column + 4 + TERM[2])


@triton.jit
def set_aside(candidates, candidate_classes, slots, s, t, at, k, LARGEST: tl.constexpr):
    """Writes the ``k`` best classes of each sample of a tile into its slots; True where a class is one of them.

    The best class is taken out, and again; the first one of equals. Classes that do not exist are taken, too.
    """
    _, _, classes, class_count, _, there, _ = at
    inside = (classes < class_count)[None, :]
    keys = key_of(ranked(t, inside, LARGEST))
    TAKEN: tl.constexpr = least_key(keys.dtype)
    keys = tl.where(inside, keys, TAKEN)
    for place in range(k):
        best = tl.max(keys, 1)
        index = tl.min(tl.where(keys == best[:, None], classes[None, :], 0x7FFFFFFF), 1)
        is_class = best != TAKEN
        taken = (classes[None, :] == index[:, None]) & is_class[:, None]
        slot = slots + place
        of_teacher = value_of(best) if LARGEST else -value_of(best)
        tl.store(candidates + 2 * slot[:, None] + tl.zeros_like(keys), s, mask=taken & there[:, None])
        tl.store(candidates + 2 * slot + 1, of_teacher, mask=there)
        tl.store(candidate_classes + slot, tl.where(is_class, index, _NO_CLASS), mask=there)
        keys = tl.where(taken, TAKEN, keys)
    return keys == TAKEN


@triton.jit(do_not_specialize=["ignore_index", "class_count", "candidate_count"])
def split_kernel(
    student,
    teacher,
    target,
    weight,
    affines,
    saved,
    members,
    stats,
    candidates,
    candidate_classes,
    sizes,
    student_strides,
    teacher_strides,
    class_count,
    ks,
    candidate_count,
    ignore_index: tl.int64,
    numbers,
    low,
    TERMS: tl.constexpr,
    CE: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics of one part of a block of samples. With ``candidates`` None, ``members`` tell which classes lead."""
    dtype: tl.constexpr = tl.float64 if len(low) > 0 else tl.float32
    ASIDE: tl.constexpr = candidates is not None
    PART: tl.constexpr = part_columns(TERMS, ASIDE)
    parts = tl.cdiv(class_count, BLOCK_C)
    part = tl.program_id(0) % parts
    outer, within, samples, there = locate(tl.program_id(0) // parts, sizes, BLOCK_N)
    classes = part * BLOCK_C + tl.arange(0, BLOCK_C)
    targets, weights, valid = read_samples(target, weight, samples, there, class_count, ignore_index, dtype)
    at = (outer, within, classes, class_count, valid, there, sizes)
    raw = load_tile(student, at, student_strides, AXIS, WIDE).to(dtype)
    t = load_tile(teacher, at, teacher_strides, AXIS, WIDE).to(dtype)
    s = standardized_tile(raw, 0, at, samples, affines, saved, COLUMNS, STANDARDIZE)
    t = standardized_tile(t, 1, at, samples, affines, saved, COLUMNS, STANDARDIZE)
    row = samples * parts + part
    if CE:
        origin, total = softmax_statistics((raw,))
        of_softmax = (origin, total, only((raw,), (classes[None, :] == targets[:, None],)))
        store_columns(stats, of_softmax, row, there, PART, 0)
    first = tl.full((), 0, tl.int32)  # among the candidates
    for i in tl.static_range(len(TERMS)):
        exponent = number(numbers, low, TERMS[i][5] + EXPONENT)
        if by_rank(TERMS[i][0]) and ASIDE:
            slots = row * candidate_count + first
            aside = set_aside(candidates, candidate_classes, slots, s, t, at, reveal(ks[i]), TERMS[i][1])
            first += reveal(ks[i])
            kept_s, kept_t = tl.where(aside, float("-inf"), s), tl.where(aside, float("-inf"), t)
            _, of_rest, _ = statistics((kept_s,), (kept_t,), (aside,), (aside,), exponent, 0, TERMS[i][2], TERMS[i][3])
        else:
            found = load_members(members, samples, there, COLUMNS[2], TERMS[i][7], TERMS[i][0], dtype)
            single, top = masks_of(t, classes, class_count, targets, found, TERMS[i][0], TERMS[i][1])
            of_top, of_rest, _ = statistics(
                (s,), (t,), (single,), (top,), exponent, TERMS[i][0], TERMS[i][2], TERMS[i][3]
            )
            if has_single(TERMS[i][0]):
                store_columns(
                    stats,
                    (only((s,), (single,)), only((t,), (single,))),
                    row,
                    there,
                    PART,
                    part_column(TERMS, i, ASIDE, _SINGLE),
                )
            if by_rank(TERMS[i][0]):
                store_part(stats, of_top, row, there, PART, part_column(TERMS, i, ASIDE, _TOP), TERMS[i])
        store_part(stats, of_rest, row, there, PART, part_column(TERMS, i, ASIDE, _REST), TERMS[i])


@triton.jit
def load_parts(stats, row, mask, PART: tl.constexpr, column: tl.constexpr, TERM: tl.constexpr, dtype: tl.constexpr):
    """Group statistics of all parts; of those that are not there, nothing."""
    values = ()
    for i in tl.static_range(4 + TERM[2] + TERM[3]):
        value = tl.load(stats + row * PART + column + i, mask=mask, other=float("-inf") if i < 2 else 0.0)
        values = values + ((value.to(dtype) if i < 2 else value),)
    if not TERM[2]:
        values = values[:4] + (tl.zeros_like(values[2]),) + values[4:]
    if not TERM[3]:
        values = values + (tl.zeros_like(values[2]),)
    return values


@triton.jit(do_not_specialize=["ignore_index", "count", "class_count", "parts", "candidate_count"])
def merge_kernel(
    stats,
    candidates,
    candidate_classes,
    target,
    weight,
    divisor,
    losses,
    part_losses,
    saved,
    members,
    count,
    class_count,
    parts,
    ks,
    candidate_count,
    ignore_index: tl.int64,
    scale: tl.float64,
    numbers,
    low,
    TERMS: tl.constexpr,
    CE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Merges the parts of a block of samples, takes step 2 and keeps what the sweep needs."""
    dtype: tl.constexpr = tl.float64 if len(low) > 0 else tl.float32
    ASIDE: tl.constexpr = candidates is not None
    PART: tl.constexpr = part_columns(TERMS, ASIDE)
    block = tl.program_id(0)
    samples = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = samples < count
    targets, weights, valid = read_samples(target, weight, samples, there, class_count, ignore_index, dtype)
    weights = tl.where(valid, weights * read_factor(scale, divisor).to(dtype), 0.0)
    part = tl.arange(0, PARTS)
    row = samples[:, None] * parts + part[None, :]
    mask = there[:, None] & (part < parts)[None, :]

    loss = tl.zeros([BLOCK_N], dtype)
    entropy = tl.zeros([BLOCK_N], dtype)
    softmax = (loss, loss)
    if CE:
        origins = tl.load(stats + row * PART, mask=mask, other=float("-inf"))
        totals = tl.load(stats + row * PART + 1, mask=mask, other=0.0)
        logit = tl.sum(tl.load(stats + row * PART + 2, mask=mask, other=0.0), 1)
        origin = tl.max(origins, 1)
        power = tl.exp2((start(origins) - start(origin)[:, None]) * 1.4426950408889634)
        total = tl.sum(totals * tl.where(origins == float("-inf"), 1.0, power), 1)
        softmax = (origin.to(dtype), (1.0 / total).to(dtype))
        entropy = (tl.log(total) - (logit - start(origin))).to(dtype)
        loss += number(numbers, low, CE_WEIGHT) * entropy
    values = (entropy,)

    first = tl.full((), 0, tl.int32)
    for i in tl.static_range(len(TERMS)):
        exponent = number(numbers, low, TERMS[i][5] + EXPONENT)
        of_rest = load_parts(stats, row, mask, PART, part_column(TERMS, i, ASIDE, _REST), TERMS[i], dtype)
        of_rest = merge_along(of_rest, exponent)
        of_single = of_rest
        of_top = of_rest
        if by_rank(TERMS[i][0]) and ASIDE:
            # A tile of candidates, equals in the order of their classes: position stands for class.
            position = tl.arange(0, CANDIDATES)
            of_part = position // reveal(ks[i])
            place = position % reveal(ks[i])
            its_row = samples[:, None] * parts + of_part[None, :]
            inside = there[:, None] & (of_part < parts)[None, :]
            slot = its_row * candidate_count + first + place[None, :]
            first += reveal(ks[i])
            of_class = tl.load(candidate_classes + slot, mask=inside, other=_NO_CLASS)
            inside = of_class != _NO_CLASS
            s = tl.load(candidates + 2 * slot, mask=inside, other=float("-inf"))
            t = tl.load(candidates + 2 * slot + 1, mask=inside, other=float("-inf"))
            ranks = ranked(t, inside, TERMS[i][1])
            bound, last = select((ranks,), position, reveal(ks[i]))
            # Any value that k candidates reach will do among them, but others may reach it too: none the k-th's.
            bound = tl.min(tl.where(ranks >= bound[:, None], ranks, float("inf")), 1)
            best = last
            if TERMS[i][0] == TOP1_TOPK:
                best = first_best((ranks,), position)
            single, top = masks_of_rank(ranks, position, bound, last, best, TERMS[i][0])
            of_top, of_others, _ = statistics(
                (s,), (t,), (single,), (top & inside,), exponent, TERMS[i][0], TERMS[i][2], TERMS[i][3]
            )
            of_rest = merge(of_rest, of_others, exponent)
            if has_single(TERMS[i][0]):
                of_single = statistics_of_single(only((s,), (single,)), only((t,), (single,)))
            # Parts may have more equals of the k-th than they have candidates: those come after the last one taken.
            taken = leads(ranks, position, bound, last) & (ranks == bound[:, None]) & inside
            last = tl.max(tl.where(taken, of_class, -1), 1)
            best = tl.sum(tl.where(position[None, :] == best[:, None], of_class, 0), 1)
            save_members(members, (bound, last, best), samples, there, COLUMNS[2], TERMS[i][7])
        else:
            if has_single(TERMS[i][0]):
                of_student = tl.load(stats + row * PART + part_column(TERMS, i, ASIDE, _SINGLE), mask=mask, other=0.0)
                of_teacher = tl.load(
                    stats + row * PART + part_column(TERMS, i, ASIDE, _SINGLE) + 1, mask=mask, other=0.0
                )
                of_single = statistics_of_single(tl.sum(of_student, 1).to(dtype), tl.sum(of_teacher, 1).to(dtype))
            if by_rank(TERMS[i][0]):
                of_top = load_parts(stats, row, mask, PART, part_column(TERMS, i, ASIDE, _TOP), TERMS[i], dtype)
                of_top = merge_along(of_top, exponent)
        groups = groups_with(of_single, of_top, of_rest, TERMS[i][0])
        of_term, of_parts, coefficients = evaluate(
            groups,
            group_sizes(class_count, reveal(ks[i]), TERMS[i][0]),
            numbers,
            low,
            TERMS[i][5],
            TERMS[i][0],
            TERMS[i][2],
            TERMS[i][3],
            TERMS[i][8] if part_losses is not None else 0,
        )
        loss += of_term
        values = values + of_parts
        save_term(saved, samples, there, groups, coefficients, COLUMNS[1], TERMS[i][6])

    store_columns(saved, (weights,) + softmax, samples, there, COLUMNS[1], 0)
    write_results(tl.where(valid, loss * weights, 0.0), 0, losses, block, samples, there, 1, EACH)
    if part_losses is not None:
        for i in tl.static_range(len(values)):
            value = tl.where(valid, values[i] * weights, 0.0)
            write_results(value, i, part_losses, block, samples, there, len(values), EACH)


@triton.jit
def reach_of(
    teacher,
    at,
    samples,
    affines,
    saved,
    bound,
    last,
    EQUAL: tl.constexpr,
    strides,
    class_count,
    LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    dtype: tl.constexpr,
):
    """How many classes of each sample reach ``bound``; with ``EQUAL`` how many equal it, up to index ``last``."""
    outer, within, valid, there, sizes = at
    count = tl.zeros(there.shape, tl.int32)
    for begin in range(0, class_count, BLOCK_C):
        classes = begin + tl.arange(0, BLOCK_C)
        tile = (outer, within, classes, class_count, valid, there, sizes)
        t = load_tile(teacher, tile, strides, AXIS, WIDE).to(dtype)
        t = standardized_tile(t, 1, tile, samples, affines, saved, COLUMNS, STANDARDIZE)
        values = ranked(t, (classes < class_count)[None, :], LARGEST)
        if EQUAL:
            hit = (values == bound[:, None]) & (classes[None, :] <= last[:, None])
        else:
            hit = values >= bound[:, None]
        count += tl.sum(hit.to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=["ignore_index", "class_count", "k"])
def select_kernel(
    teacher,
    target,
    weight,
    affines,
    saved,
    members,
    sizes,
    strides,
    class_count,
    k,
    ignore_index: tl.int64,
    TERM: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    dtype: tl.constexpr,
):
    """Finds the k best classes of a block of samples, for any k, by bisection: each step reads the teacher once."""
    outer, within, samples, there = locate(tl.program_id(0), sizes, BLOCK_N)
    _, _, valid = read_samples(target, weight, samples, there, class_count, ignore_index, dtype)
    at = (outer, within, valid, there, sizes)
    # The k-th value: the largest that k classes reach.
    nothing = tl.full([BLOCK_N], float("-inf"), dtype)
    last = tl.zeros([BLOCK_N], tl.int32) + (class_count - 1)
    low, high = key_of(nothing), key_of(-nothing)
    while tl.max((low < high).to(tl.int32), 0) > 0:
        middle = middle_of(low, high)
        reach = reach_of(
            teacher,
            at,
            samples,
            affines,
            saved,
            value_of(middle),
            last,
            False,
            strides,
            class_count,
            TERM[1],
            COLUMNS,
            STANDARDIZE,
            AXIS,
            WIDE,
            BLOCK_C,
            dtype,
        )
        searching = low < high
        low = tl.where(searching & (reach >= k), middle, low)
        high = tl.where(searching & (reach < k), middle - 1, high)
    bound = value_of(low)
    above = reach_of(
        teacher,
        at,
        samples,
        affines,
        saved,
        value_of(low + 1),
        last,
        False,
        strides,
        class_count,
        TERM[1],
        COLUMNS,
        STANDARDIZE,
        AXIS,
        WIDE,
        BLOCK_C,
        dtype,
    )
    # Of its equals the first ones: the least index up to which there are enough.
    first = tl.zeros([BLOCK_N], tl.int32)
    while tl.max((first < last).to(tl.int32), 0) > 0:
        middle = first + (last - first) // 2
        reach = reach_of(
            teacher,
            at,
            samples,
            affines,
            saved,
            bound,
            middle,
            True,
            strides,
            class_count,
            TERM[1],
            COLUMNS,
            STANDARDIZE,
            AXIS,
            WIDE,
            BLOCK_C,
            dtype,
        )
        searching = first < last
        last = tl.where(searching & (reach >= k - above), middle, last)
        first = tl.where(searching & (reach < k - above), middle + 1, first)
    # The best class: the first one of the largest value.
    best_value = nothing
    best = tl.zeros([BLOCK_N], tl.int32)
    if TERM[0] == TOP1_TOPK:
        for begin in range(0, class_count, BLOCK_C):
            classes = begin + tl.arange(0, BLOCK_C)
            tile = (outer, within, classes, class_count, valid, there, sizes)
            t = load_tile(teacher, tile, strides, AXIS, WIDE).to(dtype)
            t = standardized_tile(t, 1, tile, samples, affines, saved, COLUMNS, STANDARDIZE)
            values = ranked(t, (classes < class_count)[None, :], TERM[1])
            of_tile = tl.max(values, 1)
            index = first_best((values,), classes)
            best = tl.where(of_tile > best_value, index, best)
            best_value = tl.maximum(best_value, of_tile)
    save_members(members, (bound, last, best), samples, there, COLUMNS[2], TERM[7])
