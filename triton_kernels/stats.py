"""Step 1, group statistics: all that a loss needs to know of the classes of one group of one sample.

With k = log2(e) / T, for the classes i of a group:
    es_i = 2^(k * (student_i - student_origin)),  et_i = 2^(k * (teacher_i - teacher_origin)),
    gap_i = log2(et_i) - log2(es_i)
    statistics = (student_origin, teacher_origin, sum es, sum et, sum et * gap, sum es * gap)
Origins are the maxima of the logits. They are subtracted before anything is rounded, so that a constant added to all
logits cancels, however large it is. Statistics merge over any parts of a row.

A tile is ``[samples, classes]``; rows may be in several, which are worked on one after the other: that needs fewer
registers. There are up to three groups: ``single``, one class (the target, or the teacher's best),
``top``, the teacher's other best ones, and the rest.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.objective import TARGET, TOP1_TOPK, TOPK, by_rank, has_single

LOG2E = tl.constexpr(1.4426950408889634)
# Classes that are added up in float32 before the sum goes on in float64. Rounding must average out over many such
# chunks, and conversions cost: first those that a thread has loaded at a time, in long rows over its loads, too.
CHUNK = tl.constexpr(8)
LOADS, FOLD = tl.constexpr(4), tl.constexpr(4)


@triton.jit
def start(origin):
    """What exponents are counted from: a group without a finite class has no origin and counts from 0."""
    return tl.where(origin == float("-inf"), 0.0, origin)


@triton.jit
def square_scale(largest):
    """``(scale, 1 / scale)``, powers of two: numbers up to ``largest``, times ``scale``, have squares within float32.

    Both are 1 in float64, whose range has room for the squares of float32.
    """
    if largest.dtype == tl.float64:
        one = tl.full(largest.shape, 1.0, tl.float64)
        return one, one
    else:
        exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
        exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)
        return (0x7F000000 - exponent).to(tl.float32, bitcast=True), exponent.to(tl.float32, bitcast=True)


@triton.jit
def chunks(sum_, TILES: tl.constexpr):
    """Sums over some of the classes, in float64, from the sum of so many tiles."""
    N: tl.constexpr = sum_.shape[0]
    C: tl.constexpr = sum_.shape[1]
    if sum_.dtype == tl.float64 or C < 16 * CHUNK:
        return sum_.to(tl.float64)
    elif TILES > 1 or C < 64 * LOADS * CHUNK:
        return tl.sum(tl.reshape(sum_, [N, C // CHUNK, CHUNK]), 2).to(tl.float64)
    else:
        sum_ = tl.sum(tl.reshape(sum_, [N, LOADS, C // LOADS]), 1)
        return tl.sum(tl.reshape(sum_, [N, C // LOADS // CHUNK, CHUNK]), 2).to(tl.float64)


@triton.jit
def total(sum_, TILES: tl.constexpr):
    """The sum over the classes, in float64, of the sum of so many tiles."""
    return tl.sum(chunks(sum_, TILES), 1)


@triton.jit
def total_pair(a, b, TILES: tl.constexpr):
    """Two such sums at once: threads wait for one another half as often."""
    return tl.split(tl.sum(tl.join(chunks(a, TILES), chunks(b, TILES)), 1))


@triton.jit
def max_pair(a, b):
    """Two maxima of each row, likewise."""
    return tl.split(tl.max(tl.join(a, b), 1))


@triton.jit
def totals(tiles):
    """The sum over the classes of all tiles, in float64."""
    sum_ = tiles[0]
    for c in tl.static_range(1, len(tiles)):
        sum_ += tiles[c]
    return total(sum_, len(tiles))


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
    """Statistics of a group of one class from its logits, which are its origins."""
    zero = tl.zeros_like(student).to(tl.float64)
    student_sum, teacher_sum = power_of_single(student).to(tl.float64), power_of_single(teacher).to(tl.float64)
    return (student, teacher, student_sum, teacher_sum, zero, zero)


@triton.jit
def without(logits, mask):
    """The logits outside a group; those in it are masked."""
    return tl.where(mask, float("-inf"), logits)


@triton.jit
def place_maxima(tiles):
    """The maximum over the tiles at each place."""
    maximum = tiles[0]
    for c in tl.static_range(1, len(tiles)):
        maximum = tl.maximum(maximum, tiles[c])
    return maximum


@triton.jit
def maxima(tiles):
    """The maximum of each row over all of its tiles."""
    return tl.max(place_maxima(tiles), 1)


@triton.jit
def logits_of_groups(student, teacher, single, top, KIND: tl.constexpr):
    """The logits of the rest and, where there is one, of the top group of one tile; the others masked."""
    if has_single(KIND):
        student, teacher = without(student, single), without(teacher, single)
    if by_rank(KIND):
        of_top = tl.where(top, student, float("-inf")), tl.where(top, teacher, float("-inf"))
        return (without(student, top), without(teacher, top)) + of_top
    else:
        return student, teacher


@triton.jit
def larger(largest, logits):
    """Maxima over the tiles so far, at each place; one entry each of :func:`logits_of_groups`."""
    if len(largest) == 0:
        return logits
    else:
        maxima_ = ()
        for i in tl.static_range(len(largest)):
            maxima_ = maxima_ + (tl.maximum(largest[i], logits[i]),)
        return maxima_


@triton.jit
def origins_from(largest):
    """Origins of the top group (where there is one) and of the rest, a pair of pairs, from all tiles' maxima."""
    of_rest = max_pair(largest[0], largest[1])
    if len(largest) > 2:
        return max_pair(largest[2], largest[3]), of_rest
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
    student, teacher = (student - student_start) * k, (teacher - teacher_start) * k
    return tl.exp2(student), tl.exp2(teacher), teacher - student


@triton.jit
def summands_of(exps, mask, MASKED: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """What the four sums of the classes in ``mask`` (if ``MASKED``; else of all) are made of: es, et and their gaps.

    A class without probability adds nothing, however infinite its gap.
    """
    es, et, gap = exps
    if MASKED:
        es, et = tl.where(mask, es, 0.0), tl.where(mask, et, 0.0)
    of_teacher, of_student = gap, gap
    if FORWARD:
        of_teacher = tl.where(et > 0, gap, 0.0)
    if REVERSE:
        of_student = tl.where(es > 0, gap, 0.0)
    return es, et, of_teacher, of_student


@triton.jit
def summands(exps, top, KIND: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """The summands of a tile: those of the rest and, where there is one, of the top group."""
    if by_rank(KIND):
        return summands_of(exps, top == 0, True, FORWARD, REVERSE), summands_of(exps, top, True, FORWARD, REVERSE)
    else:
        return (summands_of(exps, top, False, FORWARD, REVERSE),)


@triton.jit
def fold(x):
    """Sums of neighbours, which one thread has."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // FOLD, FOLD]), 2)


@triton.jit
def add(sums, parts):
    """The four sums of all groups, tile after tile: the fewer are waiting, the fewer registers they take."""
    groups = ()
    for g in tl.static_range(len(parts)):
        es, et, of_teacher, of_student = parts[g]
        if len(sums) == 0:
            groups = groups + ((es, et, et * of_teacher, es * of_student),)
        else:
            a = sums[g]
            of_teacher, of_student = tl.fma(et, of_teacher, a[2]), tl.fma(es, of_student, a[3])
            groups = groups + ((a[0] + es, a[1] + et, of_teacher, of_student),)
    return groups


@triton.jit
def add_folded(sums, parts):
    """The same with neighbours added up first: fewer numbers to carry on."""
    parts = add((), parts)
    groups = ()
    for g in tl.static_range(len(parts)):
        b = parts[g]
        b = (fold(b[0]), fold(b[1]), fold(b[2]), fold(b[3]))
        if len(sums) > 0:
            a = sums[g]
            b = (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])
        groups = groups + (b,)
    return groups


@triton.jit
def totals_of_group(sums, TILES: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """A group's four sums over all classes, in float64."""
    student_sum, teacher_sum = total_pair(sums[0], sums[1], TILES)
    zero = tl.zeros_like(student_sum)
    teacher_gap, student_gap = zero, zero
    if FORWARD and REVERSE:
        teacher_gap, student_gap = total_pair(sums[2], sums[3], TILES)
    elif FORWARD:
        teacher_gap = total(sums[2], TILES)
    elif REVERSE:
        student_gap = total(sums[3], TILES)
    return (student_sum, teacher_sum, teacher_gap, student_gap)


@triton.jit
def statistics_from(of_top, of_rest, sums, TILES: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """``(statistics of top, statistics of rest)`` from their origins and the sums over so many tiles."""
    of_rest = of_rest + totals_of_group(sums[0], TILES, FORWARD, REVERSE)
    if len(sums) > 1:
        return of_top + totals_of_group(sums[1], TILES, FORWARD, REVERSE), of_rest
    else:
        return of_rest, of_rest


@triton.jit
def statistics(student, teacher, single, top, k, KIND: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """``(statistics of top, statistics of rest, exponentials)`` of rows in one or several tiles.

    Arguments and exponentials have one entry a tile; top's statistics are rest's where there is no top.
    """
    largest = ()
    for c in tl.static_range(len(student)):
        largest = larger(largest, logits_of_groups(student[c], teacher[c], single[c], top[c], KIND))
    of_top, of_rest = origins_from(largest)
    exps = ()
    sums = ()
    for c in tl.static_range(len(student)):
        of_tile = exponentials(student[c], teacher[c], single[c], top[c], of_top, of_rest, k, KIND)
        exps = exps + (of_tile,)
        sums = add(sums, summands(of_tile, top[c], KIND, FORWARD, REVERSE))
    of_top, of_rest = statistics_from(of_top, of_rest, sums, len(student), FORWARD, REVERSE)
    return of_top, of_rest, exps


@triton.jit
def rebase(stats, student, teacher, k):
    """The sums of ``stats``, counted from the origins ``student`` and ``teacher``, which are at least as large."""
    student_origin, teacher_origin, student_sum, teacher_sum, teacher_gap, student_gap = stats
    # Without a class there is nothing to count anew, but the factor must not be infinite.
    by_student = tl.where(student_origin == float("-inf"), 0.0, start(student_origin) - start(student))
    by_teacher = tl.where(teacher_origin == float("-inf"), 0.0, start(teacher_origin) - start(teacher))
    by_student, by_teacher = by_student.to(tl.float64) * k, by_teacher.to(tl.float64) * k
    student_factor, teacher_factor = tl.exp2(by_student), tl.exp2(by_teacher)
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
