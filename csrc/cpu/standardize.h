// Standardised logits, by class over the batch or by sample over its classes, and the moments they take.
//
// Logits of -inf are no part of the moments and stay -inf: such a class is masked.

// A standardised logit is (logit - high) * factor + offset, with the mean split in two, high and a small rest in the
// offset: logit - high is exact where the mean is large against the deviation.
template <class T>
struct Affine {
  T high = 0, factor = 0, offset = 0;

  Affine() = default;
  Affine(double mean, double scale)
      : high(static_cast<T>(mean)), factor(static_cast<T>(scale)), offset(static_cast<T>((high - mean) * scale)) {}

  T operator()(T logit) const { return (logit - high) * factor + offset; }
  Vec<T> at(int, Vec<T> logits) const { return (logits - high) * factor + offset; }
};

// One of them a class, in whole vectors.
template <class T>
struct ClassAffines {
  const T* high = nullptr;
  const T* factor = nullptr;
  const T* offset = nullptr;

  ClassAffines from(int64_t begin) const { return {high + begin, factor + begin, offset + begin}; }
  T operator()(int64_t j, T logit) const { return (logit - high[j]) * factor[j] + offset[j]; }
  Vec<T> at(int i, Vec<T> logits) const { return (logits - load(high + i)) * load(factor + i) + load(offset + i); }
};

// Standardises the classes of a tile into `to`, which has room for whole vectors and may be where they are.
template <class T, class AffineMap>
void standardize(const T* logits, int count, const AffineMap& affine, T* to) {
  each_vector<T>({count}, [&](int i, auto lanes, int) KDK_INLINE_LAMBDA { store(to + i, affine.at(i, load(logits + i, lanes))); });
}

// The chain rule through the standardisation, in place: for gradients in standardised logits h, of which `level` is the
// mean and `slope` that of the gradient times h: (gradient - level - h * slope) * factor. Nothing flows to masked classes.
template <class T>
inline Vec<T> chain(Vec<T> gradient, Vec<T> h, Vec<T> level, Vec<T> slope, Vec<T> factor) {
  return h == -INFINITY ? Vec<T>{} : (gradient - level - h * slope) * factor;
}

// What class standardisation needs of each class, from the moments and, in backward, the sums over samples.
template <class T>
class ClassStandardization {
 public:
  ClassStandardization(const RowsProblem& p, const Parallel& parallel) {
    if (p.objective.standardize != Standardize::by_class) return;
    const int64_t size = padded<T>(p.classes);
    data_.resize(size * (p.sums ? 8 : 6));
    T* next = data_.data();
    T* columns[8] = {};
    for (int c = 0; c < (p.sums ? 8 : 6); ++c, next += size) columns[c] = next;
    side_[0] = {columns[0], columns[1], columns[2]};
    side_[1] = {columns[3], columns[4], columns[5]};
    level_ = columns[6];
    slope_ = columns[7];
    parallel.run(0, p.classes, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int side = 0; side < 2; ++side) {
        const double* moments = p.moments + side * 3 * p.classes;
        for (int64_t j = begin; j < end; ++j) {
          const double mean = moments[p.classes + j];
          const double factor = p.objective.factor(moments[j], moments[2 * p.classes + j]);
          const T high = static_cast<T>(mean);
          columns[3 * side][j] = high;
          columns[3 * side + 1][j] = static_cast<T>(factor);
          columns[3 * side + 2][j] = static_cast<T>((high - mean) * factor);
        }
      }
      if (!p.sums) return;
      for (int64_t j = begin; j < end; ++j) {
        const double count = p.moments[j];
        level_[j] = static_cast<T>(p.sums[j] / std::max(count, 1.0));
        slope_[j] = static_cast<T>(p.sums[p.classes + j] / p.objective.degrees(count));
      }
    });
  }

  // 0 for the student, 1 for the teacher.
  const ClassAffines<T>& operator[](int side) const { return side_[side]; }

  // The gradient in the logits of classes from `begin` on, from that in the standardised ones.
  void apply_chain(const T* h, int64_t begin, int count, T* gradient) const {
    write_vectors<T, false>({count}, gradient, [&](int i, auto lanes) KDK_INLINE_LAMBDA {
      const int64_t j = begin + i;
      return chain<T>(load(gradient + i, lanes), load(h + i, lanes), load(level_ + j), load(slope_ + j), load(side_[0].factor + j));
    });
  }

 private:
  std::vector<T> data_;
  ClassAffines<T> side_[2];
  T* level_ = nullptr;
  T* slope_ = nullptr;
};

// Adds a vector, or the product of two, to as many doubles.
inline void add_widened(double* to, Vec<float> v) {
  constexpr int W = kLanes<double>;
  store(to, load(to) + __builtin_convertvector(half<float, 2 * W>(v, 0), Vec<double>));
  store(to + W, load(to + W) + __builtin_convertvector(half<float, 2 * W>(v, 1), Vec<double>));
}
inline void add_widened(double* to, Vec<double> v) { store(to, load(to) + v); }
inline void add_widened(double* to, Vec<float> a, Vec<float> b) {
  constexpr int W = kLanes<double>;
  for (int i = 0; i < 2; ++i) {
    const Vec<double> x = __builtin_convertvector(half<float, 2 * W>(a, i), Vec<double>);
    const Vec<double> y = __builtin_convertvector(half<float, 2 * W>(b, i), Vec<double>);
    store(to + i * W, load(to + i * W) + x * y);
  }
}
inline void add_widened(double* to, Vec<double> a, Vec<double> b) { store(to, load(to) + a * b); }

// Moments of some classes of one sample.
template <class T>
Moments<double> moments_of(const T* logits, int count) {
  const auto centred_sums = [&](T centre, double& missing, double& sum, double& square) {
    Vec<T> gone[2]{}, s[2]{}, q[2]{};
    each_vector<T>({count}, [&](int i, auto lanes, int chain) KDK_INLINE_LAMBDA {
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
  return {there, centre + sum / there, std::max(square - sum * sum / there, 0.0)};
}

// Work of class moments and class sums: some samples (a block) and some classes (a strip). Both are a matter of the
// shape alone, so that no sum depends on the number of threads.
struct Blocks {
  static constexpr int64_t kMostBlocks = 16, kLeastSamples = 32;
  int64_t samples, classes, blocks, strips;

  explicit Blocks(const RowsProblem& p) : samples(p.samples), classes(p.classes) {
    strips = ceil_div(classes, kTile);
    blocks = std::clamp<int64_t>(samples / kLeastSamples, 1, std::max<int64_t>(kMostBlocks / strips, 1));
  }

  // Runs body(strip_begin, strip_end, sample_begin, sample_end, block) for each.
  template <class Body>
  void each(const Parallel& parallel, const Body& body) const {
    const int64_t size = ceil_div(samples, blocks);
    parallel.run(0, blocks * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i / strips, strip = i % strips * kTile;
        body(strip, std::min(strip + kTile, classes), block * size, std::min((block + 1) * size, samples), block);
      }
    });
  }
};

// Moments of some classes over some samples of one side. `sum` and `square` are scratch of whole vectors.
template <class T>
void class_moments_of(const RowsProblem& p, const Matrix& matrix, int64_t begin, int count, int64_t first, int64_t last,
                      T* scratch, T* centre, double* sum, double* square, double* counts, double* means, double* m2s) {
  std::fill_n(sum, padded<T>(count), 0.0);
  std::fill_n(square, padded<T>(count), 0.0);
  std::fill_n(counts, count, 0.0);
  int64_t valid = 0;
  for (int64_t n = first; n < last; ++n) {
    if (p.row_weight[n] == 0) continue;
    const T* logits = read_classes(matrix, element(p, matrix, n), begin, count, scratch);
    // Deviations from the first sample's logits are small against a common mean, and doubles bear the rest.
    if (valid++ == 0)
      for (int j = 0; j < padded<T>(count); ++j) centre[j] = j < count && logits[j] != -INFINITY ? logits[j] : T(0);
    each_vector<T>({count}, [&](int i, auto lanes, int) KDK_INLINE_LAMBDA {
      const Vec<T> v = load(logits + i, lanes);
      const Lanes gone = equal<T>(v, broadcast(T(-INFINITY)));
      Vec<T> d = v - load(centre + i);
      if (gone != 0) {
        d = v == -INFINITY ? Vec<T>{} : d;
        for (int j = i; j < std::min(i + kLanes<T>, count); ++j) counts[j] -= gone >> (j - i) & 1;
      }
      add_widened(sum + i, d);
      add_widened(square + i, d, d);
    });
  }
  for (int j = 0; j < count; ++j) {
    counts[j] += valid;
    const double there = std::max(counts[j], 1.0);
    means[j] = counts[j] == 0 ? 0 : centre[j] + sum[j] / there;
    const double m2 = square[j] - sum[j] * sum[j] / there;
    m2s[j] = m2 < 0 ? 0 : m2;
  }
}

template <class T>
void class_moments_typed(const RowsProblem& p, const Parallel& parallel, double* moments) {
  const Blocks work(p);
  const int64_t size = 6 * p.classes;
  std::vector<double> partial(work.blocks > 1 ? work.blocks * size : 0);
  double* first_block = work.blocks > 1 ? partial.data() : moments;
  work.each(parallel, [&](int64_t begin, int64_t end, int64_t first, int64_t last, int64_t block) {
    alignas(64) T logits[kTile], centre[kTile];
    alignas(64) double sum[kTile], square[kTile];
    for (int side = 0; side < 2; ++side) {
      double* out = first_block + block * size + side * 3 * p.classes + begin;
      class_moments_of<T>(p, side ? p.teacher : p.student, begin, static_cast<int>(end - begin), first, last, logits,
                          centre, sum, square, out, out + p.classes, out + 2 * p.classes);
    }
  });
  if (work.blocks == 1) return;
  parallel.run(0, p.classes, kTile, [&](int64_t begin, int64_t end) {
    for (int side = 0; side < 2; ++side)
      for (int64_t j = begin; j < end; ++j) {
        Moments<double> total;
        for (int64_t block = 0; block < work.blocks; ++block) {
          const double* part = partial.data() + block * size + side * 3 * p.classes + j;
          merge(total, {part[0], part[p.classes], part[2 * p.classes]});
        }
        double* out = moments + side * 3 * p.classes + j;
        out[0] = total.count;
        out[p.classes] = total.mean;
        out[2 * p.classes] = total.m2;
      }
  });
}
