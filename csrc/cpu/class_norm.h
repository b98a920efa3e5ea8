// Standardised logits, by class over the batch or by sample over its classes: moments, what standardises, and the
// gradient through the classes' mean and deviation.
//
// Logits of -inf are no part of the moments and stay -inf: such a class is masked.
#pragma once

#include "tile.h"

namespace KDK_NAMESPACE {
namespace {

// Standardises the classes of a tile into `to`, which may be where they are.
inline void standardize(const float* logits, int count, const Norms& norms, float* to) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, norms.at(i, load(logits + i)));
  for (; i < count; ++i) to[i] = norms(i, logits[i]);
}
inline void standardize(const float* logits, int count, const Norm& norm, float* to) {
  for (int i = 0; i < count; ++i) to[i] = norm(logits[i]);
}

// The slope of the chain rule through a sample's own deviation, for a sum of gradients times standardised logits of 1.
inline float unit_slope(const Objective& o, const Moments<double>& moments) {
  const double degrees = o.degrees(moments.count), deviation = std::sqrt(moments.m2 / degrees);
  return static_cast<float>(deviation == 0 ? 0 : 1 / (deviation * o.inv_std(moments) * degrees));
}

// What standardises each class, of student (0) and teacher (1), from their moments.
class ClassNorms {
 public:
  ClassNorms(const Problem& p, const Parallel& parallel) {
    if (p.objective.standardize != Standardize::by_class) return;
    const int64_t size = round_up(p.classes, 2 * kLanes);
    float* data = data_.data(size * 6);
    std::fill_n(data, size * 6, 0.0f);
    for (int side = 0; side < 2; ++side) {
      float* high = data + side * 3 * size;
      side_[side] = {high, high + size, high + 2 * size};
    }
    parallel.run(0, p.classes, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int side = 0; side < 2; ++side) {
        const double* moments = p.moments + side * 3 * p.classes;
        float* high = data + side * 3 * size;
        for (int64_t j = begin; j < end; ++j) {
          const Norm norm(moments[p.classes + j],
                          p.objective.inv_std({moments[j], moments[p.classes + j], moments[2 * p.classes + j]}));
          high[j] = norm.high;
          high[size + j] = norm.factor;
          high[2 * size + j] = norm.offset;
        }
      }
    });
  }

  const Norms& operator[](int side) const { return side_[side]; }

 private:
  Buffer<float> data_;
  Norms side_[2];
};

// Blocks of samples whose sums are added up in order: a matter of the shape alone.
struct SampleBlocks {
  int64_t samples, count = 1;

  explicit SampleBlocks(const Problem& p, int64_t least_logits = 1 << 13) : samples(p.samples) {
    constexpr int64_t most = 16, most_sums = 1 << 20;
    constexpr int64_t least_samples = 16;  // whose sums are added up in float before they go on in double precision
    while (2 * count <= most && 2 * count * least_logits <= samples * p.classes && 2 * count * p.classes <= most_sums &&
           2 * count * least_samples <= samples)
      count *= 2;
  }
  int64_t begin(int64_t block) const { return block * samples / count; }
};

// Adds up the blocks' sums.
inline void add_blocks(const std::vector<double>& partial, int64_t blocks, double* sums, const Parallel& parallel) {
  const int64_t size = static_cast<int64_t>(partial.size()) / blocks;
  parallel.run(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    std::copy(partial.data() + begin, partial.data() + end, sums + begin);
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t j = begin; j < end; ++j) sums[j] += partial[b * size + j];
  });
}

// Sums over samples, for each class, of the gradient in the standardised logit and of its product with that logit.
class ColumnSums {
 public:
  explicit ColumnSums(int64_t classes) : classes_(classes), size_(round_up(classes, kLanes)) {
    std::fill_n(sums_.data(2 * size_), 2 * size_, 0.0f);
  }
  // Adds to `totals`, 2 x classes, until the last flush().
  void start(double* totals) {
    totals_ = totals;
    std::fill_n(totals, 2 * classes_, 0.0);
  }
  // Adds the classes from `begin` on of one sample. Nothing comes from masked classes.
  void add(int64_t begin, int count, const float* h, const float* gradient) {
    float *sums = sums_.data(0) + begin, *products = sums + size_;
    for (int i = 0; i < count; i += kLanes) {
      const Vec logit = load_first(h + i, count - i, -INFINITY);
      const Vec g = logit == -INFINITY ? Vec{} : load_first(gradient + i, count - i, 0);
      store_first(sums + i, load_first(sums + i, count - i, 0) + g, count - i);
      const Vec product = logit == -INFINITY ? Vec{} : g * logit;
      store_first(products + i, load_first(products + i, count - i, 0) + product, count - i);
    }
    if (begin + count == classes_ && ++rows_ % kRows == 0) flush();
  }
  void flush() {
    float* sums = sums_.data(0);
    for (int which = 0; which < 2; ++which)
      for (int64_t j = 0; j < classes_; ++j) {
        totals_[which * classes_ + j] += sums[which * size_ + j];
        sums[which * size_ + j] = 0;
      }
    rows_ = 0;
  }

 private:
  static constexpr int kRows = 16;  // samples that are added up in float before they go on in double precision
  const int64_t classes_, size_;
  Buffer<float> sums_;
  double* totals_ = nullptr;
  int rows_ = 0;
};

// Moments -------------------------------------------------------------------------------------------------------------

// A mean square below this may have lost squares that are too small for a float.
constexpr double kLeastSquare = 1e-30;

// Moments of the numbers logit(0) to logit(count - 1), all in double precision: slowly, but of numbers of any size.
// Equal ones deviate by exactly 0.
template <class Logit>
Moments<double> moments_in_double(int64_t count, const Logit& logit) {
  int64_t first = 0;
  while (first < count && logit(first) == -INFINITY) ++first;
  if (first == count) return {};
  double centre = logit(first), there = 0, sum = 0, square = 0;
  for (const bool centred : {false, true}) {
    if (centred) centre += sum / there;
    there = sum = square = 0;
    for (int64_t i = first; i < count; ++i) {
      const double v = logit(i), d = v - centre;
      if (v == -INFINITY) continue;
      ++there;
      sum += d;
      square += d * d;
    }
  }
  return {there, centre + sum / there, std::max(square - sum * sum / there, 0.0)};
}

// Count and sums of deviations from a centre, and of their squares.
struct CentredSums {
  double there, sum, square;

  CentredSums(const float* logits, int count, float centre) {
    Vec present[2]{}, s[2]{}, q[2]{};
    const auto add = [&](Vec v, int chain) KDK_INLINE {
      const Vec d = v == -INFINITY ? Vec{} : v - centre;
      present[chain] += v == -INFINITY ? Vec{} : broadcast(1.0f);
      s[chain] += d;
      q[chain] += d * d;
    };
    int i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      add(load(logits + i), 0);
      add(load(logits + i + kLanes), 1);
    }
    for (; i < count; i += kLanes) add(load_first(logits + i, count - i, -INFINITY), 0);
    there = horizontal_sum(present[0] + present[1]);
    sum = horizontal_sum(s[0] + s[1]);
    square = horizontal_sum(q[0] + q[1]);
  }
};

// Moments of some classes of one sample, or of one class of some samples.
inline Moments<double> moments_of(const float* logits, int count) {
  const float first = logits[0] == -INFINITY ? 0 : logits[0];
  const CentredSums once(logits, count, first);
  if (once.there == 0) return {};
  // The second time from close to the mean, so that nothing cancels in the squares.
  const auto centre = static_cast<float>(first + once.sum / once.there);
  const CentredSums sums(logits, count, centre);
  if (!(sums.square >= kLeastSquare * sums.there && sums.square < INFINITY))
    return moments_in_double(count, [logits](int64_t i) { return logits[i]; });
  return {sums.there, centre + sums.sum / sums.there, std::max(sums.square - sums.sum * sums.sum / sums.there, 0.0)};
}

// Moments of some classes over rows: sums of deviations from a centre, and of their squares, class by class.
class RowMoments {
 public:
  static constexpr int kStrip = 2048;  // classes that are gone through at a time
  static RowMoments& of_this_thread() {
    static thread_local RowMoments moments;
    return moments;
  }

  // Those of the classes from `begin` on over some samples of one side, to out[0], out[stride], out[2 * stride].
  void run(const Problem& p, const Matrix& matrix, int64_t begin, int count, int64_t first, int64_t last, double* out,
           int64_t stride) {
    for (double* sums : {sum_, square_, missing_}) std::fill_n(sums, round_up(count, kLanes), 0.0);
    int64_t valid = 0;
    int held = 0;
    for (int64_t n = first; n < last; ++n) {
      if (p.weight(n) != 0) {
        rows_[held] = read_classes(matrix, element(p, matrix, n), begin, count, logits_[held]);
        ++held;
      }
      if (held == kRows || (n == last - 1 && held > 0)) {
        add(held, count, valid == 0);
        valid += held;
        held = 0;
      }
    }
    for (int j = 0; j < count; ++j) {
      const double there = static_cast<double>(valid) - missing_[j], some = std::max(there, 1.0);
      Moments<double> moments{there, there == 0 ? 0 : centre_[j] + sum_[j] / some,
                              std::max(square_[j] - sum_[j] * sum_[j] / some, 0.0)};
      if (square_[j] < kLeastSquare * some)
        moments = moments_in_double(last - first, [&](int64_t n) {
          if (p.weight(first + n) == 0) return -INFINITY;
          return read_class(matrix, element(p, matrix, first + n), begin + j);
        });
      out[j] = moments.count;
      out[stride + j] = moments.mean;
      out[2 * stride + j] = moments.m2;
    }
  }

 private:
  static constexpr int kRows = 16;  // samples that are added up in float before they go on in double precision

  // Adds some samples; the `first` of a block also give what their classes' deviations are taken from.
  void add(int samples, int count, bool first) {
    for (int i = 0; i < count; i += kLanes) {
      const int there = std::min(kLanes, count - i);
      const auto at = [&](int r) KDK_INLINE { return load_first(rows_[r] + i, there, 0); };
      if (first) store(centre_ + i, centre_of(samples, at));
      const Vec c = load(centre_ + i);
      Vec s{}, q{};
#pragma GCC unroll 4
      for (int r = 0; r < samples; ++r) {
        const Vec d = at(r) - c;
        s += d;
        q += d * d;
      }
      if (all_finite(q)) {
        add_widened(sum_ + i, s);
        add_widened(square_ + i, q);
      } else {  // a masked class, one that has no centre yet, or a square that is too large
        for (int r = 0; r < samples; ++r) add_carefully(rows_[r], i, i + there);
      }
    }
  }

  // About the mean of some samples: nothing will cancel in the squares. Equal logits give just themselves. A class that
  // is masked in all of them has none yet: NaN.
  template <class At>
  static KDK_INLINE Vec centre_of(int samples, const At& at) {
    Vec top = at(0), rest{};
    for (int r = 1; r < samples; ++r) top = max(at(r), top);
    for (int r = 0; r < samples; ++r) {
      const Vec v = at(r);
      rest += v == -INFINITY ? Vec{} : v - top;
    }
    const Vec c = top + rest * (1.0f / samples);
    return c - c == 0 ? c : broadcast(NAN);
  }

  void add_carefully(const float* row, int begin, int end) {
    for (int j = begin; j < end; ++j) {
      if (row[j] == -INFINITY) {
        ++missing_[j];
        continue;
      }
      if (centre_[j] != centre_[j]) centre_[j] = row[j];
      const float d = row[j] - centre_[j];
      sum_[j] += d;
      square_[j] += double(d) * d;
    }
  }

  alignas(64) float logits_[kRows][kStrip];
  alignas(64) float centre_[kStrip];
  alignas(64) double sum_[kStrip], square_[kStrip];
  double missing_[kStrip];  // logits of -inf
  const float* rows_[kRows];
};

// Count, mean and m2 of each class: strips of classes and blocks of samples. A thread takes its own backwards: then it
// leaves those in cache that what follows will start with.
inline void row_moments(const Problem& p, const Parallel& parallel, double* moments) {
  const int64_t strips = ceil_div(p.classes, RowMoments::kStrip), size = 6 * p.classes;
  const SampleBlocks blocks(p, (1 << 17) * strips);
  std::vector<double> partial(blocks.count > 1 ? blocks.count * size : 0);
  double* to = blocks.count > 1 ? partial.data() : moments;
  parallel.run(0, blocks.count * strips, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = last; i-- > first;) {
      const int64_t block = i / strips, begin = i % strips * RowMoments::kStrip;
      const int count = static_cast<int>(std::min<int64_t>(RowMoments::kStrip, p.classes - begin));
      for (int side = 0; side < 2; ++side)
        RowMoments::of_this_thread().run(p, side ? p.teacher : p.student, begin, count, blocks.begin(block),
                                         blocks.begin(block + 1), to + block * size + side * 3 * p.classes + begin,
                                         p.classes);
    }
  });
  if (blocks.count == 1) return;
  for (int side = 0; side < 2; ++side)
    for (int64_t j = 0; j < p.classes; ++j) {
      Moments<double> total;
      for (int64_t b = 0; b < blocks.count; ++b) {
        const double* part = partial.data() + b * size + side * 3 * p.classes + j;
        merge(total, {part[0], part[p.classes], part[2 * p.classes]});
      }
      double* out = moments + side * 3 * p.classes + j;
      out[0] = total.count;
      out[p.classes] = total.mean;
      out[2 * p.classes] = total.m2;
    }
}

// Chain rule ----------------------------------------------------------------------------------------------------------

// Takes from gradients for constant moments what flows through the classes' mean and deviation:
// (gradient - (level + h * slope) * inv_std) * factor, with the means over samples of the gradient in the standardised
// logit h and of its product with h. Nothing flows to masked classes.
class NormBackward {
 public:
  NormBackward(const Problem& p, const ClassNorms& norms, const double* sums, double factor)
      : norms_(norms[0]), factor_(static_cast<float>(factor)) {
    const int64_t size = round_up(p.classes, kLanes);
    level_ = data_.data(2 * size);
    slope_ = level_ + size;
    std::fill_n(level_, 2 * size, 0.0f);
    for (int64_t j = 0; j < p.classes; ++j) {
      const double count = p.moments[j];
      level_[j] = static_cast<float>(sums[j] / std::max(count, 1.0));
      slope_[j] = static_cast<float>(sums[p.classes + j] / p.objective.degrees(count));
    }
  }

  // What flows through mean and deviation, in the standardised logit h of classes j, j + 1, ... or of class j.
  Vec flow(int64_t j, Vec h) const { return load(level_ + j) + h * load(slope_ + j); }
  Vec flow_of_one(int64_t j, Vec h) const { return level_[j] + h * slope_[j]; }

  // Classes from `begin` on of one sample.
  void classes(int64_t begin, int count, const float* logits, float* gradient) const {
    const Norms norms = norms_.from(begin);
    for (int i = 0; i < count; i += kLanes) {
      const Vec h = norms.at(i, load_first(logits + i, count - i, 0));
      const Vec through = flow(begin + i, h) * load(norms.factor + i);
      const Vec value = (load_first(gradient + i, count - i, 0) - through) * factor_;
      store_first(gradient + i, h == -INFINITY ? Vec{} : value, count - i);
    }
  }
  // One class of some samples.
  void samples(int64_t j, int count, const float* logits, float* gradient) const {
    const float high = norms_.high[j], factor = norms_.factor[j], offset = norms_.offset[j];
    for (int i = 0; i < count; ++i) {
      const float h = (logits[i] - high) * factor + offset;
      const float value = (gradient[i] - (level_[j] + h * slope_[j]) * factor) * factor_;
      gradient[i] = h == -INFINITY ? 0 : value;
    }
  }

 private:
  Norms norms_;
  const float factor_;
  Buffer<float> data_;
  float *level_, *slope_;
};

// All rows; the last, which may be still in cache, first.
inline void row_norm_backward(const Problem& p, const NormBackward& backward, const Parallel& parallel) {
  const int64_t grain = std::max<int64_t>((1 << 14) / (p.classes + 64), 1);
  parallel.run(0, p.samples, grain, [&](int64_t first, int64_t last) {
    alignas(64) float logits[kTile], gradient[kTile];
    for (int64_t n = last; n-- > first;) {
      if (p.weight(n) == 0) continue;
      const void* student = element(p, p.student, n);
      void* row = element(p, p.gradient, n);
      for (int64_t begin = 0; begin < p.classes; begin += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, p.classes - begin));
        const float* z = read_classes(p.student, student, begin, count, logits);
        float* g = const_cast<float*>(read_classes(p.gradient, row, begin, count, gradient));
        backward.classes(begin, count, z, g);
        if (g == gradient) write_classes(p.gradient, row, begin, count, g);
      }
    }
  });
}

}  // namespace
}  // namespace KDK_NAMESPACE
