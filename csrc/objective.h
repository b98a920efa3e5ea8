// Step 2 of every loss: group statistics and weights in, loss parts and gradient coefficients out.
//
// The only native code that knows of KL directions and weights. Host and device code; no torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "stats.h"

namespace kdk {

constexpr int kMaxTerms = 2;
constexpr int kMaxGroups = 3;

enum class PartitionKind : int { whole = 0, target = 1, topk = 2, top1_topk = 3 };

struct KlWeights {
  double forward;
  double reverse;
};

// One term of an objective; kdkernels/objective.py documents and encodes it.
struct Term {
  PartitionKind kind;
  int k;
  bool largest;
  double temperature;
  double scale;
  KlWeights mass;
  KlWeights group[kMaxGroups];
  KlWeights mass_part;
  KlWeights group_part[kMaxGroups];

  KDK_HOST_DEVICE int groups() const {
    return kind == PartitionKind::whole ? 1 : kind == PartitionKind::top1_topk ? 3 : 2;
  }
  KDK_HOST_DEVICE bool by_rank() const { return kind == PartitionKind::topk || kind == PartitionKind::top1_topk; }
  // How many classes lead; all others are the last group.
  KDK_HOST_DEVICE int leads() const { return kind == PartitionKind::target ? 1 : k; }
  // Leading classes come by rank: the group of the one at `rank`.
  KDK_HOST_DEVICE int lead_group(int rank) const { return kind == PartitionKind::top1_topk && rank > 0 ? 1 : 0; }
  KDK_HOST_DEVICE int group_begin(int g) const { return kind == PartitionKind::top1_topk && g == 1 ? 1 : 0; }
  KDK_HOST_DEVICE int group_end(int g) const { return kind == PartitionKind::top1_topk && g == 0 ? 1 : leads(); }
  KDK_HOST_DEVICE double exponent() const { return kLog2E / temperature; }
  KDK_HOST_DEVICE int parts() const { return 1 + groups(); }

  KDK_HOST_DEVICE bool wants_forward() const {
    for (int g = 0; g < groups(); ++g)
      if (group[g].forward != 0 || group_part[g].forward != 0) return true;
    return false;
  }
  KDK_HOST_DEVICE bool wants_reverse() const {
    for (int g = 0; g < groups(); ++g)
      if (group[g].reverse != 0 || group_part[g].reverse != 0) return true;
    return false;
  }
  // Whether the gradient depends on each class's own gap.
  KDK_HOST_DEVICE bool tilted() const {
    for (int g = 0; g < groups(); ++g)
      if (group[g].reverse != 0) return true;
    return false;
  }
};

struct Objective {
  double ce_weight;
  int terms;
  Term term[kMaxTerms];

  int parts() const {
    int count = 1;
    for (int t = 0; t < terms; ++t) count += term[t].parts();
    return count;
  }
  bool has_ce() const { return ce_weight != 0; }
};

// Numbers of one encoded term: kind, k, largest, temperature, scale, mass, groups, mass part, group parts.
constexpr int kEncodedTerm = 5 + 2 + 2 * kMaxGroups + 2 + 2 * kMaxGroups;

// Reads what Objective.encode() of kdkernels/objective.py wrote; false if the length does not fit.
inline bool decode(const double* numbers, int64_t count, Objective& objective) {
  objective.terms = static_cast<int>((count - 1) / kEncodedTerm);
  if (count < 1 || objective.terms < 1 || objective.terms > kMaxTerms) return false;
  if (count != 1 + static_cast<int64_t>(objective.terms) * kEncodedTerm) return false;
  const double* next = numbers;
  const auto weights = [&next] {
    const KlWeights pair{next[0], next[1]};
    next += 2;
    return pair;
  };
  objective.ce_weight = *next++;
  for (int t = 0; t < objective.terms; ++t) {
    Term& term = objective.term[t];
    term.kind = static_cast<PartitionKind>(static_cast<int>(*next++));
    term.k = static_cast<int>(*next++);
    term.largest = *next++ != 0;
    term.temperature = *next++;
    term.scale = *next++;
    term.mass = weights();
    for (KlWeights& pair : term.group) pair = weights();
    term.mass_part = weights();
    for (KlWeights& pair : term.group_part) pair = weights();
  }
  return true;
}

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

template <class R>
KDK_HOST_DEVICE R weighed(double weight, R value) {
  return weight == 0 ? R(0) : R(weight) * value;  // a direction without weight drops out even where it is infinite
}

// Masses of the groups and their logarithms: softmax over logsumexps. Exact where one group holds nearly everything.
template <class R>
KDK_HOST_DEVICE void group_masses(const R* logsumexp, int groups, R* mass, R* log_mass) {
  int largest = 0;
  for (int g = 1; g < groups; ++g)
    if (logsumexp[g] > logsumexp[largest]) largest = g;
  R others = 0;
  for (int g = 0; g < groups; ++g) {
    mass[g] = g == largest ? R(1) : std::exp(logsumexp[g] - logsumexp[largest]);
    if (g != largest) others += mass[g];
  }
  const R log_total = std::log1p(others);
  for (int g = 0; g < groups; ++g) {
    mass[g] /= 1 + others;
    log_mass[g] = (logsumexp[g] - logsumexp[largest]) - log_total;
  }
}

// One term of one sample. `sizes` are the groups' class counts: inside a single class there is no divergence.
template <class R>
KDK_HOST_DEVICE void evaluate(const Term& term, const GroupStats<R>* stats, const int64_t* sizes,
                              TermResult<R>& result) {
  const int groups = term.groups();
  const R slope = R(term.scale / term.temperature);
  R student_lse[kMaxGroups], teacher_lse[kMaxGroups];
  R total = 0;
  for (int g = 0; g < groups; ++g) {
    const GroupStats<R>& s = stats[g];
    const bool student_empty = s.student_sum == 0, teacher_empty = s.teacher_sum == 0;
    const R student_log = s.student_sum == 1 ? R(0) : std::log(s.student_sum);
    const R teacher_log = s.teacher_sum == 1 ? R(0) : std::log(s.teacher_sum);
    student_lse[g] = student_empty ? R(-INFINITY) : origin(s.student_max) / R(term.temperature) + student_log;
    teacher_lse[g] = teacher_empty ? R(-INFINITY) : origin(s.teacher_max) / R(term.temperature) + teacher_log;
    const R log_ratio = teacher_log - student_log;
    const R student_inverse = student_empty ? R(0) : R(1) / s.student_sum;
    const R teacher_inverse = teacher_empty ? R(0) : R(1) / s.teacher_sum;
    const R student_mean_gap = R(kLn2) * s.student_gap * student_inverse;
    const R teacher_mean_gap = R(kLn2) * s.teacher_gap * teacher_inverse;
    const bool single = sizes[g] == 1;
    const KlWeights weight = single ? KlWeights{0, 0} : term.group[g];
    R forward = 0, reverse = 0;
    if (!single && !teacher_empty) forward = student_empty ? R(INFINITY) : teacher_mean_gap - log_ratio;
    if (!single && !student_empty) reverse = teacher_empty ? R(INFINITY) : log_ratio - student_mean_gap;
    total += weighed(weight.forward, forward) + weighed(weight.reverse, reverse);
    result.parts[1 + g] =
        R(term.scale) * (weighed(term.group_part[g].forward, forward) + weighed(term.group_part[g].reverse, reverse));
    GroupCoefficients<R>& out = result.group[g];
    out.student = slope * student_inverse * (R(weight.forward) + weighed(weight.reverse, student_mean_gap));
    out.tilt = -slope * student_inverse * R(weight.reverse) * R(kLn2);
    out.teacher = slope * teacher_inverse * R(weight.forward);
  }
  result.parts[0] = 0;
  if (groups > 1) {
    R log_qs[kMaxGroups], log_qt[kMaxGroups], qs[kMaxGroups], qt[kMaxGroups];
    group_masses(student_lse, groups, qs, log_qs);
    group_masses(teacher_lse, groups, qt, log_qt);
    R forward = 0, reverse = 0;
    for (int g = 0; g < groups; ++g) {
      if (qt[g] != 0) forward += qt[g] * (log_qt[g] - log_qs[g]);
      if (qs[g] != 0) reverse += qs[g] * (log_qs[g] - log_qt[g]);
    }
    for (int g = 0; g < groups; ++g) {
      R pull = weighed(term.mass.forward, qs[g] - qt[g]);
      if (term.mass.reverse != 0 && qs[g] != 0) pull += R(term.mass.reverse) * qs[g] * ((log_qs[g] - log_qt[g]) - reverse);
      if (stats[g].student_sum != 0) result.group[g].student += slope * pull / stats[g].student_sum;
    }
    total += weighed(term.mass.forward, forward) + weighed(term.mass.reverse, reverse);
    result.parts[0] =
        R(term.scale) * (weighed(term.mass_part.forward, forward) + weighed(term.mass_part.reverse, reverse));
  }
  result.loss = R(term.scale) * total;
}

}  // namespace kdk
