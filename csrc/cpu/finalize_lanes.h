// FINALIZE for samples side by side, one a lane: between the statistics and coefficients of a few samples in memory,
// column by column (see stats_size and coefficients_size).
#pragma once

#include "apply.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kGroupColumns = GroupStats<float>::kCount;  // of the coefficients, too: two shifts and five of them
static_assert(kGroupColumns == 2 + Coefficients<float>::kCount);

// Where columns are: column c of lane i is at data[c * pitch + i].
struct Columns {
  float* data;
  int pitch;

  float* operator[](int64_t column) const { return data + column * pitch; }
};

// Statistics of some samples, and what becomes of them. `values`: the loss, the cross entropy, then of each term the
// parts; without weights.
struct SampleLanes {
  Columns stats, coefficients, values;
  float* weight;

  // For so many samples, in a buffer.
  static SampleLanes in(Buffer<float>& buffer, const Objective& o, int lanes) {
    const int64_t stats = stats_size(o) * lanes, coefficients = coefficients_size(o) * lanes;
    float* data = buffer.data(stats + coefficients + (1 + o.parts() + 1) * lanes);
    float* weight = data + stats + coefficients;
    return {{data, lanes}, {data + stats, lanes}, {weight + lanes, lanes}, weight};
  }
};

inline GroupStats<Vec> load_stats(const Columns& stats, int64_t column, int i) {
  const auto at = [&](int c) { return load(stats[column + c] + i); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
}
inline void store_stats(const Columns& stats, int64_t column, int i, const GroupStats<Vec>& from) {
  int c = 0;
  for (const Vec* value : {&from.student_shift, &from.teacher_shift, &from.student_sum, &from.teacher_sum,
                           &from.teacher_ratio, &from.student_ratio, &from.ce_sum})
    store(stats[column + c++] + i, *value);
}
// As single_sum.
inline Vec single_exp(Vec logit) {
  return logit - logit == 0 ? broadcast(1.0f) : logit == -INFINITY ? Vec{} : broadcast(NAN);
}
inline void set_stats(const Columns& stats, int64_t column, int i, const GroupStats<double>& from) {
  int c = 0;
  for (const double value : {from.student_shift, from.teacher_shift, from.student_sum, from.teacher_sum,
                             from.teacher_ratio, from.student_ratio, from.ce_sum})
    stats[column + c++][i] = static_cast<float>(value);
}

// The coefficients of a group of one sample.
inline GroupCoefficients get_coefficients(const Columns& coefficients, int64_t column, int i, float inv_t) {
  const auto at = [&](int c) { return coefficients[column + c][i]; };
  return {at(0), at(1), inv_t, {at(2), at(3), at(4), at(5), at(6)}};
}

class LanesFinalizer {
 public:
  LanesFinalizer(const Objective& objective, int64_t classes, bool parts)
      : o_(objective), classes_(classes), parts_(parts) {}

  // The samples in lanes [i, i + kLanes).
  void run(const SampleLanes& lanes, int i) const {
    Vec loss{}, ce{};
    int64_t column = 0;
    SweepResult<Vec> results[kMaxTerms];
    for (int s = 0; s < o_.sweeps; ++s) {
      const Sweep& sweep = o_.sweep[s];
      GroupStats<Vec> stats[kMaxGroups];
      for (int g = 0; g < sweep.groups(); ++g) stats[g] = load_stats(lanes.stats, column + g * kGroupColumns, i);
      results[s] = finalize<VecMath>(sweep, stats, classes_);
      loss += results[s].loss;
      if (s == 0 && o_.ce_in_sweep()) {
        const Vec target = load(lanes.stats[stats_size(o_) - 1] + i);
        const auto of = cross_entropy<VecMath>(stats, sweep.groups(), target);
        for (int g = 0; g < sweep.groups(); ++g) results[s].group[g].ce = ce_slope() * of.coefficient[g];
        ce = of.loss;
      }
      for (int g = 0; g < sweep.groups(); ++g)
        store_group(lanes, column + g * kGroupColumns, i, stats[g], sweep.tilted(g), results[s].group[g]);
      column += sweep.groups() * kGroupColumns;
    }
    if (o_.has_ce()) {
      if (!o_.ce_in_sweep()) ce = own_softmax(lanes, column, i);
      keep(lanes, column, i, broadcast(-ce_slope()));
      loss += static_cast<float>(o_.ce_weight) * ce;
    }
    store(lanes.coefficients[coefficients_size(o_) - 1] + i, load(lanes.weight + i));
    store(lanes.values[0] + i, loss);
    if (parts_) store_parts(lanes, i, ce, results);
  }

 private:
  // The weight of the cross entropy in the gradient: of one class it has none, whatever is rounded.
  float ce_slope() const { return classes_ > 1 ? static_cast<float>(o_.ce_weight) : 0; }

  // Coefficients of samples that do not count are 0, whatever their logits.
  static void keep(const SampleLanes& lanes, int64_t column, int i, Vec value) {
    const Vec weight = load(lanes.weight + i);
    store(lanes.coefficients[column] + i, weight == 0 ? Vec{} : value * weight);
  }

  static void store_group(const SampleLanes& lanes, int64_t column, int i, const GroupStats<Vec>& stats, bool tilted,
                          const Coefficients<Vec>& by) {
    store(lanes.coefficients[column] + i, stats.student_shift);
    store(lanes.coefficients[column + 1] + i, stats.teacher_shift);
    keep(lanes, column + 2, i, by.student);
    keep(lanes, column + 3, i, tilted ? by.log_ratio : Vec{});
    store(lanes.coefficients[column + 4] + i, tilted ? by.mean_gap : Vec{});
    keep(lanes, column + 5, i, by.teacher);
    keep(lanes, column + 6, i, by.ce);
  }

  // The cross entropy of logits that the terms see standardised: the target's logit, shift and sum are columns.
  Vec own_softmax(const SampleLanes& lanes, int64_t column, int i) const {
    const Vec shift = load(lanes.stats[column + 1] + i), sum = load(lanes.stats[column + 2] + i);
    store(lanes.coefficients[column + 1] + i, shift);
    keep(lanes, column + 2, i, ce_slope() / sum);
    const Vec from = shift == -INFINITY ? Vec{} : shift;
    return VecMath::log(sum) - (load(lanes.stats[column] + i) - from);
  }

  void store_parts(const SampleLanes& lanes, int i, Vec ce, const SweepResult<Vec>* results) const {
    int column = 1;
    store(lanes.values[column++] + i, ce);
    for (int t = 0; t < o_.terms; ++t) {
      const Term& term = o_.term[t];
      const SweepResult<Vec>& result = results[term.sweep];
      for (int part = 0; part <= o_.sweep[term.sweep].groups(); ++part) {
        const KlWeights& share = part == 0 ? term.mass_part : term.group_part[part - 1];
        store(lanes.values[column++] + i, static_cast<float>(term.scale) * result.part(share, part));
      }
    }
  }

  const Objective& o_;
  const int64_t classes_;
  const bool parts_;
};

// Multiplies the weights in a sample's coefficients.
inline void multiply_coefficients(const Objective& o, const Columns& of, float factor) {
  int64_t column = 0;
  for (int s = 0; s < o.sweeps; ++s)
    for (int g = 0; g < o.sweep[s].groups(); ++g, column += kGroupColumns)
      for (const int c : {2, 3, 5, 6}) of[column + c][0] *= factor;
  if (!o.has_ce()) return;
  of[column][0] *= factor;
  if (!o.ce_in_sweep()) of[column + 2][0] *= factor;
}

// All samples, from statistics and to coefficients of one after the other. Fills values.of_samples.
inline void finalize_samples(const Problem& p, const float* stats, const Values& values, float* coefficients) {
  static thread_local Buffer<float> buffer;
  const Objective& o = p.objective;
  const SampleLanes lanes = SampleLanes::in(buffer, o, kLanes);
  const LanesFinalizer finalizer(o, p.classes, values.parts);
  const int64_t in = stats_size(o), out = coefficients_size(o);
  for (int64_t n = 0; n < p.samples; n += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, p.samples - n));
    for (int i = 0; i < count; ++i) {
      for (int64_t c = 0; c < in; ++c) lanes.stats[c][i] = stats[(n + i) * in + c];
      lanes.weight[i] = static_cast<float>(p.weight(n + i));
    }
    finalizer.run(lanes, 0);
    for (int i = 0; i < count; ++i) {
      for (int64_t c = 0; c < out; ++c) coefficients[(n + i) * out + c] = lanes.coefficients[c][i];
      for (int64_t v = 0; v < values.columns; ++v)
        values.of_samples[(n + i) * values.columns + v] = lanes.weight[i] == 0 ? 0 : lanes.values[v][i];
    }
  }
}

}  // namespace
}  // namespace KDK_NAMESPACE
