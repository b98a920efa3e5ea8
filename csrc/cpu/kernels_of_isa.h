// The kernels of one instruction set (see simd.h): by pixels or by rows (see by_pixels).

// The order matters: each needs the one before.
// clang-format off
#include "simd.h"
#include "../evaluate.h"
#include "tile_kernels.h"
#include "standardize.h"
#include "row_kernels.h"
#include "transpose.h"
#include "pixel_kernels.h"
// clang-format on

// Block by block of samples, so that the sum does not depend on the number of threads.
inline ValidSamples valid_samples(const Problem& p, const Parallel& parallel) {
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

template <class T>
void forward_pixels(const Problem& problem, const Parallel& parallel) {
  if (!problem.moments || !problem.gradient.data) return run_pixels<T>(problem, parallel, problem.sums_out);
  Problem p = problem;
  std::vector<double> sums(2 * p.classes);
  std::unique_ptr<T[]> weights(new T[p.samples]);
  p.saved = weights.get();
  p.gradient = {};
  run_pixels<T>(p, parallel, sums.data());
  p.gradient = problem.gradient;
  p.weight = {};
  p.values = p.totals = nullptr;
  p.sums = sums.data();
  run_pixels<T>(p, parallel, nullptr);
}

inline void forward(const Problem& problem, const Parallel& parallel) {
  Problem p = problem;
  if (by_pixels(p)) return (p.double_arithmetic ? forward_pixels<double> : forward_pixels<float>)(p, parallel);
  const int64_t width = value_count(p);
  std::vector<double> values(p.values ? 0 : p.samples * width);
  if (!p.values) p.values = values.data();
  (p.double_arithmetic ? forward_rows<double> : forward_rows<float>)(p, parallel);
  if (!p.totals) return;
  std::fill_n(p.totals, width, 0.0);
  for (int64_t n = 0; n < p.samples; ++n) {
    const double weight = p.weight(n);
    for (int64_t v = 0; v < width && weight != 0; ++v) p.totals[v] += weight * p.values[n * width + v];
  }
}

inline void backward(const Problem& p, const Parallel& parallel) {
  if (by_pixels(p)) return (p.double_arithmetic ? run_pixels<double> : run_pixels<float>)(p, parallel, nullptr);
  (p.double_arithmetic ? backward_rows<double> : backward_rows<float>)(p, parallel);
}

inline void class_moments(const Problem& p, const Parallel& parallel, double* out) {
  if (in_planes(p)) return (p.double_arithmetic ? pixel_moments<double> : pixel_moments<float>)(p, parallel, out);
  (p.double_arithmetic ? row_moments<double> : row_moments<float>)(p, parallel, out);
}

inline void class_sums(const Problem& p, const Parallel& parallel, double* out) {
  if (by_pixels(p)) return (p.double_arithmetic ? run_pixels<double> : run_pixels<float>)(p, parallel, out);
  (p.double_arithmetic ? row_class_sums<double> : row_class_sums<float>)(p, parallel, out);
}

// Plane by plane where samples follow one another in memory, else sample by sample.
inline void scale(const Problem& p, const double* factor, bool per_sample, const Parallel& parallel) {
  const Matrix& matrix = p.gradient;
  const bool planes = p.dims > 0 && p.samples > 0 && matrix.class_stride != 1 && side_by_side(p, matrix);
  const int64_t few_rows = std::clamp<int64_t>(kGrainClasses / std::max<int64_t>(p.classes, 1), 1, kMostPixels);
  const PixelRuns runs(p, planes ? kMostPixels : static_cast<int>(few_rows));
  const int64_t grain = std::max<int64_t>(kGrainClasses / (runs.pixels * (p.classes + 64)), 1);
  parallel.run(0, runs.count, grain, [&](int64_t begin, int64_t end) {
    with_dtype(matrix.dtype, [&](auto type) {
      using Element = decltype(type);
      using T = decltype(widen(type));
      for (int64_t run = begin; run < end; ++run) {
        const int64_t first = runs.first(run);
        auto* samples = static_cast<Element*>(element(p, matrix, first));
        T by[kMostPixels];
        for (int i = 0; i < runs.size(run); ++i) by[i] = static_cast<T>(factor[per_sample ? first + i : 0]);
        // The inner loop is along memory.
        const auto scale_one = [](Element& value, T factor) INLINED {
          const T gradient = widen(value);
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

constexpr Kernels kKernels{valid_samples, forward, backward, class_moments, class_sums, scale};
