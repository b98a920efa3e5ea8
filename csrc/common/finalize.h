// FINALIZE: statistics and weights in; loss, parts and the gradient's coefficients out. The only native code that knows
// of losses. Host and device code; no torch.
//
// It is free of branches on statistics, so that a value R may be a number or a SIMD vector with a sample in each lane.
// `M` has the functions of R: exp, log, log1p.
#pragma once

#include "divergence.h"
#include "objective.h"

namespace kdk {

// The gradient in a class's logit:
//   es * (student + log_ratio * (gap - mean_gap)) - et * teacher + e^(s - student_shift) * ce
// Gaps count from their mean: where one class is sure, nothing else is left of large ones.
template <class R>
struct Coefficients {
  R student{}, log_ratio{}, mean_gap{}, teacher{}, ce{};

  static constexpr int kCount = 5;
};

template <class R>
struct SweepResult {
  R loss{};
  KDK_HOST_DEVICE R part(KlWeights share, int i) const { return weighed(share, forward[i], reverse[i]); }

  Coefficients<R> group[kMaxGroups];
  R forward[1 + kMaxGroups], reverse[1 + kMaxGroups];  // the KLs of the masses, then of the groups

  // Both directions by their weights; one without weight drops out even where it is infinite.
  static KDK_HOST_DEVICE R weighed(const KlWeights& weights, R forward, R reverse) {
    R sum{};
    if (weights.forward != 0) sum += static_cast<float>(weights.forward) * forward;
    if (weights.reverse != 0) sum += static_cast<float>(weights.reverse) * reverse;
    return sum;
  }
};

// Masses of the groups and their logarithms: softmax over logsumexps. Exact where one group holds nearly everything.
template <class R>
struct Masses {
  R mass[kMaxGroups], log_mass[kMaxGroups];
};
template <class M, class R>
KDK_HOST_DEVICE Masses<R> group_masses(const R* logsumexp, int groups) {
  R largest = logsumexp[0];
  for (int g = 1; g < groups; ++g) largest = logsumexp[g] > largest ? logsumexp[g] : largest;
  Masses<R> of;
  R others{}, seen{};  // the sum without the first of the largest, which is exactly 1
  for (int g = 0; g < groups; ++g) {
    of.mass[g] = M::exp(logsumexp[g] - largest);
    const R first = logsumexp[g] == largest ? 1 - seen : R{};
    others += first == 1 ? R{} : of.mass[g];
    seen += first;
  }
  const R log_total = M::log1p(others), share = 1 / (1 + others);
  for (int g = 0; g < groups; ++g) {
    of.mass[g] *= share;
    of.log_mass[g] = (logsumexp[g] - largest) - log_total;
  }
  return of;
}

// The largest of the groups' shifts on one side; 0 where all are -inf. Masses depend on differences only: taken first,
// they are exact however large the logits are.
template <class R>
KDK_HOST_DEVICE R top_shift(const GroupStats<R>* stats, int groups, R GroupStats<R>::* shift) {
  R top = stats[0].*shift;
  for (int g = 1; g < groups; ++g) top = stats[g].*shift > top ? stats[g].*shift : top;
  return top - top == 0 ? top : R{};
}

// Adds the divergence of the groups' masses.
template <class M, class R>
KDK_HOST_DEVICE void add_masses(const Sweep& sweep, const R* student_lse, const R* teacher_lse, const GroupKl<R>* kl,
                                SweepResult<R>& result) {
  const int groups = sweep.groups();
  const float slope = static_cast<float>(1 / sweep.temperature);
  const Masses<R> student = group_masses<M>(student_lse, groups), teacher = group_masses<M>(teacher_lse, groups);
  const R *q = student.mass, *p = teacher.mass;
  R log_ratio[kMaxGroups], forward{}, reverse{};
  const R infinite = R{} + INFINITY;
  for (int g = 0; g < groups; ++g) {
    log_ratio[g] = teacher.log_mass[g] - student.log_mass[g];
    forward += ForwardKl::phi(p[g], q[g], log_ratio[g]);
    reverse += ReverseKl::phi(p[g], q[g], log_ratio[g]);
    // A group that one side alone masks, however little the other has: its mass may underflow.
    const R student_only = kl[g].inv_teacher_sum == 0 ? infinite : R{};
    const R teacher_only = kl[g].inv_student_sum == 0 ? infinite : R{};
    reverse += kl[g].inv_student_sum == 0 ? R{} : student_only;
    forward += kl[g].inv_teacher_sum == 0 ? R{} : teacher_only;
  }
  for (int g = 0; g < groups; ++g) {
    // psi_g - q_g * sum of psi, as a sum of differences: nothing large cancels where a group holds nearly all the mass.
    R reverse_pull{};
    for (int h = 0; h < groups && sweep.mass.reverse != 0; ++h) {
      const R weight = q[g] * q[h];
      reverse_pull += weight == 0 ? R{} : weight * (log_ratio[h] - log_ratio[g]);
    }
    result.group[g].student +=
        slope * kl[g].inv_student_sum * SweepResult<R>::weighed(sweep.mass, q[g] - p[g], reverse_pull);
  }
  result.forward[0] = forward;
  result.reverse[0] = reverse;
  result.loss += SweepResult<R>::weighed(sweep.mass, forward, reverse);
}

// A sweep of one sample, or of one a lane, from the statistics of its groups.
template <class M, class R>
KDK_HOST_DEVICE SweepResult<R> finalize(const Sweep& sweep, const GroupStats<R>* stats, int64_t classes) {
  const int groups = sweep.groups();
  const R student_top = top_shift(stats, groups, &GroupStats<R>::student_shift);
  const R teacher_top = top_shift(stats, groups, &GroupStats<R>::teacher_shift);
  const R infinite = R{} + INFINITY;
  const float slope = static_cast<float>(1 / sweep.temperature);
  SweepResult<R> result;
  GroupKl<R> kl[kMaxGroups];
  R student_lse[kMaxGroups], teacher_lse[kMaxGroups];
  for (int g = 0; g < groups; ++g) {
    const GroupStats<R>& s = stats[g];
    const KlWeights& weights = sweep.group[g];
    const bool single = sweep.partition.group_size(g, classes) == 1;
    kl[g] = single ? single_kl(s) : group_kl<M>(s, slope);
    const float forward = static_cast<float>(weights.forward) * slope;
    result.group[g].student = forward * kl[g].inv_student_sum * kl[g].forward_pull;
    result.group[g].teacher = forward * kl[g].inv_teacher_sum;
    result.group[g].log_ratio = -slope * slope * static_cast<float>(weights.reverse) * kl[g].inv_student_sum;
    result.group[g].mean_gap = kl[g].mean_gap;
    result.forward[1 + g] = kl[g].forward;
    result.reverse[1 + g] = kl[g].reverse;
    result.loss += SweepResult<R>::weighed(weights, kl[g].forward, kl[g].reverse);
    student_lse[g] = s.student_sum == 0 ? -infinite : (s.student_shift - student_top) * slope + kl[g].log_student_sum;
    teacher_lse[g] = s.teacher_sum == 0 ? -infinite : (s.teacher_shift - teacher_top) * slope + kl[g].log_teacher_sum;
  }
  result.forward[0] = result.reverse[0] = R{};
  if (groups > 1) add_masses<M>(sweep, student_lse, teacher_lse, kl, result);
  return result;
}

// The cross entropy of a sample from sums of its classes: of all of them, or of each group of a sweep.
template <class R>
struct CrossEntropy {
  R loss;
  R coefficient[kMaxGroups];  // of each group: 1 / (sum of all exponentials, shifted as the group's are)
};
template <class M, class R>
KDK_HOST_DEVICE CrossEntropy<R> cross_entropy(const GroupStats<R>* stats, int groups, R target_logit) {
  const R top = top_shift(stats, groups, &GroupStats<R>::student_shift);
  R factor[kMaxGroups], total{};
  for (int g = 0; g < groups; ++g) {
    const R shift = stats[g].student_shift;
    factor[g] = shift == -INFINITY ? R{} : M::exp(shift - top);
    total += factor[g] * stats[g].ce_sum;
  }
  CrossEntropy<R> ce;
  ce.loss = M::log(total) - (target_logit - top);
  for (int g = 0; g < groups; ++g) ce.coefficient[g] = factor[g] / total;
  return ce;
}

}  // namespace kdk
