// Step 2 of every loss: group statistics and weights in, loss parts and gradient coefficients out.
//
// The only native code that knows of KL directions. It is free of branches on statistics, so that a value R may be a
// number or a SIMD vector with a sample in each lane. It is included inside the namespace of the kernels that use it,
// where `Number<R>` (the type of R's numbers) and exp, log, log1p and inverse of R are declared. Host and device
// code; no torch.

// dloss/dlogit_i = es_i * (student + tilt * gap_i) - et_i * teacher, with es, et, gap as in GroupStats.
template <class R>
struct GroupCoefficients {
  R student;
  R tilt;
  R teacher;
};

template <class R>
struct TermResult {
  R loss;
  R parts[1 + kMaxGroups];  // mass, then the groups; unweighted, with the scale
  GroupCoefficients<R> group[kMaxGroups];
};

// Both directions by their weights; one without weight drops out even where it is infinite.
template <class R>
KDK_HOST_DEVICE R weighed(const KlWeights& weights, R forward, R reverse) {
  R sum{};
  if (weights.forward != 0) sum += Number<R>(weights.forward) * forward;
  if (weights.reverse != 0) sum += Number<R>(weights.reverse) * reverse;
  return sum;
}

// Masses of the groups and their logarithms: softmax over logsumexps. Exact where one group holds nearly everything.
template <class R>
KDK_HOST_DEVICE void group_masses(const R* logsumexp, int groups, R* mass, R* log_mass) {
  if (groups == 2) {  // one exponential less
    const R lead = logsumexp[1] - logsumexp[0], lower = lead > 0 ? -lead : lead;
    const R ratio = exp(lower), log_total = log1p(ratio), share = inverse(1 + ratio), minor = ratio * share;
    mass[0] = lead > 0 ? minor : share;
    mass[1] = lead > 0 ? share : minor;
    log_mass[0] = (lead > 0 ? lower : R{}) - log_total;
    log_mass[1] = (lead > 0 ? R{} : lower) - log_total;
    return;
  }
  R largest = logsumexp[0];
  for (int g = 1; g < groups; ++g) largest = logsumexp[g] > largest ? logsumexp[g] : largest;
  R others{}, seen{};  // the sum without the first of the largest, which is exactly 1
  for (int g = 0; g < groups; ++g) {
    mass[g] = exp(logsumexp[g] - largest);
    const R first = logsumexp[g] == largest ? 1 - seen : R{};
    others += first == 1 ? R{} : mass[g];
    seen += first;
  }
  const R log_total = log1p(others), share = inverse(1 + others);
  for (int g = 0; g < groups; ++g) {
    mass[g] *= share;
    log_mass[g] = (logsumexp[g] - largest) - log_total;
  }
}

// One term. `unit` is that of the origins (see stats.h). `sizes` are the groups' class counts: inside a single class
// there is no divergence, and its sums are single_sum() of stats.h.
template <class R>
KDK_HOST_DEVICE void evaluate(const Term& term, const GroupStats<R>* stats, const int64_t* sizes, Number<R> unit,
                              TermResult<R>& result) {
  const int groups = term.groups();
  const Number<R> scale = term.scale, slope = term.scale / term.temperature, ln2 = kLn2;
  const Number<R> nats = ln2 * unit;
  const R one = R{} + 1, infinite = R{} + INFINITY;
  R student_lse[kMaxGroups], teacher_lse[kMaxGroups];
  R student_inverse[kMaxGroups];
  result.loss = R{};
  for (int g = 0; g < groups; ++g) {
    const GroupStats<R>& s = stats[g];
    const bool single = sizes[g] == 1;  // 1 is its own inverse, and its logarithm 0
    const R student_log = single ? s.student_sum - s.student_sum : log(s.student_sum == 0 ? one : s.student_sum);
    const R teacher_log = single ? s.teacher_sum - s.teacher_sum : log(s.teacher_sum == 0 ? one : s.teacher_sum);
    const R log_ratio = teacher_log - student_log;
    // start() of stats.h for an R that may be a vector: that function is not built for the kernels' instruction set.
    const R student_start = s.student_origin == -INFINITY ? R{} : s.student_origin;
    const R teacher_start = s.teacher_origin == -INFINITY ? R{} : s.teacher_origin;
    student_lse[g] = s.student_sum == 0 ? -infinite : student_start * nats + student_log;
    teacher_lse[g] = s.teacher_sum == 0 ? -infinite : teacher_start * nats + teacher_log;
    student_inverse[g] = single ? s.student_sum : s.student_sum == 0 ? R{} : inverse(s.student_sum);
    const R teacher_inverse = single ? s.teacher_sum : s.teacher_sum == 0 ? R{} : inverse(s.teacher_sum);
    const R student_mean_gap = ln2 * s.student_gap * student_inverse[g];
    R forward{}, reverse{};
    if (!single) {
      forward = s.student_sum == 0 ? infinite : ln2 * s.teacher_gap * teacher_inverse - log_ratio;
      forward = s.teacher_sum == 0 ? R{} : forward;
      reverse = s.teacher_sum == 0 ? infinite : log_ratio - student_mean_gap;
      reverse = s.student_sum == 0 ? R{} : reverse;
    }
    const KlWeights weights = single ? KlWeights{0, 0} : term.group[g];
    result.loss += weighed(weights, forward, reverse);
    result.parts[1 + g] = scale * weighed(term.group_part[g], forward, reverse);
    result.group[g].student = slope * student_inverse[g] * weighed(weights, one, student_mean_gap);
    result.group[g].tilt = -slope * ln2 * Number<R>(weights.reverse) * student_inverse[g];
    result.group[g].teacher = slope * Number<R>(weights.forward) * teacher_inverse;
  }
  result.parts[0] = R{};
  if (groups > 1) {
    R log_qs[kMaxGroups], log_qt[kMaxGroups], qs[kMaxGroups], qt[kMaxGroups];
    group_masses(student_lse, groups, qs, log_qs);
    group_masses(teacher_lse, groups, qt, log_qt);
    const bool reversed = term.mass.reverse != 0 || term.mass_part.reverse != 0;
    R forward{}, reverse{};
    for (int g = 0; g < groups; ++g) {
      forward += qt[g] == 0 ? R{} : qt[g] * (log_qt[g] - log_qs[g]);
      if (reversed) reverse += qs[g] == 0 ? R{} : qs[g] * (log_qs[g] - log_qt[g]);
    }
    for (int g = 0; g < groups; ++g) {
      // qs_g * (L_g - KL) with L = log qs - log qt, as a sum of differences: nothing large cancels where a group holds
      // nearly all the mass.
      R reverse_pull{};
      for (int h = 0; h < groups && reversed; ++h) {
        const R weight = qs[g] * qs[h];
        const R difference = (log_qs[g] - log_qt[g]) - (log_qs[h] - log_qt[h]);
        reverse_pull += weight == 0 ? R{} : weight * difference;
      }
      result.group[g].student += slope * student_inverse[g] * weighed(term.mass, qs[g] - qt[g], reverse_pull);
    }
    result.loss += weighed(term.mass, forward, reverse);
    result.parts[0] = scale * weighed(term.mass_part, forward, reverse);
  }
  result.loss *= scale;
}
