"""Step 1, group statistics: all that a loss needs to know of the classes of one group of one sample.

With k = log2(e) / T, for the classes i of a group:
    es_i = 2^(k * (student_i - student_origin)),  et_i = 2^(k * (teacher_i - teacher_origin)),
    gap_i = (teacher_i - teacher_origin) - (student_i - student_origin)
    statistics = (student_origin, teacher_origin, sum es, sum et, sum et * gap, sum es * gap)
Origins are maxima, logits themselves: a constant added to all logits cancels before anything is rounded. Statistics
merge exactly, over any parts of a row.

A tile is ``[samples, classes]``; rows may be in several, which are worked on one after the other: that needs fewer
registers. There are up to three groups: ``single``, one class (the target, or the teacher's best),
``top``, the teacher's other best ones, and the rest.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.objective import TARGET, TOP1_TOPK, TOPK, by_rank, has_single

LOG2E = tl.constexpr(1.4426950408889634)
# Classes that are added up in float32 before the sum goes on in float64. Rounding must average out over many
# such chunks, and conversions cost: first those that a thread has loaded at a time, in long rows over its loads, too.
CHUNK = tl.constexpr(8)
LOADS = tl.constexpr(4)


@triton.jit
def start(origin):
    """What exponents are counted from: a group without a finite class has no origin and counts from 0."""
    return tl.where(origin == float("-inf"), 0.0, origin)


@triton.jit
def total(x):
    """The sum over the classes of a tile, in float64."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    if x.dtype == tl.float64 or C < 16 * CHUNK:
        return tl.sum(x.to(tl.float64), 1)
    elif C < 64 * LOADS * CHUNK:
        return tl.sum(tl.sum(tl.reshape(x, [N, C // CHUNK, CHUNK]), 2).to(tl.float64), 1)
    else:
        x = tl.sum(tl.reshape(x, [N, LOADS, C // LOADS]), 1)
        return tl.sum(tl.sum(tl.reshape(x, [N, C // LOADS // CHUNK, CHUNK]), 2).to(tl.float64), 1)


@triton.jit
def only(tiles, masks):
    """The value at the one class of each row that is in the masks; 0 where there is none."""
    value = tl.where(masks[0], tiles[0], 0.0)
    for c in tl.static_range(1, len(tiles)):
        value += tl.where(masks[c], tiles[c], 0.0)
    return tl.sum(value, 1)


@triton.jit
def power_of_single(origin):
    """The sum of a group of one class: 1, or 0 where it is masked; NaN where it is no number."""
    return tl.where(origin == float("-inf"), 0.0, 1.0 + (origin - origin))


@triton.jit
def statistics_of_single(student, teacher):
    """Statistics of a group of one class from its logits."""
    zero = tl.zeros_like(student).to(tl.float64)
    student_sum, teacher_sum = power_of_single(student).to(tl.float64), power_of_single(teacher).to(tl.float64)
    return (student, teacher, student_sum, teacher_sum, zero, zero)


@triton.jit
def without(logits, mask):
    """The logits outside a group; those in it are masked."""
    return tl.where(mask, float("-inf"), logits)


@triton.jit
def maxima(tiles):
    """The maximum of each row over all of its tiles."""
    largest = tiles[0]
    for c in tl.static_range(1, len(tiles)):
        largest = tl.maximum(largest, tiles[c])
    return tl.max(largest, 1)


@triton.jit
def totals(tiles):
    """The sum of each row over all of its tiles, in float64."""
    sum_ = tiles[0]
    for c in tl.static_range(1, len(tiles)):
        sum_ += tiles[c]
    return total(sum_)


@triton.jit
def origins_of(student, teacher, single, top, KIND: tl.constexpr):
    """Maxima of the top group (where there is one) and of the rest: a pair of pairs."""
    top_student = ()
    top_teacher = ()
    rest_student = ()
    rest_teacher = ()
    for c in tl.static_range(len(student)):
        s, t = student[c], teacher[c]
        if has_single(KIND):
            s, t = without(s, single[c]), without(t, single[c])
        if by_rank(KIND):
            top_student = top_student + (tl.where(top[c], s, float("-inf")),)
            top_teacher = top_teacher + (tl.where(top[c], t, float("-inf")),)
            s, t = without(s, top[c]), without(t, top[c])
        rest_student = rest_student + (s,)
        rest_teacher = rest_teacher + (t,)
    of_rest = (maxima(rest_student), maxima(rest_teacher))
    if by_rank(KIND):
        return (maxima(top_student), maxima(top_teacher)), of_rest
    else:
        return of_rest, of_rest


@triton.jit
def exponentials(student, teacher, single, top, of_top, of_rest, k, KIND: tl.constexpr):
    """``(es, et, gap)`` of each class, counted from its group's origins; the single class has none here: 0."""
    student_start, teacher_start = start(of_rest[0])[:, None], start(of_rest[1])[:, None]
    if has_single(KIND):
        student, teacher = without(student, single), without(teacher, single)
    if by_rank(KIND):
        student_start = tl.where(top, start(of_top[0])[:, None], student_start)
        teacher_start = tl.where(top, start(of_top[1])[:, None], teacher_start)
    student, teacher = student - student_start, teacher - teacher_start
    return tl.exp2(student * k), tl.exp2(teacher * k), teacher - student


@triton.jit
def summands(exps, mask, MASKED: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """What a tile adds to the four sums of the classes in ``mask`` (if ``MASKED``; else of all).

    A class without probability adds nothing, however infinite its gap.
    """
    es, et, gap = exps
    if MASKED:
        es, et = tl.where(mask, es, 0.0), tl.where(mask, et, 0.0)
    of_teacher, of_student = et, es
    if FORWARD:
        of_teacher = et * tl.where(et > 0, gap, 0.0)
    if REVERSE:
        of_student = es * tl.where(es > 0, gap, 0.0)
    return (es, et, of_teacher, of_student)


@triton.jit
def add_up(parts, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """The four sums over all tiles of a row, in float64."""
    sum_ = parts[0]
    for c in tl.static_range(1, len(parts)):
        part = parts[c]
        sum_ = (sum_[0] + part[0], sum_[1] + part[1], sum_[2] + part[2], sum_[3] + part[3])
    student_sum, teacher_sum = total(sum_[0]), total(sum_[1])
    zero = tl.zeros_like(student_sum)
    teacher_gap, student_gap = zero, zero
    if FORWARD:
        teacher_gap = total(sum_[2])
    if REVERSE:
        student_gap = total(sum_[3])
    return (student_sum, teacher_sum, teacher_gap, student_gap)


@triton.jit
def statistics(student, teacher, single, top, k, KIND: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """``(statistics of top, statistics of rest, exponentials)`` of rows in one or several tiles.

    Arguments and exponentials have one entry a tile; top's statistics are rest's where there is no top.
    """
    of_top, of_rest = origins_of(student, teacher, single, top, KIND)
    exps = ()
    inside = ()
    outside = ()
    for c in tl.static_range(len(student)):
        of_tile = exponentials(student[c], teacher[c], single[c], top[c], of_top, of_rest, k, KIND)
        exps = exps + (of_tile,)
        if by_rank(KIND):
            inside = inside + (summands(of_tile, top[c], True, FORWARD, REVERSE),)
            outside = outside + (summands(of_tile, top[c] == 0, True, FORWARD, REVERSE),)
        else:
            outside = outside + (summands(of_tile, top[c], False, FORWARD, REVERSE),)
    of_rest = of_rest + add_up(outside, FORWARD, REVERSE)
    if by_rank(KIND):
        return of_top + add_up(inside, FORWARD, REVERSE), of_rest, exps
    else:
        return of_rest, of_rest, exps


@triton.jit
def rebase(stats, student, teacher, k):
    """The sums of ``stats``, counted from the origins ``student`` and ``teacher``, which are at least as large."""
    student_origin, teacher_origin, student_sum, teacher_sum, teacher_gap, student_gap = stats
    # Without a class there is nothing to count anew, but the factor must not be infinite.
    by_student = tl.where(student_origin == float("-inf"), 0.0, start(student_origin) - start(student)).to(tl.float64)
    by_teacher = tl.where(teacher_origin == float("-inf"), 0.0, start(teacher_origin) - start(teacher)).to(tl.float64)
    student_factor, teacher_factor = tl.exp2(by_student * k), tl.exp2(by_teacher * k)
    gap = by_teacher - by_student
    teacher_gap = tl.where(teacher_factor == 0, 0.0, teacher_factor * (teacher_gap + gap * teacher_sum))
    student_gap = tl.where(student_factor == 0, 0.0, student_factor * (student_gap + gap * student_sum))
    return student_factor * student_sum, teacher_factor * teacher_sum, teacher_gap, student_gap


@triton.jit
def merge_along(stats, k):
    """The statistics of rows from those of their parts, ``[samples, parts]``."""
    student, teacher = tl.max(stats[0], 1), tl.max(stats[1], 1)
    sums_ = rebase(stats, student[:, None], teacher[:, None], k)
    return (student, teacher, tl.sum(sums_[0], 1), tl.sum(sums_[1], 1), tl.sum(sums_[2], 1), tl.sum(sums_[3], 1))


@triton.jit
def merge(a, b, k):
    """The statistics of two parts of a group together."""
    student, teacher = tl.maximum(a[0], b[0]), tl.maximum(a[1], b[1])
    of_a, of_b = rebase(a, student, teacher, k), rebase(b, student, teacher, k)
    return (student, teacher, of_a[0] + of_b[0], of_a[1] + of_b[1], of_a[2] + of_b[2], of_a[3] + of_b[3])


@triton.jit
def softmax_statistics(student):
    """``(origin, sum)`` of each row's softmax at T = 1, for the cross entropy; ``student`` in one or several tiles."""
    origin = maxima(student)
    powers = ()
    for c in tl.static_range(len(student)):
        powers = powers + (tl.exp2((student[c] - start(origin)[:, None]) * LOG2E),)
    return origin, totals(powers)


@triton.jit
def groups_with(of_single, of_top, of_rest, KIND: tl.constexpr):
    """One entry a group, in the order of a term's weights."""
    if KIND == TOP1_TOPK:
        return (of_single, of_top, of_rest)
    elif KIND == TOPK:
        return (of_top, of_rest)
    elif KIND == TARGET:
        return (of_single, of_rest)
    else:
        return (of_rest,)
