// Standardised logits, by class over the batch or by sample over its classes, and the moments they take.
//
// Logits of -inf are no part of the moments and stay -inf: such a class is masked.

// Standardises the classes of a tile into `to`, which has room for whole vectors and may be where they are.
template <class T, class AffineMap>
void standardize(const T* logits, int count, const AffineMap& affine, T* to) {
  each_vector<T>({count}, [&](int i, auto lanes, int) KDK_INLINE_LAMBDA {
    store(to + i, affine.at(i, load(logits + i, lanes)));
  });
}

// The chain rule through the standardisation: for gradients in standardised logits h, of which `level` is the mean and
// `slope` that of the gradient times h, (gradient - level - h * slope) * factor. Nothing flows to masked classes.
template <class T>
inline Vec<T> chain(Vec<T> gradient, Vec<T> h, Vec<T> level, Vec<T> slope, Vec<T> factor) {
  return h == -INFINITY ? Vec<T>{} : (gradient - level - h * slope) * factor;
}

// What class standardisation needs of each class, from the moments and, in backward, the sums over samples.
template <class T>
class ClassStandardization {
 public:
  ClassStandardization(const Problem& p, const Parallel& parallel) {
    if (p.objective.standardize != Standardize::by_class) return;
    const int64_t size = padded<T>(p.classes);
    T* next = data_.data(size * (p.sums ? 8 : 6));
    T* columns[8] = {};
    for (int c = 0; c < (p.sums ? 8 : 6); ++c, next += size) columns[c] = next;
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
        for (int64_t j = begin; j < end; ++j) {
          const double factor = p.objective.factor(moments[j], moments[2 * p.classes + j]);
          const Affine<T> affine(moments[p.classes + j], factor);
          columns[3 * side][j] = affine.high;
          columns[3 * side + 1][j] = affine.factor;
          columns[3 * side + 2][j] = affine.offset;
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

  // Of the chain rule (see above), for each class.
  const T* level() const { return level_; }
  const T* slope() const { return slope_; }

  // The gradient in the logits of classes from `begin` on, from that in the standardised ones.
  void apply_chain(const Source<T>& student, int64_t begin, int count, T* gradient) const {
    write_vectors<T, false>({count}, gradient, [&, student, level = level_ + begin, slope = slope_ + begin](
                                                   int i, auto lanes) KDK_INLINE_LAMBDA {
      const Vec<T> h = student.template at<true>(i, lanes);
      return chain<T>(load(gradient + i, lanes), h, load(level + i), load(slope + i), load(student.affine.factor + i));
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

// Sums over samples, for some classes, of the gradient in standardised logits and of its product with them.
template <class T>
class GradientSums {
 public:
  static GradientSums& of_this_thread() {
    static thread_local GradientSums sums;
    return sums;
  }

  void start(int count) {
    count_ = count;
    samples_ = 0;
    for (double* total : {total_[0], total_[1]}) std::fill_n(total, padded<T>(count), 0.0);
    for (T* part : {part_[0], part_[1]}) std::fill_n(part, padded<T>(count), T(0));
  }

  void add(const Source<T>& student, const T* gradient) {
    each_vector<T>({count_}, [&, student](int i, auto lanes, int) KDK_INLINE_LAMBDA {
      const Vec<T> logit = student.template at<true>(i, lanes), g = load(gradient + i, lanes);
      // Nothing comes from masked classes.
      const Vec<T> sum = load(part_[0] + i) + (logit == -INFINITY ? Vec<T>{} : g);
      const Vec<T> product = load(part_[1] + i) + (logit == -INFINITY ? Vec<T>{} : g * logit);
      store(part_[0] + i, sum);
      store(part_[1] + i, product);
    });
    if (++samples_ % kGroup == 0) flush();
  }

  void write(double* sums, double* products) {
    flush();
    std::copy_n(total_[0], count_, sums);
    std::copy_n(total_[1], count_, products);
  }

 private:
  static constexpr int kGroup = 16;  // samples that are added up in T before they go on in double precision

  void flush() {
    for (int which = 0; which < 2; ++which)
      for (int i = 0; i < count_; i += kLanes<T>) {
        add_widened(total_[which] + i, load(part_[which] + i));
        store(part_[which] + i, Vec<T>{});
      }
  }

  int count_ = 0, samples_ = 0;
  alignas(64) T part_[2][kTile];
  alignas(64) double total_[2][kTile];
};

// Work of what runs over samples class by class: some samples (a block) and some classes (a strip). Both are a matter
// of the shape alone, so that no sum depends on the number of threads.
struct Blocks {
  static constexpr int64_t kMostBlocks = 16, kLeastSamples = 32;
  int64_t samples, classes, blocks, strips;

  explicit Blocks(const Problem& p) : samples(p.samples), classes(p.classes) {
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

  // Takes about the mean of some samples for a centre: nothing will cancel in the squares. Equal logits give just
  // themselves. A class that is masked in all of them has none yet: NaN.
  void centre_on(const T* const* rows, int samples, int count) {
    const T share = T(1) / samples;
    for (int j = 0; j < count; ++j) {
      T top = rows[0][j];
      for (int r = 1; r < samples; ++r) top = rows[r][j] > top ? rows[r][j] : top;
      T rest = 0;
      for (int r = 0; r < samples; ++r) rest += rows[r][j] == -INFINITY ? T(0) : (rows[r][j] - top) * share;
      const T c = top + rest;
      centre[j] = c - c == 0 ? c : T(NAN);
    }
  }

  void add(const T* const* rows, int samples, int count) {
    each_vector<T>({count}, [&](int i, auto lanes, int) KDK_INLINE_LAMBDA {
      const Vec<T> c = load(centre + i);
      Vec<T> s{}, q{};
      for (int r = 0; r < samples; ++r) {
        const Vec<T> d = load(rows[r] + i, lanes) - c;
        s += d;
        q += d * d;
      }
      // What is no number may be a masked class, or have no centre yet (or be a lane beyond the last class).
      if (std::is_same_v<decltype(lanes), AllLanes> && equal<T>(s - s, Vec<T>{}) == (uint64_t{1} << kLanes<T>) - 1) {
        add_widened(sum + i, s);
        add_widened(square + i, q);
      } else {
        for (int r = 0; r < samples; ++r) add_carefully(rows[r], i, std::min(i + kLanes<T>, count));
      }
    });
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
      if (valid == 0) deviations.centre_on(rows, held, count);
      deviations.add(rows, held, count);
      valid += held;
      held = 0;
    }
  }
  for (int j = 0; j < count; ++j) {
    counts[j] = static_cast<double>(valid) - deviations.missing[j];
    const double there = std::max(counts[j], 1.0), sum = deviations.sum[j];
    means[j] = counts[j] == 0 ? 0 : deviations.centre[j] + sum / there;
    const double m2 = deviations.square[j] - sum * sum / there;
    m2s[j] = m2 < 0 ? 0 : m2;
  }
}

template <class T>
void row_moments(const Problem& p, const Parallel& parallel, double* moments) {
  const Blocks work(p);
  const int64_t size = 6 * p.classes;
  std::vector<double> partial(work.blocks > 1 ? work.blocks * size : 0);
  double* first_block = work.blocks > 1 ? partial.data() : moments;
  work.each(parallel, [&](int64_t begin, int64_t end, int64_t first, int64_t last, int64_t block) {
    for (int side = 0; side < 2; ++side) {
      double* out = first_block + block * size + side * 3 * p.classes + begin;
      class_moments_of<T>(p, side ? p.teacher : p.student, begin, static_cast<int>(end - begin), first, last, out,
                          out + p.classes, out + 2 * p.classes);
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
