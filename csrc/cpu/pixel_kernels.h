// The pixel kernels, built once per instruction set (see simd.h): for samples that follow one another in memory, as the
// pixels of NCHW logits do, and for rows of few classes, which are transposed on the way (see transpose.h). A vector
// holds one class of several pixels and classes are walked plane by plane, so that pixels never meet and nothing is
// gathered. A tile of pixels is taken through all three steps while its logits are in cache; where classes are too many
// for that, in chunks that are read again for the gradient.
//
// Nothing but a pixel's weight is saved for backward: on the way through a tile, statistics are cheaper than memory.

constexpr int kLeastPixels = 16;           // where classes are many: still a whole line of floats
constexpr int kChunkLogits = 16384;        // of a tile and a chunk of classes, one side: all arrays of them stay in L2
constexpr int64_t kStreamBytes = 8 << 20;  // gradients from here on would push everything else out of the caches
constexpr int kFewLeaders = 32;            // sorted by insertion: from more on, k steps a class cost more
constexpr int kFlushClasses = 4;           // classes that are added up in T before the sum goes on in double precision

// Runs of at most `pixels` samples, which follow one another in memory where they do so in any of the matrices.
struct PixelRuns {
  int64_t line, runs_of_line, count;
  int pixels;

  PixelRuns(const Problem& p, int most_pixels)
      : line(line_of(p)),
        runs_of_line(ceil_div(line, most_pixels)),
        count(p.samples == 0 ? 0 : p.samples / line * runs_of_line),
        pixels(most_pixels) {}

  int64_t first(int64_t run) const { return run / runs_of_line * line + run % runs_of_line * pixels; }
  int size(int64_t run) const {
    return static_cast<int>(std::min<int64_t>(pixels, line - run % runs_of_line * pixels));
  }

 private:
  static int64_t line_of(const Problem& p) {
    if (p.dims == 0) return 1;
    for (const Matrix& matrix : {p.student, p.teacher, p.gradient})
      if (matrix.data && side_by_side(p, matrix)) return p.sample_size[p.dims - 1];
    return p.samples;
  }
};

// One class of some pixels: in place, or in `to` where it has to be converted.
template <class T>
const T* read_pixels(const Matrix& matrix, const void* pixels, int64_t j, int count, T* to) {
  const T* from = nullptr;
  with_dtype(matrix.dtype, [&](auto element) {
    const auto* plane = static_cast<const decltype(element)*>(pixels) + j * matrix.class_stride;
    if constexpr (std::is_same_v<T, decltype(element)>) {
      from = plane;
    } else {
      widen_all(plane, count, to);
      from = to;
    }
  });
  return from;
}

// A vector of T to as many doubles, and a vector of doubles to as many T.
inline void store_widened(double* to, Vec<float> v) {
  constexpr int D = kLanes<double>;
  store(to, doubles_of(v, 0));
  store(to + D, doubles_of(v, 1));
}
inline void store_widened(double* to, Vec<double> v) { store(to, v); }
inline void store_narrowed(float* to, Doubles v) {
  const auto narrowed = __builtin_convertvector(v, typename VecOfLanes<float, kLanes<double>>::type);
  __builtin_memcpy(to, &narrowed, sizeof narrowed);
}
inline void store_narrowed(double* to, Doubles v) { store(to, v); }
inline Doubles load_widened(const float* from) {
  typename VecOfLanes<float, kLanes<double>>::type narrow;
  __builtin_memcpy(&narrow, from, sizeof narrow);
  return __builtin_convertvector(narrow, Doubles);
}
inline Doubles load_widened(const double* from) { return load(from); }
template <class T>
inline Vec<T> load_narrowed(const double* from) {
  T lanes[kLanes<T>];
  for (int i = 0; i < kLanes<T>; i += kLanes<double>) store_narrowed(lanes + i, load(from + i));
  return load(lanes);
}

// A sum of vectors in double precision: a few classes leave no room for the roundings of a float.
template <class T>
struct WideSum {
  Doubles low{}, high{};

  void add(Vec<T> v) {
    if constexpr (sizeof(T) == 8) {
      low += v;
    } else {
      low += doubles_of(v, 0);
      high += doubles_of(v, 1);
    }
  }
  void write(double* to, double factor = 1) const {
    store(to, low * factor);
    if constexpr (sizeof(T) == 4) store(to + kLanes<double>, high * factor);
  }
};

// Statistics of one group, a pixel a lane.
struct PixelStats {
  alignas(64) double student_origin[kMostPixels], teacher_origin[kMostPixels];
  alignas(64) double student_sum[kMostPixels], teacher_sum[kMostPixels];
  alignas(64) double teacher_gap[kMostPixels], student_gap[kMostPixels];

  GroupStats<Doubles> lanes(int i) const {
    return {load(student_origin + i), load(teacher_origin + i), load(student_sum + i),
            load(teacher_sum + i),    load(teacher_gap + i),    load(student_gap + i)};
  }
  GroupStats<double> lane(int i) const {
    return {student_origin[i], teacher_origin[i], student_sum[i], teacher_sum[i], teacher_gap[i], student_gap[i]};
  }
  void set_lane(int i, const GroupStats<double>& stats) {
    student_origin[i] = stats.student_origin;
    teacher_origin[i] = stats.teacher_origin;
    student_sum[i] = stats.student_sum;
    teacher_sum[i] = stats.teacher_sum;
    teacher_gap[i] = stats.teacher_gap;
    student_gap[i] = stats.student_gap;
  }
};

// Which classes lead in a term, a pixel a lane. Classes are numbers of T, so that they compare like logits.
template <class T>
struct PixelLeaders {
  alignas(64) T first[kMostPixels];  // the class that is a group of its own: the target, or the teacher's best
  alignas(64) T bound[kMostPixels];  // the rank value of the last class that leads by rank
  alignas(64) T last[kMostPixels];   // that class: among equals, lower ones lead
};

// What the gradient of one group multiplies exponentials by, a pixel a lane.
template <class T>
struct PixelCoefficients {
  alignas(64) T student[kMostPixels], tilt[kMostPixels], teacher[kMostPixels], mean_gap[kMostPixels];
};

constexpr int groups_of(PartitionKind kind) {
  return kind == PartitionKind::whole ? 1 : kind == PartitionKind::top1_topk ? 3 : 2;
}

// What the teacher's logits are ranked by: the largest first, NaN before all.
template <class T>
inline Vec<T> rank_value(Vec<T> teacher, bool largest) {
  const Vec<T> value = largest ? teacher : -teacher;
  return value == value ? value : broadcast(T(INFINITY));
}

// One pixel's k best classes so far, and at most as many that came after: O(1) a class whatever k.
template <class T>
class BestOf {
 public:
  BestOf(Key<T>* room, int k) : keys_(room), k_(k) {}  // room for 2 k
  void add(T value, int64_t index) {
    const Key<T> key = key_of(value, index);
    if (key < least_) return;
    if (held_ == 2 * k_) cut();
    keys_[held_++] = key;
  }
  void cut() {
    std::nth_element(keys_, keys_ + k_ - 1, keys_ + held_, std::greater<>());
    least_ = keys_[k_ - 1];
    held_ = k_;
  }
  // After a cut.
  Key<T> first() const { return *std::max_element(keys_, keys_ + k_); }
  Key<T> last() const { return least_; }

 private:
  Key<T>* keys_;
  Key<T> least_ = 0;
  int k_, held_ = 0;
};

// In which group each of a vector of pixels has a class: masks of all groups but the last, whose pixels are in no mask.
template <class T, int Groups>
struct PixelMembers {
  typename VecOf<T>::bits in[Groups > 1 ? Groups - 1 : 1];

  // `value` in pixels that have it in group g, `other` elsewhere.
  Vec<T> choose(int g, Vec<T> value, Vec<T> other) const {
    if constexpr (Groups == 1) return value;
    if (g < Groups - 1) return in[g] ? value : other;
    for (int before = 0; before < Groups - 1; ++before) value = in[before] ? other : value;
    return value;
  }
  // The group's own among the groups' values.
  Vec<T> pick(const Vec<T>* values) const {
    Vec<T> value = values[Groups - 1];
    for (int g = 0; g < Groups - 1; ++g) value = in[g] ? values[g] : value;
    return value;
  }
};

// What tells the groups of any class in a vector of pixels.
template <class T, PartitionKind Kind>
struct PixelGroups {
  using Members = PixelMembers<T, groups_of(Kind)>;
  Vec<T> first, bound, last;
  bool largest;

  PixelGroups(const PixelLeaders<T>& leaders, bool by_largest, int i)
      : first(load(leaders.first + i)),
        bound(load(leaders.bound + i)),
        last(load(leaders.last + i)),
        largest(by_largest) {}

  Members of(T j, Vec<T> teacher) const {
    if constexpr (Kind == PartitionKind::whole) {
      return {};
    } else if constexpr (Kind == PartitionKind::target) {
      return {{first == j}};
    } else {
      const Vec<T> value = rank_value<T>(teacher, largest);
      const auto leads = (value > bound) | ((value == bound) & (last >= j));
      if constexpr (Kind == PartitionKind::topk) return {{leads}};
      if constexpr (Kind == PartitionKind::top1_topk) return {{first == j, leads & (first != j)}};
    }
  }
};

// Memory that the next tile will come from, plane by plane: fetched while the arithmetic on this one leaves the load
// ports idle. Not into L1: planes that lie a power of two apart share their place there.
struct TileAhead {
  const char* student;
  const char* teacher;
  int64_t student_plane, teacher_plane;

  void fetch() {
    __builtin_prefetch(student, 0, 2);
    __builtin_prefetch(teacher, 0, 2);
    student += student_plane;
    teacher += teacher_plane;
  }
};

// Sums over pixels of the gradient in standardised logits and of its product with them, for each class.
template <class T>
class PixelSums {
 public:
  static PixelSums& of_this_thread() {
    static thread_local PixelSums sums;
    return sums;
  }

  // Adds to `totals`, 2 x classes, until the last flush().
  void start(int64_t classes, double* totals) {
    classes_ = classes;
    totals_ = totals;
    tiles_ = 0;
    lanes_.data(2 * classes * kLanes<T>);
    std::fill_n(lanes_.data(0), 2 * classes * kLanes<T>, T(0));
  }
  void add(int64_t j, Vec<T> gradient, Vec<T> product) {
    T* lanes = lanes_.data(0) + 2 * j * kLanes<T>;
    store(lanes, load(lanes) + gradient);
    store(lanes + kLanes<T>, load(lanes + kLanes<T>) + product);
  }
  void end_tile() {
    constexpr int tiles_in_t = 8;  // whose sums are added up in T before they go on in double precision
    if (++tiles_ % tiles_in_t == 0) flush();
  }
  void flush() {
    T* lanes = lanes_.data(0);
    for (int64_t j = 0; j < classes_; ++j)
      for (int which = 0; which < 2; ++which, lanes += kLanes<T>) {
        totals_[which * classes_ + j] += horizontal_sum(load(lanes));
        store(lanes, Vec<T>{});
      }
  }

 private:
  Buffer<T> lanes_;
  int64_t classes_ = 0;
  double* totals_ = nullptr;
  int tiles_ = 0;
};

// Memory that a thread keeps from call to call.
template <class T>
struct PixelScratch {
  Buffer<T> logits, ranking;
  Buffer<Key<T>> keys;
  PixelStats stats[kMaxTerms][kMaxGroups], part[kMaxTerms][kMaxGroups];
  PixelLeaders<T> leaders[kMaxTerms];
  PixelCoefficients<T> by[kMaxTerms][kMaxGroups];
  alignas(64) double weight[kMostPixels];
  alignas(64) T valid[kMostPixels], target[kMostPixels];
  // The student's softmax at T = 1, for the cross entropy, and what its gradient takes of the target and the softmax.
  alignas(64) double ce_origin[kMostPixels], ce_sum[kMostPixels], ce_at_target[kMostPixels];
  alignas(64) T ce_factor[kMostPixels], ce_softmax[kMostPixels];
  // Where samples are standardised, student and teacher: as in Affine. And the slope of the chain rule.
  alignas(64) T high[2][kMostPixels], factor[2][kMostPixels], offset[2][kMostPixels];
  alignas(64) T unit_slope[kMostPixels], slope[kMostPixels];
  alignas(64) double moments[4][kMostPixels];

  static PixelScratch& of_this_thread() {
    static thread_local PixelScratch scratch;
    return scratch;
  }
};

template <class T>
class PixelWorker {
 public:
  static constexpr int W = kLanes<T>;

  PixelWorker(const Problem& problem, const ClassStandardization<T>& classes, PixelSums<T>* sums = nullptr)
      : p_(problem),
        o_(problem.objective),
        by_class_(classes),
        scratch_(PixelScratch<T>::of_this_thread()),
        sums_(sums),
        forward_(p_.values || p_.totals),
        tile_(tile_pixels(problem)),
        pitch_(tile_ + 16),
        chunk_(std::min<int64_t>(kChunkLogits / tile_, p_.classes)) {
    streams_ = p_.gradient.data && p_.gradient.sample_stride[p_.dims - 1] == 1 &&
               p_.samples * p_.gradient_classes * dtype_size(p_.gradient.dtype) >= kStreamBytes;
    const int64_t size = chunk_ * pitch_;
    T* next = scratch_.logits.data(size * (5 + 2 * o_.terms));
    const auto array = [&] {
      next += size;
      return next - size;
    };
    logits_[0] = array();
    logits_[1] = array();
    gradient_ = array();
    raw_ = array();
    rows_ = array();
    for (int t = 0; t < o_.terms; ++t) {
      exps_[t][0] = array();
      exps_[t][1] = array();
    }
  }

  ~PixelWorker() {
    if (streams_) stream_fence();
  }

  static int tile_pixels(const Problem& p) {
    for (const int pixels : {kMostPixels})
      if (p.classes * pixels <= kChunkLogits) return pixels;
    return kLeastPixels;
  }

  // All three steps for `count` pixels from sample `first` on. Adds to `totals` where the values' sums are asked for.
  // Where sums over pixels of the gradient are asked for they take its place.
  void run(int64_t first, int count, double* totals) {
    place(first, count);
    totals_ = totals;
    if (!weigh()) {
      if (p_.values) std::fill_n(p_.values + first * value_count(p_), count * value_count(p_), 0.0);
      clear(0);
      return;
    }
    if (o_.standardize == Standardize::by_sample) standardize_samples();
    for (int t = 0; t < o_.terms; ++t) set_leaders(t);
    each_chunk([&](int64_t begin, int64_t end) {
      load_chunk(begin, end);
      if (o_.has_ce()) add_softmax();
      for (int t = 0; t < o_.terms; ++t) add_term(t);
    });
    finish();
    if (!p_.gradient.data && !sums_) return;
    if (o_.standardize == Standardize::by_sample) set_slope();
    each_chunk([&](int64_t begin, int64_t end) {
      if (!one_chunk() || o_.standardize != Standardize::by_sample) term_gradient(begin, end);
      sums_ ? add_class_sums() : write();
    });
    if (sums_) sums_->end_tile();
    clear(p_.classes);
  }

 private:
  bool one_chunk() const { return chunk_ == p_.classes; }
  template <class Body>
  void each_chunk(const Body& body) {
    for (int64_t begin = 0; begin < p_.classes; begin += chunk_) body(begin, std::min(begin + chunk_, p_.classes));
  }
  double unit(int t) const { return exponent(t); }
  T exponent(int t) const { return static_cast<T>(o_.term[t].exponent()); }

  void place(int64_t first, int count) {
    first_ = first;
    count_ = count;
    side_[0] = element(p_, p_.student, first);
    side_[1] = element(p_, p_.teacher, first);
    out_ = p_.gradient.data ? element(p_, p_.gradient, first) : nullptr;
    std::fill_n(scratch_.target, tile_, T(-1));
    for (int i = 0; i < count && p_.target; ++i) scratch_.target[i] = static_cast<T>(p_.target[first + i]);
  }

  // Weights of the tile's pixels, and what depends on nothing else; false if none counts.
  bool weigh() {
    T* saved = p_.saved ? static_cast<T*>(p_.saved) + first_ : nullptr;
    std::fill_n(scratch_.weight, tile_, 0.0);
    std::fill_n(scratch_.valid, tile_, T(0));
    for (int i = 0; i < count_; ++i) scratch_.weight[i] = p_.weight(first_ + i);
    if (forward_) {
      for (int i = 0; i < count_; ++i) scratch_.valid[i] = scratch_.weight[i] != 0;
      for (int i = 0; i < count_ && saved; ++i) saved[i] = static_cast<T>(scratch_.weight[i]);
    } else {
      // A weight of 0 may be an upstream gradient's: only a saved one says that a pixel does not count.
      for (int i = 0; i < count_; ++i) scratch_.valid[i] = saved[i] != 0;
      for (int i = 0; i < count_; ++i) scratch_.weight[i] = saved[i] == 0 ? 0 : scratch_.weight[i] * saved[i];
    }
    int valid = 0;
    for (int i = 0; i < count_; ++i) valid += scratch_.valid[i] != 0;
    all_valid_ = valid == count_;
    return valid > 0;
  }

  // Logits of a chunk as the terms see them, and raw ones of the student if the cross entropy needs those too.
  void load_chunk(int64_t begin, int64_t end) {
    begin_ = begin;
    classes_ = static_cast<int>(end - begin);
    load_side(0, begin, end, logits_[0]);
    load_side(1, begin, end, logits_[1]);
    if (o_.has_ce() && o_.standardize != Standardize::none) read_planes(0, begin, end, raw_);
  }
  const T* raw() const { return o_.standardize == Standardize::none ? logits_[0] : raw_; }

  // The classes of a chunk, plane by plane.
  void read_planes(int side, int64_t begin, int64_t end, T* to) const {
    const Matrix& matrix = side ? p_.teacher : p_.student;
    if (!side_by_side(p_, matrix)) return read_rows(p_, matrix, block(begin, end), rows_, planes(to));
    for (int64_t j = begin; j < end; ++j, to += pitch_) copy_pixels(side, j, to);
  }
  Planes<T> planes(T* data) const { return {data, tile_, pitch_}; }
  SampleBlock block(int64_t begin, int64_t end) const { return {first_, count_, begin, static_cast<int>(end - begin)}; }

  // One plane's pixels, and zeros behind them.
  void copy_pixels(int side, int64_t j, T* to) const {
    const Matrix& matrix = side ? p_.teacher : p_.student;
    const T* from = read_pixels(matrix, side_[side], j, count_, to);
    if (count_ < tile_) {
      if (from != to) std::copy_n(from, count_, to);
      std::fill_n(to + count_, tile_ - count_, T(0));
    } else if (from != to) {
      for (int i = 0; i < tile_; i += W) store(to + i, load(from + i));
    }
  }

  void load_side(int side, int64_t begin, int64_t end, T* to) const {
    read_planes(side, begin, end, to);
    for (int64_t j = begin; j < end && o_.standardize != Standardize::none; ++j, to += pitch_) {
      if (o_.standardize == Standardize::by_class) {
        Affine<T> own;
        own.high = by_class_[side].high[j];
        own.factor = by_class_[side].factor[j];
        own.offset = by_class_[side].offset[j];
        for (int i = 0; i < tile_; i += W) store(to + i, own.at(i, load(to + i)));
      }
      if (o_.standardize == Standardize::by_sample) {
        const ClassAffines<T> own{scratch_.high[side], scratch_.factor[side], scratch_.offset[side]};
        for (int i = 0; i < tile_; i += W) store(to + i, own.at(i, load(to + i)));
      }
    }
  }

  // Each pixel's own moments, from the raw logits, for both sides.
  void standardize_samples() {
    auto& [count, mean, sum, square] = scratch_.moments;
    for (int side = 0; side < 2; ++side) {
      T* planes = logits_[side];
      // Two sweeps, the second from close to the mean, so that nothing cancels in the squares.
      std::fill_n(mean, tile_, 0.0);
      for (const bool centred : {false, true}) {
        for (double* total : {count, sum, square}) std::fill_n(total, tile_, 0.0);
        each_chunk([&](int64_t begin, int64_t end) {
          if (!one_chunk() || !centred) read_planes(side, begin, end, planes);
          for (int i = 0; i < tile_ && begin == 0 && !centred; ++i) mean[i] = planes[i] == -INFINITY ? 0 : planes[i];
          for (int i = 0; i < tile_; i += W) {
            const Vec<T> centre = load_narrowed<T>(mean + i);
            for (int64_t from = begin; from < end; from += kFlushClasses) {
              Vec<T> there{}, s{}, q{};
              for (int64_t j = from; j < std::min(from + kFlushClasses, end); ++j) {
                const Vec<T> v = load(planes + (j - begin) * pitch_ + i);
                const Vec<T> d = v == -INFINITY ? Vec<T>{} : v - centre;
                there += v == -INFINITY ? Vec<T>{} : broadcast(T(1));
                s += d;
                q += d * d;
              }
              add_widened(count + i, there);
              add_widened(sum + i, s);
              add_widened(square + i, q);
            }
          }
        });
        if (!centred)
          for (int i = 0; i < tile_; ++i)
            mean[i] = static_cast<T>(static_cast<T>(mean[i]) + sum[i] / std::max(count[i], 1.0));
      }
      set_affines(side);
    }
  }

  // What standardises each pixel of a side, from the sums of deviations from the means so far, and of their squares.
  void set_affines(int side) {
    auto& [count, mean, sum, square] = scratch_.moments;
    bool right[kMostPixels];
    for (int i = 0; i < tile_; ++i) {
      const double there = std::max(count[i], 1.0);
      right[i] = square[i] >= kLeastSquare * there && square[i] < INFINITY;
      square[i] = std::max(square[i] - sum[i] * sum[i] / there, 0.0);
      mean[i] = static_cast<T>(mean[i]) + sum[i] / there;
    }
    for (int i = 0; i < count_; ++i) {
      if (right[i]) continue;
      const Moments<double> exact = sample_moments(side, i);
      count[i] = exact.count;
      mean[i] = exact.mean;
      square[i] = exact.m2;
    }
    for (int i = 0; i < tile_; ++i) {
      const double factor = o_.factor(count[i], square[i]);
      const Affine<T> affine(mean[i], factor);
      scratch_.high[side][i] = affine.high;
      scratch_.factor[side][i] = affine.factor;
      scratch_.offset[side][i] = affine.offset;
      if (side == 1) continue;
      const double degrees = o_.degrees(count[i]), deviation = std::sqrt(square[i] / degrees);
      scratch_.unit_slope[i] = static_cast<T>(deviation == 0 ? 0 : 1 / (deviation * factor * degrees));
    }
  }

  // The moments of one pixel of the tile, slowly, whatever the size of its logits.
  Moments<double> sample_moments(int side, int i) const {
    const Matrix& matrix = side ? p_.teacher : p_.student;
    const void* pixel = element(p_, matrix, first_ + i);
    return moments_in_double(p_.classes, [&](int64_t j) {
      T held;
      return *read_classes(matrix, pixel, j, 1, &held);
    });
  }

  // Selects the leading classes of a term by the teacher.
  void set_leaders(int t) {
    const Term& term = o_.term[t];
    PixelLeaders<T>& leaders = scratch_.leaders[t];
    if (term.kind == PartitionKind::target) std::copy_n(scratch_.target, tile_, leaders.first);
    if (!term.by_rank()) return;
    term.k <= kFewLeaders ? select_few(term, leaders) : select_many(term, leaders);
  }

  // By an insertion sort of vectors of pixels.
  void select_few(const Term& term, PixelLeaders<T>& leaders) {
    const int k = term.k;
    // Of each vector of pixels, place by place: the values, then the classes. NaN marks a place that is still empty.
    T* best = scratch_.ranking.data(2 * k * tile_);
    std::fill_n(best, 2 * k * tile_, T(NAN));
    each_chunk([&](int64_t begin, int64_t end) {
      load_side(1, begin, end, logits_[1]);
      for (int i = 0; i < tile_; i += W)
        for (int64_t j = begin; j < end; ++j) {
          T* place = best + 2 * k * i;
          T* last = place + 2 * W * (k - 1);
          Vec<T> value = rank_value<T>(load(logits_[1] + (j - begin) * pitch_ + i), term.largest);
          Vec<T> index = broadcast(static_cast<T>(j));
          if (j >= k && not_less<T>(load(last), value) == (uint64_t{1} << W) - 1) continue;
          for (; place <= last; place += 2 * W) {
            const Vec<T> held = load(place), held_index = load(place + W);
            const auto stays = (held > value) | ((held == value) & (held_index < index));
            store(place, stays ? held : value);
            store(place + W, stays ? held_index : index);
            value = stays ? value : held;
            index = stays ? index : held_index;
          }
        }
    });
    for (int i = 0; i < tile_; i += W) {
      const T *first = best + 2 * k * i, *last = first + 2 * W * (k - 1);
      store(leaders.first + i, load(first + W));
      store(leaders.bound + i, load(last));
      store(leaders.last + i, load(last + W));
    }
  }

  // By partitioning each pixel's own classes.
  void select_many(const Term& term, PixelLeaders<T>& leaders) {
    const int64_t room = 2 * static_cast<int64_t>(term.k);
    Key<T>* keys = scratch_.keys.data(room * count_);
    std::vector<BestOf<T>> best;
    for (int i = 0; i < count_; ++i) best.emplace_back(keys + i * room, term.k);
    each_chunk([&](int64_t begin, int64_t end) {
      load_side(1, begin, end, logits_[1]);
      T values[kMostPixels];
      for (int64_t j = begin; j < end; ++j) {
        const T* plane = logits_[1] + (j - begin) * pitch_;
        for (int i = 0; i < tile_; i += W) store(values + i, rank_value<T>(load(plane + i), term.largest));
        for (int i = 0; i < count_; ++i) best[i].add(values[i], j);
      }
    });
    for (T* lanes : {leaders.first, leaders.bound, leaders.last}) std::fill_n(lanes, tile_, T(0));
    for (int i = 0; i < count_; ++i) {
      best[i].cut();
      leaders.first[i] = static_cast<T>(index_of<T>(best[i].first()));
      leaders.bound[i] = value_of<T>(best[i].last());
      leaders.last[i] = static_cast<T>(index_of<T>(best[i].last()));
    }
  }

  // Calls body with the partition's kind as a type.
  template <class Body>
  static void with_kind(PartitionKind kind, const Body& body) {
    switch (kind) {
      case PartitionKind::whole: return body(std::integral_constant<PartitionKind, PartitionKind::whole>{});
      case PartitionKind::target: return body(std::integral_constant<PartitionKind, PartitionKind::target>{});
      case PartitionKind::topk: return body(std::integral_constant<PartitionKind, PartitionKind::topk>{});
      case PartitionKind::top1_topk: return body(std::integral_constant<PartitionKind, PartitionKind::top1_topk>{});
    }
  }

  // Step 1 of the chunk at hand, for one term.
  void add_term(int t) {
    const Term& term = o_.term[t];
    PixelStats* part = begin_ == 0 ? scratch_.stats[t] : scratch_.part[t];
    with_kind(term.kind, [&](auto kind) {
      set_origins<kind()>(t, part);
      term.wants_reverse() ? exponentiate<kind(), true, true>(t, part) : exponentiate<kind(), true, false>(t, part);
    });
    for (int g = 0; g < term.groups(); ++g) {
      if (term.group_size(g, p_.classes) == 1) settle_single(part[g]);
      if (begin_ == 0) continue;
      for (int i = 0; i < count_; ++i) {
        GroupStats<double> total = scratch_.stats[t][g].lane(i);
        merge(total, part[g].lane(i), unit(t));
        scratch_.stats[t][g].set_lane(i, total);
      }
    }
  }

  // Exponentials count from their group's maximum in the chunk.
  template <PartitionKind Kind>
  void set_origins(int t, PixelStats* stats) const {
    constexpr int G = groups_of(Kind);
    const Vec<T> nothing = broadcast(T(-INFINITY));
    bool single[G];
    for (int g = 0; g < G; ++g) single[g] = o_.term[t].group_size(g, p_.classes) == 1;
    for (int i = 0; i < tile_; i += W) {
      const PixelGroups<T, Kind> groups(scratch_.leaders[t], o_.term[t].largest, i);
      Vec<T> student_top[G], teacher_top[G];
      for (int g = 0; g < G; ++g) student_top[g] = teacher_top[g] = nothing;
      for (int j = 0; j < classes_; ++j) {
        const Vec<T> s = load(logits_[0] + j * pitch_ + i), u = load(logits_[1] + j * pitch_ + i);
        const auto members = groups.of(static_cast<T>(begin_ + j), u);
        for (int g = 0; g < G; ++g) {
          const auto add = [&](Vec<T>& top, Vec<T> v) INLINED {
            if (single[g]) {
              top = members.choose(g, v, top);  // NaN too
            } else {
              top = max(members.choose(g, v, nothing), top);
            }
          };
          add(student_top[g], s);
          add(teacher_top[g], u);
        }
      }
      for (int g = 0; g < G; ++g) {
        store_widened(stats[g].student_origin + i, student_top[g]);
        store_widened(stats[g].teacher_origin + i, teacher_top[g]);
      }
    }
  }

  void settle_single(PixelStats& stats) const {
    for (int i = 0; i < tile_; ++i) {
      stats.student_sum[i] = single_sum(stats.student_origin[i]);
      stats.teacher_sum[i] = single_sum(stats.teacher_origin[i]);
    }
  }

  // Exponentials of the chunk at hand, counted from the groups' origins, and their sums.
  template <PartitionKind Kind, bool Sums, bool Reverse>
  void exponentiate(int t, PixelStats* stats) const {
    constexpr int G = groups_of(Kind);
    constexpr int first_summed = Kind == PartitionKind::target ? 1 : 0;
    const T k = exponent(t);
    for (int i = 0; i < tile_; i += W) {
      const PixelGroups<T, Kind> groups(scratch_.leaders[t], o_.term[t].largest, i);
      const Vec<T> nothing{}, infinite = broadcast(T(INFINITY));
      Vec<T> student_start[G], teacher_start[G];
      for (int g = 0; g < G; ++g) {
        const Vec<T> s = load_narrowed<T>(stats[g].student_origin + i);
        const Vec<T> u = load_narrowed<T>(stats[g].teacher_origin + i);
        student_start[g] = s == -infinite ? nothing : s;
        teacher_start[g] = u == -infinite ? nothing : u;
      }
      WideSum<T> student_sum[G], teacher_sum[G], teacher_gap[G], student_gap[G];
      TileAhead ahead{next_tile(0, i), next_tile(1, i), ahead_step(p_.student), ahead_step(p_.teacher)};
      const bool fetches = i * sizeof(T) % 64 == 0;  // a line once
      for (int j = 0; j < classes_; ++j) {
        const int at = j * pitch_ + i;
        const Vec<T> teacher = load(logits_[1] + at);
        const auto members = groups.of(static_cast<T>(begin_ + j), teacher);
        const Vec<T> xs = load(logits_[0] + at) - members.pick(student_start);
        const Vec<T> xt = teacher - members.pick(teacher_start);
        const Vec<T> es = exp2(xs * k), et = exp2(xt * k), gap = xt - xs;
        store(exps_[t][0] + at, es);
        store(exps_[t][1] + at, et);
        if constexpr (!Sums) continue;
        if (fetches) ahead.fetch();
        // As in GroupSums: a masked class adds nothing, one that only the other side masks perhaps NaN.
        const Vec<T> forward = xt == -infinite ? nothing : et * gap, reverse = xs == -infinite ? nothing : es * gap;
        for (int g = first_summed; g < G; ++g) {
          const auto add = [&](WideSum<T>& sum, Vec<T> value) INLINED { sum.add(members.choose(g, value, nothing)); };
          add(student_sum[g], es);
          add(teacher_sum[g], et);
          add(teacher_gap[g], forward);
          if constexpr (Reverse) add(student_gap[g], reverse);
        }
      }
      if constexpr (!Sums) continue;
      for (int g = 0; g < G; ++g) {
        student_sum[g].write(stats[g].student_sum + i);
        teacher_sum[g].write(stats[g].teacher_sum + i);
        teacher_gap[g].write(stats[g].teacher_gap + i, k);
        student_gap[g].write(stats[g].student_gap + i, k);
      }
    }
  }

  static int64_t plane_bytes(const Matrix& matrix) { return matrix.class_stride * dtype_size(matrix.dtype); }
  int64_t sample_bytes(const Matrix& matrix) const {
    return matrix.sample_stride[p_.dims - 1] * dtype_size(matrix.dtype);
  }

  // Where the next tile's pixels from the i-th on lie, in the chunk's first plane.
  const char* next_tile(int side, int i) const {
    const Matrix& matrix = side ? p_.teacher : p_.student;
    return static_cast<const char*>(side_[side]) + begin_ * plane_bytes(matrix) + (tile_ + i) * sample_bytes(matrix);
  }
  // From there to the next plane, or through the rows of a line of lanes, class by class.
  int64_t ahead_step(const Matrix& matrix) const {
    constexpr int line = 64 / sizeof(T);
    return side_by_side(p_, matrix) ? plane_bytes(matrix) : line * sample_bytes(matrix) / classes_;
  }

  // The student's softmax at T = 1 over the chunk at hand, and its logit of the target.
  void add_softmax() {
    const T* planes = raw();
    const T k = static_cast<T>(kLog2E);
    for (int i = 0; i < tile_; i += W) {
      const Vec<T> target = load(scratch_.target + i), nothing = broadcast(T(-INFINITY));
      Vec<T> top = nothing, at_target{};
      for (int j = 0; j < classes_; ++j) {
        const Vec<T> v = load(planes + j * pitch_ + i);
        top = max(v, top);
        at_target = target == static_cast<T>(begin_ + j) ? v : at_target;
      }
      alignas(64) double tops[W], own[W], sums[W] = {};
      store_widened(tops, top);
      store_widened(own, at_target);
      const Vec<T> from = top == nothing ? Vec<T>{} : top;
      for (int begin = 0; begin < classes_; begin += kFlushClasses) {
        Vec<T> sum{};
        for (int j = begin; j < std::min(begin + kFlushClasses, classes_); ++j)
          sum += exp2((load(planes + j * pitch_ + i) - from) * k);
        add_widened(sums, sum);
      }
      for (int l = 0; l < W; ++l) {
        SoftmaxStats<double> total;
        if (begin_ > 0) total = {scratch_.ce_origin[i + l], scratch_.ce_sum[i + l]};
        merge(total, {tops[l], sums[l]}, kLog2E);
        scratch_.ce_origin[i + l] = total.origin;
        scratch_.ce_sum[i + l] = total.sum;
        scratch_.ce_at_target[i + l] = own[l] + (begin_ > 0 ? scratch_.ce_at_target[i + l] : 0);
      }
    }
  }

  // Step 2 of all pixels: losses, their parts and the gradients' coefficients.
  void finish() {
    constexpr int D = kLanes<double>;
    for (int i = 0; i < count_; i += D) {
      const Doubles weight = load(scratch_.weight + i);
      // Coefficients of pixels that do not count are 0, whatever their logits.
      const auto keep = [&](T* to, Doubles value) { store_narrowed(to + i, weight == 0 ? Doubles{} : value * weight); };
      Doubles loss{}, ce{};
      if (o_.has_ce()) {
        const Doubles origin = load(scratch_.ce_origin + i), sum = load(scratch_.ce_sum + i);
        ce = log(sum) - (load(scratch_.ce_at_target + i) - (origin == -INFINITY ? Doubles{} : origin));
        loss = o_.ce_weight * ce;
        keep(scratch_.ce_factor, broadcast(o_.ce_weight));
        keep(scratch_.ce_softmax, o_.ce_weight / sum);
      }
      store_values(i, 1, &ce, 1);
      int64_t first_part = 2;
      for (int t = 0; t < o_.terms; ++t) {
        const Term& term = o_.term[t];
        GroupStats<Doubles> stats[kMaxGroups];
        for (int g = 0; g < term.groups(); ++g) stats[g] = scratch_.stats[t][g].lanes(i);
        const CentredTermResult<Doubles> result = evaluated(term, stats, p_.classes, unit(t));
        loss += result.loss;
        for (int g = 0; g < term.groups(); ++g) {
          PixelCoefficients<T>& by = scratch_.by[t][g];
          Doubles student = result.student_level[g], tilt{}, mean_gap{};
          if (term.group[g].reverse != 0) {
            tilt = result.group[g].tilt * unit(t);
            mean_gap = result.mean_gap[g] / unit(t);
            store_narrowed(by.mean_gap + i, mean_gap);
            student += tilt * lost_in_rounding(load_widened(by.mean_gap + i), mean_gap);
          }
          store_narrowed(by.mean_gap + i, mean_gap);
          keep(by.student, student);
          keep(by.tilt, tilt);
          keep(by.teacher, result.group[g].teacher);
        }
        store_values(i, first_part, result.parts, term.parts());
        first_part += term.parts();
      }
      store_values(i, 0, &loss, 1);
    }
  }

  // Values of a vector of pixels: each one's, or added to the tile's totals. Losses go first, parts follow if wanted.
  void store_values(int i, int64_t first_value, const Doubles* values, int count) const {
    if (!forward_ || (first_value > 0 && !p_.parts)) return;
    const Doubles weight = load(scratch_.weight + i);
    const int64_t width = value_count(p_);
    for (int v = 0; v < count; ++v) {
      const Doubles counted = weight == 0 ? Doubles{} : values[v];
      if (totals_) {
        totals_[first_value + v] += horizontal_sum(weight * counted);
        continue;
      }
      for (int l = 0; l < std::min(kLanes<double>, count_ - i); ++l)
        p_.values[(first_ + i + l) * width + first_value + v] = counted[l];
    }
  }

  // The terms' gradient in the logits they see, for one chunk.
  void term_gradient(int64_t begin, int64_t end) {
    if (!one_chunk()) load_chunk(begin, end);
    for (int t = 0; t < o_.terms; ++t)
      with_kind(o_.term[t].kind, [&](auto kind) {
        if (!one_chunk()) exponentiate<kind(), false, false>(t, scratch_.stats[t]);
        o_.term[t].tilted() ? add_gradient<kind(), true>(t) : add_gradient<kind(), false>(t);
      });
  }

  template <PartitionKind Kind, bool Tilt>
  void add_gradient(int t) const {
    constexpr int G = groups_of(Kind);
    for (int i = 0; i < tile_; i += W) {
      const PixelGroups<T, Kind> groups(scratch_.leaders[t], o_.term[t].largest, i);
      Vec<T> student[G], tilt[G], teacher[G], mean_gap[G], origin[2][G];
      for (int g = 0; g < G; ++g) {
        student[g] = load(scratch_.by[t][g].student + i);
        tilt[g] = load(scratch_.by[t][g].tilt + i);
        teacher[g] = load(scratch_.by[t][g].teacher + i);
        mean_gap[g] = load(scratch_.by[t][g].mean_gap + i);
        origin[0][g] = load_narrowed<T>(scratch_.stats[t][g].student_origin + i);
        origin[1][g] = load_narrowed<T>(scratch_.stats[t][g].teacher_origin + i);
        for (Vec<T>& start : {std::ref(origin[0][g]), std::ref(origin[1][g])})
          start = start == -INFINITY ? Vec<T>{} : start;
      }
      for (int j = 0; j < classes_; ++j) {
        const int at = j * pitch_ + i;
        const Vec<T> logit = load(logits_[1] + at);
        const auto members = groups.of(static_cast<T>(begin_ + j), logit);
        const Vec<T> es = load(exps_[t][0] + at), et = load(exps_[t][1] + at);
        Vec<T> by = members.pick(student);
        if constexpr (Tilt) {
          // A class without probability has no gradient, and one without tilt no gap, however infinite that is.
          const Vec<T> gap = (logit - members.pick(origin[1])) - (load(logits_[0] + at) - members.pick(origin[0]));
          const Vec<T> tilted = members.pick(tilt);
          by = es == 0 ? Vec<T>{} : tilted == 0 ? by : by + tilted * (gap - members.pick(mean_gap));
        }
        const Vec<T> gradient = es * by - et * members.pick(teacher);
        store(gradient_ + at, t == 0 ? gradient : gradient + load(gradient_ + at));
      }
    }
  }

  // The slope of the chain rule through each pixel's standardisation.
  void set_slope() {
    alignas(64) double total[kMostPixels] = {};
    each_chunk([&](int64_t begin, int64_t end) {
      term_gradient(begin, end);
      for (int i = 0; i < tile_; i += W)
        for (int from = 0; from < classes_; from += kFlushClasses) {
          Vec<T> sum{};
          for (int j = from; j < std::min(from + kFlushClasses, classes_); ++j) {
            const Vec<T> h = load(logits_[0] + j * pitch_ + i);
            sum += h == -INFINITY ? Vec<T>{} : h * load(gradient_ + j * pitch_ + i);
          }
          add_widened(total + i, sum);
        }
    });
    for (int i = 0; i < tile_; ++i) scratch_.slope[i] = scratch_.unit_slope[i] * static_cast<T>(total[i]);
  }

  // Adds the chunk's shares in the sums over pixels.
  void add_class_sums() {
    for (int j = 0; j < classes_; ++j) {
      Vec<T> sum{}, product{};
      for (int i = 0; i < tile_; i += W) {
        const Vec<T> h = load(logits_[0] + j * pitch_ + i), valid = load(scratch_.valid + i);
        const Vec<T> kept = valid == 0 ? broadcast(T(-INFINITY)) : h;  // nothing comes from masked classes either
        const Vec<T> gradient = kept == -INFINITY ? Vec<T>{} : load(gradient_ + j * pitch_ + i);
        sum += gradient;
        product += kept == -INFINITY ? Vec<T>{} : gradient * h;
      }
      sums_->add(begin_ + j, sum, product);
    }
  }

  // Step 3 of a chunk: what the terms' gradient becomes in the student's logits, written where it belongs.
  void write() {
    for (int j = 0; j < classes_; ++j) {
      T* plane = gradient_ + j * pitch_;
      const int64_t c = begin_ + j;
      for (int i = 0; i < tile_; i += W) {
        Vec<T> gradient = load(plane + i);
        const Vec<T> h = load(logits_[0] + j * pitch_ + i);
        if (o_.standardize == Standardize::by_class)
          gradient = chain<T>(gradient, h, broadcast(by_class_.level()[c]), broadcast(by_class_.slope()[c]),
                              broadcast(by_class_[0].factor[c]));
        if (o_.standardize == Standardize::by_sample)
          gradient = chain<T>(gradient, h, Vec<T>{}, load(scratch_.slope + i), load(scratch_.factor[0] + i));
        if (o_.has_ce()) {
          const Vec<T> from = load_narrowed<T>(scratch_.ce_origin + i);
          const Vec<T> e = exp2((load(raw() + j * pitch_ + i) - (from == -INFINITY ? Vec<T>{} : from)) * T(kLog2E));
          const Vec<T> hit = load(scratch_.target + i) == T(c) ? load(scratch_.ce_factor + i) : Vec<T>{};
          gradient += e * load(scratch_.ce_softmax + i) - hit;
        }
        if (!all_valid_) gradient = load(scratch_.valid + i) == 0 ? Vec<T>{} : gradient;
        store(plane + i, gradient);
      }
      if (side_by_side(p_, p_.gradient)) put(plane, c);
    }
    if (!side_by_side(p_, p_.gradient))
      write_rows(p_, p_.gradient, block(begin_, begin_ + classes_), rows_, planes(gradient_));
  }

  // Writes a plane's gradient where it belongs.
  void put(const T* plane, int64_t c) const {
    with_dtype(p_.gradient.dtype, [&](auto type) {
      using Element = decltype(type);
      auto* to = static_cast<Element*>(out_) + c * p_.gradient.class_stride;
      if constexpr (std::is_same_v<Element, float> && std::is_same_v<T, float>) {
        if (streams_ && count_ == tile_ && reinterpret_cast<uintptr_t>(to) % sizeof(Vec<T>) == 0) {
          for (int i = 0; i < tile_; i += W) stream(to + i, load(plane + i));
          return;
        }
      }
      narrow_all(plane, count_, to);
    });
  }

  // No gradient for classes from `begin` on.
  void clear(int64_t begin) const {
    if (!p_.gradient.data || p_.gradient_is_zero) return;
    with_dtype(p_.gradient.dtype, [&](auto type) {
      using Element = decltype(type);
      const int64_t end = p_.gradient_classes, stride = p_.gradient.class_stride;
      if (side_by_side(p_, p_.gradient)) {
        for (int64_t j = begin; j < end; ++j) std::fill_n(static_cast<Element*>(out_) + j * stride, count_, Element{});
      } else {
        for (int i = 0; i < count_ && begin < end; ++i) {
          auto* sample = static_cast<Element*>(element(p_, p_.gradient, first_ + i));
          for (int64_t j = begin; j < end; ++j) sample[j * stride] = Element{};
        }
      }
    });
  }

  const Problem& p_;
  const Objective& o_;
  const ClassStandardization<T>& by_class_;
  PixelScratch<T>& scratch_;
  PixelSums<T>* sums_;
  bool streams_ = false;  // the gradient past the caches
  const bool forward_;    // or backward, from what was saved
  const int tile_;        // pixels of a tile, some of which may be missing
  const int pitch_;      // from plane to plane in scratch: no power of two, or the planes would share their place in L1
  const int64_t chunk_;  // classes of a chunk
  // Of the chunk at hand, plane by plane: logits of both sides, raw ones, exponentials of each term, the gradient. And
  // row by row: what has to be converted before or after it is transposed.
  T *logits_[2], *raw_, *rows_, *exps_[kMaxTerms][2], *gradient_;
  int64_t begin_ = 0;
  int classes_ = 0;
  // Of the tile at hand.
  int64_t first_ = 0;
  int count_ = 0;
  double* totals_ = nullptr;
  bool all_valid_ = true;
  const void* side_[2];
  void* out_ = nullptr;
};

// Calls ---------------------------------------------------------------------------------------------------------------

// All tiles. Sums over samples are those of blocks of tiles, block by block: in the same order whatever the threads.
template <class T>
void run_pixels(const Problem& p, const Parallel& parallel, double* class_sums) {
  const ClassStandardization<T> classes(p, parallel);
  const PixelRuns tiles(p, PixelWorker<T>::tile_pixels(p));
  constexpr int64_t kBlockLogits = 1 << 18;
  const int64_t most_blocks = class_sums ? Blocks::kMostBlocks : tiles.count * tiles.pixels * p.classes / kBlockLogits;
  const int64_t blocks = std::clamp<int64_t>(most_blocks, 1, tiles.count);
  const int64_t values = p.totals ? value_count(p) : 0, sums = class_sums ? 2 * p.classes : 0;
  std::vector<double> partial(blocks * (values + sums));
  parallel.run(0, blocks, 1, [&](int64_t begin, int64_t end) {
    auto& sums_of_thread = PixelSums<T>::of_this_thread();
    PixelWorker<T> worker(p, classes, class_sums ? &sums_of_thread : nullptr);
    for (int64_t block = begin; block < end; ++block) {
      double* out = partial.data() + block * (values + sums);
      if (class_sums) sums_of_thread.start(p.classes, out + values);
      for (int64_t i = block * tiles.count / blocks; i < (block + 1) * tiles.count / blocks; ++i)
        worker.run(tiles.first(i), tiles.size(i), p.totals ? out : nullptr);
      if (class_sums) sums_of_thread.flush();
    }
  });
  if (p.totals) std::fill_n(p.totals, values, 0.0);
  if (class_sums) std::fill_n(class_sums, sums, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    const double* part = partial.data() + block * (values + sums);
    for (int64_t v = 0; v < values; ++v) p.totals[v] += part[v];
    for (int64_t j = 0; j < sums; ++j) class_sums[j] += part[values + j];
  }
}

// Count, mean and M2 of each class, plane by plane.
template <class T>
void pixel_moments(const Problem& p, const Parallel& parallel, double* moments) {
  constexpr int kRun = 1024;  // pixels that are gone through twice while they are in cache
  const PixelRuns runs(p, kRun);
  const int64_t blocks = std::min(runs.count, Blocks::kMostBlocks), size = 2 * p.classes;
  std::vector<Moments<double>> partial(blocks * size);
  parallel.run(0, blocks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) T scratch[kRun];
    for (int64_t block = begin; block < end; ++block)
      for (int64_t run = block * runs.count / blocks; run < (block + 1) * runs.count / blocks; ++run) {
        const int64_t first = runs.first(run);
        const int count = runs.size(run);
        bool valid[kRun];
        for (int i = 0; i < count; ++i) valid[i] = p.weight(first + i) != 0;
        const bool all = std::find(valid, valid + count, false) == valid + count;
        for (int side = 0; side < 2; ++side) {
          const Matrix& matrix = side ? p.teacher : p.student;
          const void* pixels = element(p, matrix, first);
          for (int64_t j = 0; j < p.classes; ++j) {
            const T* logits = read_pixels(matrix, pixels, j, count, scratch);
            if (!all) {  // masked logits count in no moments
              for (int i = 0; i < count; ++i) scratch[i] = valid[i] ? logits[i] : T(-INFINITY);
              logits = scratch;
            }
            merge(partial[block * size + side * p.classes + j], moments_of(logits, count));
          }
        }
      }
  });
  for (int64_t j = 0; j < size; ++j) {
    Moments<double> total;
    for (int64_t block = 0; block < blocks; ++block) merge(total, partial[block * size + j]);
    double* out = moments + j / p.classes * 3 * p.classes + j % p.classes;
    out[0] = total.count;
    out[p.classes] = total.mean;
    out[2 * p.classes] = total.m2;
  }
}
