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
  // On the way: logsumexps of the groups, and the inverse of the student's sums.
  R student_lse[kMaxGroups], teacher_lse[kMaxGroups], student_inverse[kMaxGroups];

  KDK_HOST_DEVICE void set_level(int, R, R) {}
  KDK_HOST_DEVICE void add_level(int, R) {}
};

// The same for gaps that are counted from the student's mean gap (as in stats.h): that mean, and what remains of the
// student's coefficients then.
template <class R>
struct CentredTermResult : TermResult<R> {
  R student_level[kMaxGroups], mean_gap[kMaxGroups];

  KDK_HOST_DEVICE void set_level(int g, R level, R mean) { student_level[g] = level, mean_gap[g] = mean; }
  KDK_HOST_DEVICE void add_level(int g, R level) { student_level[g] += level; }
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
template <class R, int kGroups>
struct Masses {
  R mass[kGroups], log[kGroups];
};
template <int kGroups, class R>
KDK_HOST_DEVICE Masses<R, kGroups> group_masses(const R* logsumexp) {
  Masses<R, kGroups> of;
  if constexpr (kGroups == 2) {  // one exponential less
    const R lead = logsumexp[1] - logsumexp[0], lower = lead > 0 ? -lead : lead;
    const R ratio = exp(lower), log_total = log1p(ratio), share = inverse(1 + ratio), minor = ratio * share;
    of.mass[0] = lead > 0 ? minor : share;
    of.mass[1] = lead > 0 ? share : minor;
    of.log[0] = (lead > 0 ? lower : R{}) - log_total;
    of.log[1] = (lead > 0 ? R{} : lower) - log_total;
    return of;
  }
  R largest = logsumexp[0];
  for (int g = 1; g < kGroups; ++g) largest = logsumexp[g] > largest ? logsumexp[g] : largest;
  R others{}, seen{};  // the sum without the first of the largest, which is exactly 1
  for (int g = 0; g < kGroups; ++g) {
    of.mass[g] = exp(logsumexp[g] - largest);
    const R first = logsumexp[g] == largest ? 1 - seen : R{};
    others += first == 1 ? R{} : of.mass[g];
    seen += first;
  }
  const R log_total = log1p(others), share = inverse(1 + others);
  for (int g = 0; g < kGroups; ++g) {
    of.mass[g] *= share;
    of.log[g] = (logsumexp[g] - largest) - log_total;
  }
  return of;
}

// Adds the divergence of the groups' masses to a term's result.
template <int kGroups, template <class> class Result, class R>
KDK_HOST_DEVICE void add_masses(const Term& term, Result<R>& result) {
  const Number<R> scale = term.scale, slope = term.slope;
  const Masses<R, kGroups> student = group_masses<kGroups>(result.student_lse);
  const Masses<R, kGroups> teacher = group_masses<kGroups>(result.teacher_lse);
  const R *qs = student.mass, *qt = teacher.mass, *log_qs = student.log, *log_qt = teacher.log;
  const bool reversed = term.mass.reverse != 0 || term.mass_part.reverse != 0;
  R forward{}, reverse{};
  for (int g = 0; g < kGroups; ++g) {
    forward += qt[g] == 0 ? R{} : qt[g] * (log_qt[g] - log_qs[g]);
    if (reversed) reverse += qs[g] == 0 ? R{} : qs[g] * (log_qs[g] - log_qt[g]);
  }
  for (int g = 0; g < kGroups; ++g) {
    // qs_g * (L_g - KL) with L = log qs - log qt, as a sum of differences: nothing large cancels where a group holds
    // nearly all the mass.
    R reverse_pull{};
    for (int h = 0; h < kGroups && reversed; ++h) {
      const R weight = qs[g] * qs[h];
      const R difference = (log_qs[g] - log_qt[g]) - (log_qs[h] - log_qt[h]);
      reverse_pull += weight == 0 ? R{} : weight * difference;
    }
    const R pull = slope * result.student_inverse[g] * weighed(term.mass, qs[g] - qt[g], reverse_pull);
    result.group[g].student += pull;
    result.add_level(g, pull);
  }
  result.loss += weighed(term.mass, forward, reverse);
  result.parts[0] = scale * weighed(term.mass_part, forward, reverse);
}

// Group `g` of a term, whose results are to be at `slot`. `unit` is that of the origins (see stats.h).
// Inside a group of a single one of the classes there is no divergence, and its sums are single_sum() of stats.h.
template <template <class> class Result, class R>
KDK_HOST_DEVICE void evaluate_group(const Term& term, int g, const GroupStats<R>& s, int64_t classes, Number<R> unit,
                                    Result<R>& result, int slot) {
  const Number<R> scale = term.scale, slope = term.slope, ln2 = kLn2;
  const Number<R> nats = ln2 * unit;
  const R one = R{} + 1, infinite = R{} + INFINITY;
  // start() of stats.h for an R that may be a vector: that function is not built for the kernels' instruction set.
  const R student_start = s.student_origin == -INFINITY ? R{} : s.student_origin;
  const R teacher_start = s.teacher_origin == -INFINITY ? R{} : s.teacher_origin;
  // Of a single class the sum is its own inverse, its logarithm is 0, and there is no divergence.
  R student_inverse = s.student_sum, teacher_inverse = s.teacher_sum;
  R student_log = s.student_sum - s.student_sum, teacher_log = s.teacher_sum - s.teacher_sum;
  R forward{}, reverse{}, student_mean_gap{};
  KlWeights weights{0, 0};
  if (term.group_size(g, classes) != 1) {
    student_inverse = s.student_sum == 0 ? R{} : inverse(s.student_sum);
    teacher_inverse = s.teacher_sum == 0 ? R{} : inverse(s.teacher_sum);
    student_log = log(s.student_sum == 0 ? one : s.student_sum);
    teacher_log = log(s.teacher_sum == 0 ? one : s.teacher_sum);
    const R log_ratio = teacher_log - student_log;
    student_mean_gap = ln2 * s.student_gap * student_inverse;
    forward = s.student_sum == 0 ? infinite : ln2 * s.teacher_gap * teacher_inverse - log_ratio;
    forward = s.teacher_sum == 0 ? R{} : forward;
    reverse = s.teacher_sum == 0 ? infinite : log_ratio - student_mean_gap;
    reverse = s.student_sum == 0 ? R{} : reverse;
    weights = term.group[g];
  }
  result.student_lse[slot] = s.student_sum == 0 ? -infinite : student_start * nats + student_log;
  result.teacher_lse[slot] = s.teacher_sum == 0 ? -infinite : teacher_start * nats + teacher_log;
  result.student_inverse[slot] = student_inverse;
  result.loss += weighed(weights, forward, reverse);
  result.parts[1 + slot] = scale * weighed(term.group_part[g], forward, reverse);
  const R pull = s.teacher_sum == 0 ? R{} : one;  // of a teacher that masks the whole group the forward KL is 0
  result.group[slot].student = slope * student_inverse * weighed(weights, pull, student_mean_gap);
  result.set_level(slot, slope * Number<R>(weights.forward) * student_inverse * pull, s.student_gap * student_inverse);
  result.group[slot].tilt = -slope * ln2 * Number<R>(weights.reverse) * student_inverse;
  result.group[slot].teacher = slope * Number<R>(weights.forward) * teacher_inverse;
}

// One term of at most `kMostGroups` groups.
template <int kMostGroups = kMaxGroups, template <class> class Result, class R>
KDK_HOST_DEVICE void evaluate(const Term& term, const GroupStats<R>* stats, int64_t classes, Number<R> unit,
                              Result<R>& result) {
  const int groups = term.groups();
  result.loss = R{};
  KDK_ONE_BY_ONE
  for (int g = 0; g < groups; ++g) evaluate_group(term, g, stats[g], classes, unit, result, g);
  result.parts[0] = R{};
  if (groups == 2) add_masses<2>(term, result);
  if (kMostGroups > 2 && groups == 3) add_masses<3>(term, result);
  result.loss *= Number<R>(term.scale);
}
