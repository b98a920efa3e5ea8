// Standardised logits, by class over the batch or by sample over its classes, and the moments they take.
//
// Logits of -inf are no part of the moments and stay -inf: such a class is masked.

// Standardises the classes of a tile into `to`, which has room for whole vectors and may be where they are.
template <class T, class AffineMap>
void standardize(const T* logits, int count, const AffineMap& affine, T* to) {
  each_vector<T>({count}, [&](int i, auto lanes, int) INLINED {
    const Vec<T> raw = load(logits + i, lanes);
    store(to + i, affine.at(i, raw));
  });
}

// The chain rule through the standardisation: for gradients in standardised logits h, of which `level` is the mean and
// `slope` that of the gradient times h, (gradient - level - h * slope) * factor. Nothing flows to masked classes.
template <class T>
inline Vec<T> chain(Vec<T> gradient, Vec<T> h, Vec<T> level, Vec<T> slope, Vec<T> factor) {
  return h == -INFINITY ? Vec<T>{} : (gradient - level - h * slope) * factor;
}

// What class standardisation needs of each class, from the moments and, for gradients, the sums over samples.
template <class T>
class ClassStandardization {
 public:
  ClassStandardization(const Problem& p, const Parallel& parallel) {
    if (p.objective.standardize != Standardize::by_class) return;
    const int64_t size = padded<T>(p.classes);
    T* next = data_.data(size * 8);
    T* columns[8];
    for (T*& column : columns) {
      column = next;
      next += size;
    }
    for (int side = 0; side < 2; ++side)
      for (int64_t j = p.classes; j < size; ++j) {  // -inf stays -inf in the lanes beyond the classes
        columns[3 * side][j] = columns[3 * side + 2][j] = 0;
        columns[3 * side + 1][j] = 1;
      }
    side_[0] = {columns[0], columns[1], columns[2]};
    side_[1] = {columns[3], columns[4], columns[5]};
    level_ = columns[6];
    slope_ = columns[7];
    parallel.run(0, p.classes, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int side = 0; side < 2; ++side) {
        const double* moments = p.moments + side * 3 * p.classes;
        T *high = columns[3 * side], *factors = columns[3 * side + 1], *offset = columns[3 * side + 2];
        for (int64_t j = begin; j < end; ++j) {
          const double factor = p.objective.factor(moments[j], moments[2 * p.classes + j]);
          const Affine<T> affine(moments[p.classes + j], factor);
          high[j] = affine.high;
          factors[j] = affine.factor;
          offset[j] = affine.offset;
        }
      }
      if (p.sums) set_sums(p, p.sums, begin, end);
    });
  }

  // Takes the sums over samples of some classes (see class_sums in kernels.h).
  void set_sums(const Problem& p, const double* sums, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const double count = p.moments[j];
      level_[j] = static_cast<T>(sums[j] / std::max(count, 1.0));
      slope_[j] = static_cast<T>(sums[p.classes + j] / p.objective.degrees(count));
    }
  }

  // 0 for the student, 1 for the teacher.
  const ClassAffines<T>& operator[](int side) const { return side_[side]; }

  // Of the chain rule (see above), for each class.
  const T* level() const { return level_; }
  const T* slope() const { return slope_; }

  // The gradients of some samples in the logits of classes from `begin` on, from those in the standardised ones. What
  // is known of the classes is loaded once for all samples: loads are what this waits for.
  void apply_chain(const T* const* logits, int samples, int64_t begin, int count, T* const* gradients) const {
    const ClassAffines<T> affine = side_[0].from(begin);
    each_vector<T>({count},
                   [&, affine, levels = level_ + begin, slopes = slope_ + begin](int i, auto lanes, int) INLINED {
                     const ClassAffines<T> own = affine.from(i);
                     const Vec<T> high = load(own.high), factor = load(own.factor), offset = load(own.offset);
                     const Vec<T> level = load(levels + i), slope = load(slopes + i);
                     for (int r = 0; r < samples; ++r) {
                       const Vec<T> h = (load(logits[r] + i, lanes) - high) * factor + offset;
                       const Vec<T> v = chain<T>(load(gradients[r] + i, lanes), h, level, slope, factor);
                       write_vector<T, false>(gradients[r] + i, v, lanes, count - i);
                     }
                   });
  }

 private:
  Buffer<T> data_;
  ClassAffines<T> side_[2];
  T* level_ = nullptr;
  T* slope_ = nullptr;
};

// Adds a vector to as many doubles.
inline void add_widened(double* to, Vec<float> v) {
  constexpr int W = kLanes<double>;
  store(to, load(to) + doubles_of(v, 0));
  store(to + W, load(to + W) + doubles_of(v, 1));
}
inline void add_widened(double* to, Vec<double> v) { store(to, load(to) + v); }

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

// Moments of some classes of one sample.
template <class T>
Moments<double> moments_of(const T* logits, int count) {
  const auto centred_sums = [&](T centre, double& missing, double& sum, double& square) {
    Vec<T> gone[2]{}, s[2]{}, q[2]{};
    each_vector<T>({count}, [&](int i, auto lanes, int chain) INLINED {
      const Vec<T> v = load(logits + i, lanes);
      const Vec<T> d = v == -INFINITY ? Vec<T>{} : v - centre;
      gone[chain] += v == -INFINITY ? broadcast(T(1)) : Vec<T>{};
      s[chain] += d;
      q[chain] += d * d;
    });
    missing = horizontal_sum(gone[0] + gone[1]) - (padded<T>(count) - count);
    sum = horizontal_sum(s[0] + s[1]);
    square = horizontal_sum(q[0] + q[1]);
  };
  double missing, sum, square;
  centred_sums(logits[0] == -INFINITY ? T(0) : logits[0], missing, sum, square);
  const double there = count - missing;
  if (there == 0) return {};
  // The second time from close to the mean, so that nothing cancels in the squares.
  const T centre = static_cast<T>((logits[0] == -INFINITY ? T(0) : logits[0]) + sum / there);
  centred_sums(centre, missing, sum, square);
  if (!(square >= kLeastSquare * there && square < INFINITY))
    return moments_in_double(count, [logits](int64_t i) { return logits[i]; });
  return {there, centre + sum / there, std::max(square - sum * sum / there, 0.0)};
}

// Sums over samples, for some classes, of the gradient in standardised logits and of its product with them.
template <class T>
class GradientSums {
 public:
  static constexpr int kGroup = 16;  // samples that are added up in T before they go on in double precision, at most

  static GradientSums& of_this_thread() {
    static thread_local GradientSums sums;
    return sums;
  }

  void start(int count) {
    count_ = count;
    for (double* total : {sum_, product_}) std::fill_n(total, padded<T>(count), 0.0);
  }

  // Adds some samples, whose logits are standardised by `affine`.
  void add(const T* const* logits, const T* const* gradients, int samples, const ClassAffines<T>& affine) {
    each_vector<T>({count_}, [&, affine](int i, auto lanes, int) INLINED {
      const ClassAffines<T> own = affine.from(i);
      const Vec<T> high = load(own.high), factor = load(own.factor), offset = load(own.offset);
      Vec<T> sum{}, product{};
      const auto add_all = [&](auto masked) INLINED {
        sum = product = Vec<T>{};
        for (int r = 0; r < samples; ++r) {
          const Vec<T> h = (load(logits[r] + i, lanes) - high) * factor + offset, g = load(gradients[r] + i, lanes);
          sum += masked() ? (h == -INFINITY ? Vec<T>{} : g) : g;
          product += masked() ? (h == -INFINITY ? Vec<T>{} : g * h) : g * h;
        }
      };
      add_all(std::false_type{});
      // Nothing comes from masked classes. They are rare, and show in the products.
      const Lanes there = (uint64_t{1} << std::min(kLanes<T>, count_ - i)) - 1;
      if ((equal<T>(product - product, Vec<T>{}) & there) != there) add_all(std::true_type{});
      add_widened(sum_ + i, sum);
      add_widened(product_ + i, product);
    });
  }

  void write(double* sums, double* products) const {
    std::copy_n(sum_, count_, sums);
    std::copy_n(product_, count_, products);
  }

 private:
  int count_ = 0;
  alignas(64) double sum_[kTile], product_[kTile];
};

// Work of what runs over samples class by class: some samples (a block) and some classes (a strip). Both are a matter
// of the shape alone, so that no sum depends on the number of threads.
struct Blocks {
  static constexpr int64_t kMostBlocks = 16;
  int64_t samples, classes, strip, strips, blocks = 1;

  // `least`: logits that are worth a block.
  Blocks(const Problem& p, int64_t least, int64_t strip_classes = kTile)
      : samples(p.samples), classes(p.classes), strip(strip_classes), strips(ceil_div(classes, strip)) {
    while (2 * blocks * strips <= kMostBlocks && 2 * blocks * least <= samples * classes) blocks *= 2;
  }

  // Runs body(strip_begin, strip_end, sample_begin, sample_end, block) for each. A thread may take its own backwards:
  // then it leaves those in cache that what follows will start with.
  template <class Body>
  void each(const Parallel& parallel, bool backwards, const Body& body) const {
    const int64_t size = ceil_div(samples, blocks);
    parallel.run(0, blocks * strips, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t i = backwards ? first + last - 1 - n : n;
        const int64_t block = i / strips, begin = i % strips * strip;
        body(begin, std::min(begin + strip, classes), block * size, std::min((block + 1) * size, samples), block);
      }
    });
  }
};

// Sums over samples of deviations from a centre, and of their squares, class by class.
template <class T>
struct Deviations {
  static constexpr int kGroup = 16;  // samples that are added up in T before they go on in double precision
  alignas(64) T logits[kGroup][kTile];
  alignas(64) T centre[kTile];
  alignas(64) double sum[kTile];
  alignas(64) double square[kTile];
  double missing[kTile];  // logits of -inf

  static Deviations& of_this_thread() {
    static thread_local Deviations deviations;
    return deviations;
  }

  // Adds some samples; the `first` of a block also give what their classes' deviations are taken from.
  void add(const T* const* rows, int samples, int count, bool first) {
    each_vector<T>({count}, [&](int i, auto lanes, int) INLINED {
      if (first) store(centre + i, centre_of(rows, samples, i, lanes));
      const Vec<T> c = load(centre + i);
      Vec<T> s{}, q{};
#pragma GCC unroll 4
      for (int r = 0; r < samples; ++r) {
        const Vec<T> d = load(rows[r] + i, lanes) - c;
        s += d;
        q += d * d;
      }
      // What is no number may be a masked class, have no centre yet, or be too large for its square.
      const int end = std::min(i + kLanes<T>, count);
      const Lanes there = (uint64_t{1} << (end - i)) - 1;
      if ((equal<T>(q - q, Vec<T>{}) & there) == there) {
        add_widened(sum + i, s);
        add_widened(square + i, q);
      } else {
        for (int r = 0; r < samples; ++r) add_carefully(rows[r], i, end);
      }
    });
  }

 private:
  // About the mean of some samples: nothing will cancel in the squares. Equal logits give just themselves. A class that
  // is masked in all of them has none yet: NaN.
  template <class Which>
  static Vec<T> centre_of(const T* const* rows, int samples, int i, Which lanes) {
    Vec<T> top = load(rows[0] + i, lanes), rest{};
    for (int r = 1; r < samples; ++r) top = max(load(rows[r] + i, lanes), top);
    for (int r = 0; r < samples; ++r) {
      const Vec<T> v = load(rows[r] + i, lanes);
      rest += v == -INFINITY ? Vec<T>{} : v - top;
    }
    const Vec<T> c = top + rest * (T(1) / samples);
    return c - c == 0 ? c : broadcast(T(NAN));
  }

  void add_carefully(const T* row, int begin, int end) {
    for (int j = begin; j < end; ++j) {
      if (row[j] == -INFINITY) {
        ++missing[j];
        continue;
      }
      if (centre[j] != centre[j]) centre[j] = row[j];
      const T d = row[j] - centre[j];
      sum[j] += d;
      square[j] += double(d) * d;
    }
  }
};

// Moments of the classes from `begin` on over some samples of one side.
template <class T>
void class_moments_of(const Problem& p, const Matrix& matrix, int64_t begin, int count, int64_t first, int64_t last,
                      double* counts, double* means, double* m2s) {
  auto& deviations = Deviations<T>::of_this_thread();
  std::fill_n(deviations.sum, count, 0.0);
  std::fill_n(deviations.square, count, 0.0);
  std::fill_n(deviations.missing, count, 0.0);
  int64_t valid = 0;
  const T* rows[Deviations<T>::kGroup];
  int held = 0;
  for (int64_t n = first; n < last; ++n) {
    if (p.weight(n) != 0) {
      rows[held] = read_classes(matrix, element(p, matrix, n), begin, count, deviations.logits[held]);
      ++held;
    }
    if (held == Deviations<T>::kGroup || (n == last - 1 && held > 0)) {
      deviations.add(rows, held, count, valid == 0);
      valid += held;
      held = 0;
    }
  }
  for (int j = 0; j < count; ++j) {
    counts[j] = static_cast<double>(valid) - deviations.missing[j];
    const double there = std::max(counts[j], 1.0), sum = deviations.sum[j];
    means[j] = counts[j] == 0 ? 0 : deviations.centre[j] + sum / there;
    m2s[j] = std::max(deviations.square[j] - sum * sum / there, 0.0);
    if (!(deviations.square[j] < kLeastSquare * there)) continue;
    const auto logit = [&](int64_t n) {
      T held;
      if (p.weight(first + n) == 0) return T(-INFINITY);
      return *read_classes(matrix, element(p, matrix, first + n), begin + j, 1, &held);
    };
    const Moments<double> moments = moments_in_double(last - first, logit);
    means[j] = moments.mean;
    m2s[j] = moments.m2;
  }
}

template <class T>
void row_moments(const Problem& p, const Parallel& parallel, double* moments) {
  const Blocks work(p, 1 << 17);
  const int64_t size = 6 * p.classes;
  std::vector<double> partial(work.blocks > 1 ? work.blocks * size : 0);
  double* first_block = work.blocks > 1 ? partial.data() : moments;
  work.each(parallel, true, [&](int64_t begin, int64_t end, int64_t first, int64_t last, int64_t block) {
    for (int side = 0; side < 2; ++side) {
      double* out = first_block + block * size + side * 3 * p.classes + begin;
      class_moments_of<T>(p, side ? p.teacher : p.student, begin, static_cast<int>(end - begin), first, last, out,
                          out + p.classes, out + 2 * p.classes);
    }
  });
  if (work.blocks == 1) return;
  parallel.run(0, p.classes, kTile, [&](int64_t begin, int64_t end) {
    for (int side = 0; side < 2; ++side) {
      double* __restrict out = moments + side * 3 * p.classes;
      const int64_t means = p.classes, m2s = 2 * p.classes;
      for (const int64_t row : {int64_t{0}, means, m2s}) std::fill(out + row + begin, out + row + end, 0.0);
      for (int64_t block = 0; block < work.blocks; ++block) {
        const double* part = partial.data() + block * size + side * 3 * p.classes;
        for (int64_t j = begin; j < end; ++j) {
          Moments<double> total{out[j], out[means + j], out[m2s + j]};
          merge(total, {part[j], part[means + j], part[m2s + j]});
          out[j] = total.count;
          out[means + j] = total.mean;
          out[m2s + j] = total.m2;
        }
      }
    }
  });
}
