// The kernels of one instruction set (see simd.h): by channels or by rows (see by_channels).
#pragma once

#include "channels.h"
#include "rows.h"

namespace KDK_NAMESPACE {
namespace {

// Block by block of samples, so that the sum does not depend on the number of threads.
ValidSamples valid_samples(const Problem& p, const Parallel& parallel) {
  constexpr int64_t kBlock = 1 << 14;
  if (!p.weight.target && !p.weight.given) return {p.samples, static_cast<double>(p.samples)};
  std::vector<ValidSamples> blocks(ceil_div(p.samples, kBlock));
  parallel.run(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, last = std::min(first + kBlock, p.samples);
      int64_t wrong = 0, ignored = 0;
      for (int64_t n = first; n < last && p.weight.target; ++n) {
        const int64_t y = p.weight.target[n], counts = y != p.weight.ignore_index;
        wrong += counts & static_cast<int64_t>(static_cast<uint64_t>(y) >= static_cast<uint64_t>(p.classes));
        ignored += 1 - counts;
      }
      ValidSamples& valid = blocks[block];
      valid.count = last - first - ignored;
      valid.weight = static_cast<double>(valid.count);
      if (p.weight.given) {
        valid.count = 0;
        valid.weight = 0;
        for (int64_t n = first; n < last; ++n) {
          wrong += !(p.weight.given[n] >= 0);
          valid.count += p.weight(n) != 0;
          valid.weight += p.weight(n);
        }
      }
      valid.right = wrong == 0;
    }
  });
  ValidSamples all;
  for (const ValidSamples& block : blocks)
    all = {all.count + block.count, all.weight + block.weight, all.right && block.right};
  return all;
}

// Calls fill(values) for values of each sample, and adds them up in the order of the samples if totals are wanted.
template <class Fill>
void with_sample_values(const Problem& p, const Values& values, const Fill& fill) {
  if (!values.totals) return fill(values);
  std::vector<double> of_samples(p.samples * values.columns);
  fill(Values{values.parts, values.columns, of_samples.data(), nullptr});
  std::fill_n(values.totals, values.columns, 0.0);
  for (int64_t n = 0; n < p.samples; ++n) {
    const double weight = p.weight(n);
    for (int64_t v = 0; v < values.columns && weight != 0; ++v)
      values.totals[v] += weight * of_samples[n * values.columns + v];
  }
}

void fused(const Problem& p, const Values& values, double* sums, const Parallel& parallel) {
  if (by_channels(p)) return ChannelRunner(p, parallel).fused(values, sums);
  with_sample_values(p, values, [&](const Values& each) { RowRunner(p, parallel).fused(each, sums); });
}

void select(const Problem& p, int64_t* selected, const Parallel& parallel) {
  by_channels(p) ? ChannelRunner(p, parallel).select(selected) : RowRunner(p, parallel).select(selected);
}

void reduce(const Problem& p, const int64_t* selected, float* stats, const Parallel& parallel) {
  by_channels(p) ? ChannelRunner(p, parallel).reduce(selected, stats) : RowRunner(p, parallel).reduce(selected, stats);
}

void finalize(const Problem& p, const float* stats, const Values& values, float* coefficients, const Parallel&) {
  with_sample_values(p, values, [&](const Values& each) { finalize_samples(p, stats, each, coefficients); });
}

void class_sums(const Problem& p, const int64_t* selected, double* sums, const Parallel& parallel) {
  by_channels(p) ? ChannelRunner(p, parallel).class_sums(selected, sums)
                 : RowRunner(p, parallel).class_sums(selected, sums);
}

void apply(const Problem& p, const int64_t* selected, const double* sums, const Parallel& parallel) {
  by_channels(p) ? ChannelRunner(p, parallel).apply(selected, sums) : RowRunner(p, parallel).apply(selected, sums);
}

void class_moments(const Problem& p, const Parallel& parallel, double* moments) {
  const bool planes = side_by_side(p, p.student) && side_by_side(p, p.teacher) && p.samples > 0;
  planes ? channel_moments(p, parallel, moments) : row_moments(p, parallel, moments);
}

void class_norm_backward(const Problem& p, const double* sums, double factor, const Parallel& parallel) {
  const ClassNorms norms(p, parallel);
  const NormBackward backward(p, norms, sums, factor);
  const bool planes = side_by_side(p, p.student) && side_by_side(p, p.gradient) && p.samples > 0;
  planes ? channel_norm_backward(p, backward, parallel) : row_norm_backward(p, backward, parallel);
}

// Plane by plane where samples follow one another in memory, else sample by sample.
void scale(const Problem& p, const double* factor, bool per_sample, const Parallel& parallel) {
  const Matrix& matrix = p.gradient;
  const bool planes = p.samples > 0 && side_by_side(p, matrix);
  const int64_t few_rows = std::clamp<int64_t>(kGrainClasses / std::max<int64_t>(p.classes, 1), 1, kMostSamples);
  const SampleRuns runs(p, planes ? kMostSamples : static_cast<int>(few_rows));
  const int64_t grain = std::max<int64_t>(kGrainClasses / (runs.most * (p.classes + 64)), 1);
  parallel.run(0, runs.count, grain, [&](int64_t begin, int64_t end) {
    with_dtype(matrix.dtype, [&](auto type) {
      using Element = decltype(type);
      for (int64_t run = begin; run < end; ++run) {
        const int64_t first = runs.first(run);
        auto* samples = static_cast<Element*>(element(p, matrix, first));
        float by[kMostSamples];
        for (int i = 0; i < runs.size(run); ++i) by[i] = static_cast<float>(factor[per_sample ? first + i : 0]);
        // The inner loop is along memory.
        const auto scale_one = [](Element& value, float factor) KDK_INLINE {
          const float gradient = widen(value);
          narrow(gradient == 0 ? gradient : gradient * factor, value);
        };
        for (int64_t j = 0; j < p.gradient_classes && planes; ++j)
          for (int i = 0; i < runs.size(run); ++i) scale_one(samples[j * matrix.class_stride + i], by[i]);
        const bool alike = !per_sample && is_dense(p, matrix, p.gradient_classes);  // then the run is one row
        for (int i = 0; i < (planes ? 0 : alike ? 1 : runs.size(run)); ++i) {
          auto* sample = static_cast<Element*>(element(p, matrix, first + i));
          if (matrix.class_stride == 1) {
            const int64_t count = alike ? runs.size(run) * p.gradient_classes : p.gradient_classes;
            for (int64_t j = 0; j < count; ++j) scale_one(sample[j], by[i]);
          } else {
            for (int64_t j = 0; j < p.gradient_classes; ++j) scale_one(sample[j * matrix.class_stride], by[i]);
          }
        }
      }
    });
  });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels{valid_samples,       fused, select, reduce, finalize, apply, class_sums, class_moments,
                      class_norm_backward, scale};

}  // namespace KDK_NAMESPACE
