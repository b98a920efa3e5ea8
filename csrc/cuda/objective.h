// Objectives as the kernels see them: partitions, temperatures and weights. Host and device code; no torch.
#pragma once

#include <cstdint>

#include "stats.h"

namespace kdk::cuda {

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
  double slope;  // scale / temperature: of a divergence in the logits
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
  // How many of the classes a group has.
  KDK_HOST_DEVICE int64_t group_size(int g, int64_t classes) const {
    return g < groups() - 1 ? group_end(g) - group_begin(g) : classes - (groups() == 1 ? 0 : leads());
  }
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
  // The same of the last group.
  KDK_HOST_DEVICE bool tilted_rest() const { return group[groups() - 1].reverse != 0; }
};

enum class Standardize : int { none = 0, by_class = 1, by_sample = 2 };

struct Objective {
  double ce_weight;
  Standardize standardize;
  double correction;
  double eps;
  int terms;
  Term term[kMaxTerms];

  KDK_HOST_DEVICE int parts() const {
    int count = 1;
    for (int t = 0; t < terms; ++t) count += term[t].parts();
    return count;
  }
  KDK_HOST_DEVICE bool has_ce() const { return ce_weight != 0; }
  // Whether a sample's target is one of the classes, not only a mark of samples to ignore.
  KDK_HOST_DEVICE bool has_target() const {
    bool any = has_ce();
    for (int t = 0; t < terms; ++t) any = any || term[t].kind == PartitionKind::target;
    return any;
  }
  // The cross entropy's weight in the gradient: of one class it has none, whatever is rounded.
  KDK_HOST_DEVICE double ce_slope(int64_t classes) const { return classes > 1 ? ce_weight : 0; }
  // Of two terms.
  KDK_HOST_DEVICE bool same_groups() const {
    return term[0].kind == term[1].kind && term[0].k == term[1].k && term[0].largest == term[1].largest;
  }

  // What a centred logit is multiplied by, from the moments of its class or sample. Without deviation and eps it is
  // next to 0, as the logit is 0, but not 0: a masked class stays at -inf.
  KDK_HOST_DEVICE double factor(double count, double m2) const {
    const double variance = m2 / degrees(count);
    const bool by_class = standardize == Standardize::by_class;
    const double deviation = by_class ? std::sqrt(variance + eps) : std::sqrt(variance) + eps;
    return deviation == 0 ? 1e-30 : 1 / deviation;
  }
  KDK_HOST_DEVICE double degrees(double count) const { return count - correction > 1 ? count - correction : 1; }
};

// Numbers that a sample's gradient needs besides the logits: its weight, the cross entropy's maximum and inverse sum,
// for each group of each term both origins and the coefficients (the last of them is the CPU's only), and what
// standardises the sample.
KDK_HOST_DEVICE int64_t saved_size(const Objective& objective) {
  int64_t size = objective.standardize == Standardize::by_sample ? 3 + 7 : 3;
  for (int t = 0; t < objective.terms; ++t) size += 6 * objective.term[t].groups();
  return size;
}

KDK_HOST_DEVICE int64_t members_size(const Objective& objective) {
  int64_t size = 0;
  for (int t = 0; t < objective.terms; ++t)
    if (objective.term[t].by_rank()) size += objective.term[t].k;
  return size;
}

// An objective's structure: standardisation and correction, then of each term kind, k, largest and whether it has the
// first term's temperature.
constexpr int kStructureHeader = 2, kStructureTerm = 4;
// An objective's numbers: weights of the cross entropy and of all terms, eps, then of each term temperature, scale and
// the weights of the mass and of the groups.
constexpr int kNumbersHeader = 3;
KDK_HOST_DEVICE int64_t numbers_of(const Term& term) { return 2 + 2 * (1 + term.groups()); }

// Reads the structure that Objective.encode() of kdkernels/objective.py gives; false if it is none.
inline bool decode_structure(const int64_t* structure, int64_t count, Objective& objective) {
  objective.terms = static_cast<int>((count - kStructureHeader) / kStructureTerm);
  if (objective.terms < 1 || objective.terms > kMaxTerms) return false;
  if (count != kStructureHeader + static_cast<int64_t>(objective.terms) * kStructureTerm) return false;
  objective.standardize = static_cast<Standardize>(structure[0]);
  objective.correction = static_cast<double>(structure[1]);
  for (int t = 0; t < objective.terms; ++t) {
    const int64_t* next = structure + kStructureHeader + static_cast<int64_t>(t) * kStructureTerm;
    Term& term = objective.term[t];
    term.kind = static_cast<PartitionKind>(next[0]);
    term.k = static_cast<int>(next[1]);
    term.largest = next[2] != 0;
  }
  return true;
}

// The share of each direction in a reported part; of the fallback where the part has no weight.
inline KlWeights share(KlWeights weights, KlWeights fallback) {
  const double total = weights.forward + weights.reverse;
  return total == 0 ? fallback : KlWeights{weights.forward / total, weights.reverse / total};
}

// Multiplies a term's weights; its parts, which are reported without weight, keep their shares. A group without weight
// is reported in the direction of the others.
inline void weigh(Term& term, double weight) {
  bool forward = false, reverse = false;
  for (int g = 0; g < term.groups(); ++g) {
    forward = forward || term.group[g].forward != 0;
    reverse = reverse || term.group[g].reverse != 0;
  }
  const auto times = [weight](KlWeights& pair) { pair = {weight * pair.forward, weight * pair.reverse}; };
  term.mass_part = share(term.mass, {1, 0});
  times(term.mass);
  for (int g = 0; g < term.groups(); ++g) {
    term.group_part[g] = share(term.group[g], reverse && !forward ? KlWeights{0, 1} : KlWeights{1, 0});
    times(term.group[g]);
  }
}

// Takes the weights from groups of one of the classes: inside these there is no divergence, and no gap, which may be
// infinite, is to be looked at.
inline void drop_single_groups(Objective& objective, int64_t classes) {
  for (int t = 0; t < objective.terms; ++t) {
    Term& term = objective.term[t];
    for (int g = 0; g < term.groups(); ++g)
      if (term.group_size(g, classes) == 1) term.group[g] = {0, 0};
  }
}

// Reads the numbers that go with a structure; false if their count does not fit it.
inline bool decode_numbers(const double* next, int64_t count, Objective& objective) {
  int64_t expected = kNumbersHeader;
  for (int t = 0; t < objective.terms; ++t) expected += numbers_of(objective.term[t]);
  if (count != expected) return false;
  const auto pair = [&next] {
    const KlWeights weights{next[0], next[1]};
    next += 2;
    return weights;
  };
  objective.ce_weight = *next++;
  const double weight = *next++;
  objective.eps = *next++;
  for (int t = 0; t < objective.terms; ++t) {
    Term& term = objective.term[t];
    term.temperature = *next++;
    term.scale = *next++;
    term.slope = term.scale / term.temperature;
    term.mass = pair();
    for (int g = 0; g < term.groups(); ++g) term.group[g] = pair();
    weigh(term, weight);
  }
  return true;
}

}  // namespace kdk::cuda
