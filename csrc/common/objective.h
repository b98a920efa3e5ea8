// Objectives as the kernels see them: partitions, temperatures and weights. Host and device code; no torch.
#pragma once

#include <cstdint>

#include "softmax_stats.h"

namespace kdk {

constexpr int kMaxTerms = 8;
constexpr int kMaxGroups = 3;

enum class PartitionKind : int { whole = 0, target = 1, topk = 2, top1_topk = 3 };

// Weights, or shares in a reported part, of both directions of the KL.
struct KlWeights {
  double forward = 0;
  double reverse = 0;

  KDK_HOST_DEVICE bool any() const { return forward != 0 || reverse != 0; }
};

// How the classes of a sample split into groups. Selected classes come by rank; all others are the last group, the
// rest.
struct Partition {
  PartitionKind kind;
  int k;
  bool largest;

  KDK_HOST_DEVICE int groups() const {
    return kind == PartitionKind::whole ? 1 : kind == PartitionKind::top1_topk ? 3 : 2;
  }
  KDK_HOST_DEVICE bool by_rank() const { return kind == PartitionKind::topk || kind == PartitionKind::top1_topk; }
  KDK_HOST_DEVICE int selected() const { return kind == PartitionKind::target ? 1 : k; }
  // The ranks of a group of selected classes: [begin, end).
  KDK_HOST_DEVICE int group_begin(int g) const { return kind == PartitionKind::top1_topk && g == 1 ? 1 : 0; }
  KDK_HOST_DEVICE int group_end(int g) const { return kind == PartitionKind::top1_topk && g == 0 ? 1 : selected(); }
  KDK_HOST_DEVICE int64_t group_size(int g, int64_t classes) const {
    return g < groups() - 1 ? group_end(g) - group_begin(g) : classes - selected();
  }
  KDK_HOST_DEVICE bool operator==(const Partition& other) const {
    return kind == other.kind && k == other.k && largest == other.largest;
  }
};

// One term of an objective; kdkernels/objective.py documents and encodes it.
struct Term {
  double scale;         // T^2, or 1
  KlWeights mass_part;  // shares of the directions in the reported parts
  KlWeights group_part[kMaxGroups];
  int sweep;  // the sweep that serves it
};

// What one pass over the classes serves: all terms with one partition and one temperature. Divergences are linear in
// their weights, so those of the terms add up.
struct Sweep {
  Partition partition;
  double temperature;
  KlWeights mass;  // times T^2 and the weight of all terms
  KlWeights group[kMaxGroups];
  bool reverse;  // whether student_ratio is wanted, for a loss or a part

  KDK_HOST_DEVICE float inv_t() const { return static_cast<float>(kLog2E / temperature); }
  KDK_HOST_DEVICE int groups() const { return partition.groups(); }
  // Whether the gradient of a group's classes depends on each one's own gap.
  KDK_HOST_DEVICE bool tilted(int g) const { return group[g].reverse != 0; }
};

enum class Standardize : int { none = 0, by_class = 1, by_sample = 2 };

struct Objective {
  double ce_weight;
  Standardize standardize;
  double correction;
  double eps;
  int terms;
  Term term[kMaxTerms];
  int sweeps;
  Sweep sweep[kMaxTerms];

  KDK_HOST_DEVICE int parts() const {
    int count = 1;
    for (int t = 0; t < terms; ++t) count += 1 + sweep[term[t].sweep].groups();
    return count;
  }
  KDK_HOST_DEVICE bool has_ce() const { return ce_weight != 0; }
  // Whether the cross entropy's softmax is a sum of the first sweep; else the terms see other logits than it does.
  KDK_HOST_DEVICE bool ce_in_sweep() const { return has_ce() && standardize == Standardize::none; }
  // Whether a sample's target is one of the classes, not only a mark of samples to ignore.
  KDK_HOST_DEVICE bool has_target() const {
    bool any = has_ce();
    for (int s = 0; s < sweeps; ++s) any = any || sweep[s].partition.kind == PartitionKind::target;
    return any;
  }
  // What a centred logit is multiplied by, from the moments of its class or sample. Without deviation and eps it is
  // next to 0, as the logit is 0, but not 0: a masked class stays at -inf.
  KDK_HOST_DEVICE double inv_std(const Moments<double>& moments) const {
    const double variance = moments.m2 / degrees(moments.count);
    const bool by_class = standardize == Standardize::by_class;
    const double deviation = by_class ? std::sqrt(variance + eps) : std::sqrt(variance) + eps;
    return deviation == 0 ? 1e-30 : 1 / deviation;
  }
  KDK_HOST_DEVICE double degrees(double count) const { return count - correction > 1 ? count - correction : 1; }
};

// Columns of the statistics that REDUCE gives of a sample: for each sweep and group those of GroupStats in their order,
// then, with a cross entropy, the logit of the target, and, where that sees other logits than the terms, its own shift
// and sum.
KDK_HOST_DEVICE int64_t stats_size(const Objective& objective) {
  int64_t size = objective.has_ce() ? (objective.ce_in_sweep() ? 1 : 3) : 0;
  for (int s = 0; s < objective.sweeps; ++s) size += GroupStats<float>::kCount * objective.sweep[s].groups();
  return size;
}

// Classes that are selected by rank, over all sweeps.
KDK_HOST_DEVICE int64_t selected_size(const Objective& objective) {
  int64_t size = 0;
  for (int s = 0; s < objective.sweeps; ++s)
    if (objective.sweep[s].partition.by_rank()) size += objective.sweep[s].partition.k;
  return size;
}

// An objective's structure: standardisation and correction, then of each term kind, k, largest and the first term with
// the same temperature.
constexpr int kStructureHeader = 2, kStructureTerm = 4;
// An objective's numbers: weights of the cross entropy and of all terms, eps, then of each term temperature, scale and
// the weights of the mass and of the groups.
constexpr int kNumbersHeader = 3;

// Reads the structure that Objective.encode() of kdkernels/objective.py gives; false if it is none.
inline bool decode_structure(const int64_t* structure, int64_t count, Objective& objective) {
  objective.terms = static_cast<int>((count - kStructureHeader) / kStructureTerm);
  if (objective.terms < 1 || objective.terms > kMaxTerms) return false;
  if (count != kStructureHeader + static_cast<int64_t>(objective.terms) * kStructureTerm) return false;
  objective.standardize = static_cast<Standardize>(structure[0]);
  objective.correction = static_cast<double>(structure[1]);
  objective.sweeps = 0;
  for (int t = 0; t < objective.terms; ++t) {
    const int64_t* next = structure + kStructureHeader + static_cast<int64_t>(t) * kStructureTerm;
    const Partition partition{static_cast<PartitionKind>(next[0]), static_cast<int>(next[1]), next[2] != 0};
    int first = 0;  // the first term with this partition and temperature
    while (first < t && (next[3] != structure[kStructureHeader + first * kStructureTerm + 3] ||
                         !(objective.sweep[objective.term[first].sweep].partition == partition)))
      ++first;
    objective.term[t].sweep = first < t ? objective.term[first].sweep : objective.sweeps;
    if (first == t) objective.sweep[objective.sweeps++] = {partition, 1, {}, {}, false};
  }
  return true;
}

namespace decoding {

struct Pairs {
  const double* next;
  KlWeights operator()() {
    next += 2;
    return {next[-2], next[-1]};
  }
};

// The share of each direction in a reported part; of the fallback where the part has no weight.
inline KlWeights share(KlWeights weights, KlWeights fallback) {
  const double total = weights.forward + weights.reverse;
  return total == 0 ? fallback : KlWeights{weights.forward / total, weights.reverse / total};
}

inline void add(KlWeights& to, KlWeights weights, double factor) {
  to.forward += factor * weights.forward;
  to.reverse += factor * weights.reverse;
}

// Adds a term's weights to those of its sweep. A group without weight is reported in the direction of the others.
inline void add_term(Term& term, Sweep& sweep, Pairs& pairs, double weight) {
  const KlWeights mass = pairs();
  KlWeights group[kMaxGroups];
  bool forward = false, reverse = false;
  for (int g = 0; g < sweep.groups(); ++g) {
    group[g] = pairs();
    forward = forward || group[g].forward != 0;
    reverse = reverse || group[g].reverse != 0;
  }
  term.mass_part = share(mass, {1, 0});
  add(sweep.mass, mass, term.scale * weight);
  for (int g = 0; g < sweep.groups(); ++g) {
    term.group_part[g] = share(group[g], reverse && !forward ? KlWeights{0, 1} : KlWeights{1, 0});
    add(sweep.group[g], group[g], term.scale * weight);
    sweep.reverse = sweep.reverse || term.group_part[g].reverse != 0;
  }
}

}  // namespace decoding

// Reads the numbers that go with a structure, for so many classes; false if their count does not fit it. Groups of one
// class lose their weights: inside these there is no divergence, and no gap, which may be infinite, is to be looked at.
inline bool decode_numbers(const double* next, int64_t count, int64_t classes, Objective& objective) {
  int64_t expected = kNumbersHeader;
  for (int t = 0; t < objective.terms; ++t) expected += 2 + 2 * (1 + objective.sweep[objective.term[t].sweep].groups());
  if (count != expected) return false;
  objective.ce_weight = next[0];
  const double weight = next[1];
  objective.eps = next[2];
  decoding::Pairs pairs{next + kNumbersHeader};
  for (int t = 0; t < objective.terms; ++t) {
    Term& term = objective.term[t];
    Sweep& sweep = objective.sweep[term.sweep];
    const KlWeights header = pairs();
    sweep.temperature = header.forward;
    term.scale = header.reverse;
    decoding::add_term(term, sweep, pairs, weight);
    for (int g = 0; g < sweep.groups(); ++g)
      if (sweep.partition.group_size(g, classes) == 1) sweep.group[g] = {};
  }
  return true;
}

}  // namespace kdk
