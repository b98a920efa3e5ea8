"""Step 1, group statistics: all that a loss needs to know of the classes of one group of one sample.

With k = log2(e) / T, for the classes i of a group:
    es_i = 2^(k * (student_i - student_origin)),  et_i = 2^(k * (teacher_i - teacher_origin)),
    gap_i = (teacher_i - teacher_origin) - (student_i - student_origin)
    statistics = (student_origin, teacher_origin, sum es, sum et, sum et * gap, sum es * gap)
Origins are maxima, logits themselves: a constant added to all logits cancels before anything is rounded. Statistics
merge exactly, over any parts of a row.

A tile is ``[samples, classes]``. There are up to three groups: ``single``, one class (the target, or the teacher's best),
``top``, the teacher's other best ones, and the rest.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.objective import TARGET, TOP1_TOPK, TOPK, by_rank, has_single

LOG2E = tl.constexpr(1.4426950408889634)
# Classes that are added up in float32 before the sum goes on in float64. Rounding must average out over many such chunks,
# and conversions cost: first those that a thread has loaded at a time, in long rows over its loads, too.
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
def only(x, mask):
    """The value at the one class of each row that is in ``mask``; 0 where there is none."""
    return tl.sum(tl.where(mask, x, 0.0), 1)


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
def origins_of(student, teacher, single, top, KIND: tl.constexpr):
    """Maxima of the top group (where there is one) and of the rest: a pair of pairs."""
    if has_single(KIND):
        student, teacher = tl.where(single, float("-inf"), student), tl.where(single, float("-inf"), teacher)
    if by_rank(KIND):
        of_top = (
            tl.max(tl.where(top, student, float("-inf")), 1),
            tl.max(tl.where(top, teacher, float("-inf")), 1),
        )
        student, teacher = tl.where(top, float("-inf"), student), tl.where(top, float("-inf"), teacher)
        return of_top, (tl.max(student, 1), tl.max(teacher, 1))
    else:
        of_rest = (tl.max(student, 1), tl.max(teacher, 1))
        return of_rest, of_rest


@triton.jit
def exponentials(student, teacher, single, top, of_top, of_rest, k, KIND: tl.constexpr):
    """``(es, et, gap)`` of each class, counted from its group's origins; the single class has none here: 0."""
    student_start, teacher_start = start(of_rest[0])[:, None], start(of_rest[1])[:, None]
    if has_single(KIND):
        student, teacher = tl.where(single, float("-inf"), student), tl.where(single, float("-inf"), teacher)
    if by_rank(KIND):
        student_start = tl.where(top, start(of_top[0])[:, None], student_start)
        teacher_start = tl.where(top, start(of_top[1])[:, None], teacher_start)
    student, teacher = student - student_start, teacher - teacher_start
    return tl.exp2(student * k), tl.exp2(teacher * k), teacher - student


@triton.jit
def sums(es, et, gap, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """The four sums over a tile; a class without probability adds nothing, however infinite its gap."""
    student_sum, teacher_sum = total(es), total(et)
    teacher_gap, student_gap = tl.zeros_like(student_sum), tl.zeros_like(student_sum)
    if FORWARD:
        teacher_gap = total(et * tl.where(et > 0, gap, 0.0))
    if REVERSE:
        student_gap = total(es * tl.where(es > 0, gap, 0.0))
    return (student_sum, teacher_sum, teacher_gap, student_gap)


@triton.jit
def statistics(student, teacher, single, top, k, KIND: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """``(statistics of top, statistics of rest, (es, et, gap))`` of a tile; top's are rest's where there is no top."""
    of_top, of_rest = origins_of(student, teacher, single, top, KIND)
    es, et, gap = exponentials(student, teacher, single, top, of_top, of_rest, k, KIND)
    if by_rank(KIND):
        inside = sums(tl.where(top, es, 0.0), tl.where(top, et, 0.0), gap, FORWARD, REVERSE)
        outside = sums(tl.where(top, 0.0, es), tl.where(top, 0.0, et), gap, FORWARD, REVERSE)
        return of_top + inside, of_rest + outside, (es, et, gap)
    else:
        rest = of_rest + sums(es, et, gap, FORWARD, REVERSE)
        return rest, rest, (es, et, gap)


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
    """``(origin, sum)`` of each row's softmax at T = 1, for the cross entropy."""
    origin = tl.max(student, 1)
    return origin, total(tl.exp2((student - start(origin)[:, None]) * LOG2E))


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
