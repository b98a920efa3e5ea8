"""Step 2: group statistics and weights in, loss parts and gradient coefficients out.

The only kernel code that knows of KL directions. Divergences are small differences of large sums and taken in float64;
masses and coefficients are in the arithmetic's type.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.objective import EXPONENT, GROUP, MASS, groups_of, has_single, number

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def weighed(forward_weight, reverse_weight, forward, reverse):
    """Both directions by their weights; one without weight drops out even where it is infinite."""
    return tl.where(forward_weight != 0, forward_weight * forward, 0.0) + tl.where(
        reverse_weight != 0, reverse_weight * reverse, 0.0
    )


@triton.jit
def arctanh_series(z, TERMS: tl.constexpr):
    """1 + z / 3 + z^2 / 5 + ..., up to z^TERMS."""
    series = tl.full(z.shape, 1 / (2 * TERMS + 1), z.dtype)
    for i in tl.static_range(TERMS):
        series = tl.fma(series, z, tl.full(z.shape, 1 / (2 * (TERMS - i) - 1), z.dtype))
    return series


@triton.jit
def log(x, TERMS: tl.constexpr):
    """The logarithm of positive float64 numbers, with a relative error of 0.03^TERMS; NaN stays.

    Every thread takes it for its whole row, so that it pays to ask for no more than is needed.
    """
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52  # counted from sqrt(1/2)
    mantissa = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    # 2 * atanh(s)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    result = tl.fma(exponent.to(tl.float64), tl.full(x.shape, LN2, tl.float64), 2.0 * s * arctanh_series(s * s, TERMS))
    return tl.where(x == x, result, x)


@triton.jit
def log_of_one_plus(x, most: tl.constexpr):
    """log(1 + x) for 0 <= x <= ``most``, 1 or 2, to full relative precision."""
    if x.dtype == tl.float64:
        u = 1.0 + x
        return tl.where(u == 1, x, log(u, 11) * (x / tl.where(u == 1, 1.0, u - 1.0)))
    else:
        # 2 * atanh(s)
        TERMS: tl.constexpr = 7 if most == 1 else 11
        s = x / (2.0 + x)
        return 2.0 * s * arctanh_series(s * s, TERMS)


@triton.jit
def log_sum_exp(origin, nats, empty, log_sum):
    """A group's logsumexp, in float64: origins, so many nats each, may be large. -inf without any probability."""
    origin = tl.where(empty, 0.0, origin).to(tl.float64)
    return tl.where(empty, float("-inf"), tl.fma(origin, tl.full(origin.shape, nats, tl.float64), log_sum))


@triton.jit
def masses_of_two(distance):
    """The same for two groups, from the second one's logsumexp less the first one's."""
    second = distance > 0  # is the larger
    distance = -tl.abs(distance)
    power = tl.exp(distance)
    larger = 1.0 / (1.0 + power)
    smaller = power * larger
    log_larger = -log_of_one_plus(power, 1)
    log_smaller = distance + log_larger
    masses = (tl.where(second, smaller, larger), tl.where(second, larger, smaller))
    return masses, (tl.where(second, log_smaller, log_larger), tl.where(second, log_larger, log_smaller))


@triton.jit
def group_masses(logsumexps, dtype: tl.constexpr):
    """``(masses, their logarithms)``: softmax over logsumexps, exact where one group holds nearly everything."""
    if len(logsumexps) == 2:
        return masses_of_two((logsumexps[1] - logsumexps[0]).to(dtype))
    largest = logsumexps[0]
    for g in tl.static_range(1, len(logsumexps)):
        largest = tl.where(logsumexps[g] > largest, logsumexps[g], largest)
    distances = ()
    powers = ()
    others = tl.zeros(largest.shape, dtype)  # the sum without the first of the largest, which is exactly 1
    seen = tl.zeros(largest.shape, tl.int1)
    for g in tl.static_range(len(logsumexps)):
        distance = (logsumexps[g] - largest).to(dtype)
        power = tl.exp(distance)
        first = (logsumexps[g] == largest) & (seen == 0)
        others += tl.where(first, 0.0, power)
        seen = seen | first
        distances = distances + (distance,)
        powers = powers + (power,)
    log_total = log_of_one_plus(others, len(logsumexps) - 1)
    inverse = 1.0 / (1.0 + others)
    masses = ()
    logs = ()
    for g in tl.static_range(len(logsumexps)):
        masses = masses + (powers[g] * inverse,)
        logs = logs + (distances[g] - log_total,)
    return masses, logs


@triton.jit
def weigh_parts(of_mass, of_groups, numbers, low, first: tl.constexpr, COUNT: tl.constexpr):
    """The parts of each of ``COUNT`` terms, from both directions' divergences; their shares begin at ``first``."""
    parts = ()
    for i in tl.static_range(COUNT * (1 + len(of_groups))):
        forward, reverse = ((of_mass,) + of_groups)[i % (1 + len(of_groups))]
        shares = number(numbers, low, first + 2 * i), number(numbers, low, first + 2 * i + 1)
        parts = parts + (weighed(shares[0], shares[1], forward, reverse),)
    return parts


@triton.jit
def evaluate(
    stats,
    sizes,
    numbers,
    low,
    FIRST: tl.constexpr,
    KIND: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``(loss, parts, coefficients)`` of one term.

    ``stats`` and ``sizes`` (class counts) have one entry a group; inside a single class there is no divergence.
    ``parts`` are those of the mass and the groups, of each of ``PARTS`` terms;
    coefficients are ``(student, tilt, teacher)`` a group, with
    dloss/dlogit_i = es_i * (student + tilt * gap_i) - et_i * teacher.
    """
    GROUPS: tl.constexpr = groups_of(KIND)
    MIX: tl.constexpr = FIRST + GROUP + 2 * GROUPS  # where the parts' numbers begin
    dtype: tl.constexpr = stats[0][0].dtype
    LOG_TERMS: tl.constexpr = 11 if dtype == tl.float64 else 5
    exponent = number(numbers, low, FIRST + EXPONENT)
    nats = exponent.to(tl.float64) * LN2  # 1 / T, of a logit
    slope = nats.to(dtype)  # the weights have T^2 already
    zero = tl.zeros(stats[0][0].shape, dtype)
    loss = zero
    of_groups = ()
    coefficients = ()
    student_lses = ()
    teacher_lses = ()
    student_inverses = ()
    for g in tl.static_range(GROUPS):
        student_origin, teacher_origin, student_sum, teacher_sum, teacher_gap, student_gap = stats[g]
        no_student, no_teacher = student_sum == 0, teacher_sum == 0
        if g == 0 and has_single(KIND):  # its sums are 1, and inside it there is no divergence
            student_inverse = student_sum.to(dtype)
            student_lse = log_sum_exp(student_origin, nats, no_student, 0.0)
            teacher_lse = log_sum_exp(teacher_origin, nats, no_teacher, 0.0)
            of_groups = of_groups + ((zero, zero),)
            coefficients = coefficients + ((zero, zero, zero),)
        else:
            student_inverse = tl.where(no_student, 0.0, 1.0 / tl.where(no_student, 1.0, student_sum))
            teacher_inverse = tl.where(no_teacher, 0.0, 1.0 / tl.where(no_teacher, 1.0, teacher_sum))
            student_mean_gap = student_gap * student_inverse * LN2
            forward_weight = tl.where(sizes[g] == 1, 0.0, number(numbers, low, FIRST + GROUP + 2 * g))
            reverse_weight = tl.where(sizes[g] == 1, 0.0, number(numbers, low, FIRST + GROUP + 2 * g + 1))
            forward, reverse = zero, zero
            log_ratio = log(
                tl.where(no_teacher, 1.0, teacher_sum) * tl.where(no_student, 1.0, student_inverse), LOG_TERMS
            )
            if FORWARD:
                difference = teacher_gap * teacher_inverse * LN2 - log_ratio
                forward = tl.where(no_teacher | (sizes[g] == 1), 0.0, tl.where(no_student, float("inf"), difference))
                forward = forward.to(dtype)
            if REVERSE:
                difference = log_ratio - student_mean_gap
                reverse = tl.where(no_student | (sizes[g] == 1), 0.0, tl.where(no_teacher, float("inf"), difference))
                reverse = reverse.to(dtype)
            loss += weighed(forward_weight, reverse_weight, forward, reverse)
            of_groups = of_groups + ((forward, reverse),)
            student_inverse, teacher_inverse = student_inverse.to(dtype), teacher_inverse.to(dtype)
            student, tilt = slope * student_inverse * forward_weight, zero
            if REVERSE:
                tilted = tl.where(reverse_weight != 0, reverse_weight * student_mean_gap.to(dtype), 0.0)
                student += slope * student_inverse * tilted
                tilt = -slope * LN2 * reverse_weight * student_inverse
            coefficients = coefficients + ((student, tilt, slope * forward_weight * teacher_inverse),)
            if GROUPS > 1:
                log_sum = log(tl.where(no_student, 1.0, student_sum), LOG_TERMS)
                student_lse = log_sum_exp(student_origin, nats, no_student, log_sum)
                teacher_lse = log_sum_exp(teacher_origin, nats, no_teacher, log_sum + log_ratio)
        if GROUPS > 1:
            student_lses = student_lses + (student_lse,)
            teacher_lses = teacher_lses + (teacher_lse,)
            student_inverses = student_inverses + (student_inverse,)
    if GROUPS == 1:
        return loss, weigh_parts((zero, zero), of_groups, numbers, low, MIX, PARTS), coefficients
    else:
        qs, log_qs = group_masses(student_lses, dtype)
        qt, log_qt = group_masses(teacher_lses, dtype)
        forward, reverse = zero, zero
        for g in tl.static_range(GROUPS):
            forward += tl.where(qt[g] == 0, 0.0, qt[g] * (log_qt[g] - log_qs[g]))
            reverse += tl.where(qs[g] == 0, 0.0, qs[g] * (log_qs[g] - log_qt[g]))
        forward_weight = number(numbers, low, FIRST + MASS)
        reverse_weight = number(numbers, low, FIRST + MASS + 1)
        loss += weighed(forward_weight, reverse_weight, forward, reverse)
        parts = weigh_parts((forward, reverse), of_groups, numbers, low, MIX, PARTS)
        with_mass = ()
        for g in tl.static_range(GROUPS):
            # qs_g * (L_g - KL) with L = log qs - log qt, as a sum of differences: nothing large cancels where a group
            # holds nearly all the mass.
            reverse_pull = zero
            for h in tl.static_range(GROUPS):
                if h != g:
                    weight = qs[g] * qs[h]
                    difference = (log_qs[g] - log_qt[g]) - (log_qs[h] - log_qt[h])
                    reverse_pull += tl.where(weight == 0, 0.0, weight * difference)
            pull = weighed(forward_weight, reverse_weight, qs[g] - qt[g], reverse_pull)
            student, tilt, teacher = coefficients[g]
            with_mass = with_mass + ((student + slope * student_inverses[g] * pull, tilt, teacher),)
        return loss, parts, with_mass
