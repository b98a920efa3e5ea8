// Kernels on tiles, some classes of one row that fit in L1: sums, selections and gradients. Built once per instruction
// set (see simd.h).

constexpr int kTile = 2048;  // classes of a tile: both sides and the gradient stay in L1

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
inline int padded(int64_t count) {
  return static_cast<int>(ceil_div(count, kLanes<T>) * kLanes<T>);
}

inline int64_t dtype_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Calls body with a value of the element type that `dtype` names.
template <class Body>
inline void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::f16: return body(Half{});
    case DType::bf16: return body(BFloat16{});
  }
}

// Where a sample starts, in elements.
inline int64_t sample_offset(const Problem& problem, const Matrix& matrix, int64_t sample) {
  int64_t offset = 0;
  for (int d = problem.dims - 1; d > 0; --d) {
    offset += sample % problem.sample_size[d] * matrix.sample_stride[d];
    sample /= problem.sample_size[d];
  }
  return offset + sample * matrix.sample_stride[0];
}

inline void* element(const Problem& problem, const Matrix& matrix, int64_t sample) {
  return static_cast<char*>(matrix.data) + sample_offset(problem, matrix, sample) * dtype_size(matrix.dtype);
}

// Whether the arithmetic is in this type.
template <class T>
inline bool is_arithmetic(DType dtype) {
  return dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32);
}

// Classes of a row: in place, or in `to` where they have to be converted or gathered.
template <class T>
const T* read_classes(const Matrix& matrix, const void* row, int64_t begin, int count, T* to) {
  if (matrix.class_stride == 1 && is_arithmetic<T>(matrix.dtype)) return static_cast<const T*>(row) + begin;
  with_dtype(matrix.dtype, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(row) + begin * matrix.class_stride;
    if (matrix.class_stride == 1) {
      widen_all(from, count, to);
    } else {
      for (int i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i * matrix.class_stride]));
    }
  });
  return to;
}

// A growing array of whole vectors.
template <class T>
class Buffer {
 public:
  T* data(int64_t count) {
    if (count > size_) {
      data_.reset(static_cast<T*>(std::aligned_alloc(64, ceil_div(count * sizeof(T), 64) * 64)));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0;
};

// Kernels on tiles -------------------------------------------------------------------------------------------------

// Classes of a tile: the first `count`, without the `hidden` ones (ascending).
struct Classes {
  int count;
  const int* hidden = nullptr;
  int hidden_count = 0;
};

#define INLINED __attribute__((always_inline))  // of lambdas

constexpr int kRun = 2 * kLanes<float>;  // vectors between flushes: with fewer lanes, longer chains would round more
constexpr int kMaskedClasses = 128;      // from so many on masks cost less than gaps in the loop

// Calls body(i, lanes, chain) for each vector of classes; two chains of dependent operations keep the pipelines full.
// Calls flush() after every run of vectors and at the end, so that chains of roundings can be kept short.
template <class T, class Body, class Flush>
inline __attribute__((always_inline)) void each_vector(const Classes& classes, const Body& body, const Flush& flush) {
  constexpr int W = kLanes<T>;
  constexpr AllLanes all;
  const int *hidden = classes.hidden, *hidden_end = hidden + classes.hidden_count;
  int i = 0, run_end = kRun * W;
  const auto pairs_until = [&](int end, const auto& lanes_at) INLINED {
    while (i + 2 * W <= end) {
      for (const int until = std::min(end, run_end); i + 2 * W <= until; i += 2 * W) {
        body(i, lanes_at(i), 0);
        body(i + W, lanes_at(i + W), 1);
      }
      if (i + 2 * W <= end) {
        flush();
        run_end = i + kRun * W;
      }
    }
  };
  if (kHasLaneMasks && classes.hidden_count > 0 && classes.count >= kMaskedClasses) {
    SeenLanes seen[kTile / W];
    const int end = classes.count / (2 * W) * 2 * W;
    std::fill_n(seen, end / W, SeenLanes{static_cast<Lanes>((uint64_t{1} << W) - 1)});
    for (; hidden < hidden_end && *hidden < end; ++hidden) seen[*hidden / W].bits &= ~(Lanes{1} << *hidden % W);
    pairs_until(end, [&](int at) INLINED { return seen[at / W]; });
  }
  while (i < classes.count) {  // whole vectors as far as nothing is hidden, then one with what is there
    const int whole = (hidden < hidden_end ? *hidden : classes.count) / W * W;
    pairs_until(whole, [&](int) INLINED { return all; });
    if (i < whole) {
      body(i, all, 0);
      i += W;
    }
    if (i == classes.count) break;
    Lanes lanes = (uint64_t{1} << std::min(W, classes.count - i)) - 1;
    for (; hidden < hidden_end && *hidden < i + W; ++hidden) lanes &= ~(Lanes{1} << (*hidden - i));
    body(i, lanes, 1);
    i += W;
  }
  flush();
}
template <class T, class Body>
inline __attribute__((always_inline)) void each_vector(const Classes& classes, const Body& body) {
  each_vector<T>(classes, body, [] {});
}

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

// Logits of a tile as a kernel reads them: as they are, or standardised by class on the way.
template <class T>
struct Source {
  const T* logits = nullptr;
  ClassAffines<T> affine = {};

  template <bool ByClass, class Which>
  Vec<T> at(int i, Which lanes) const {
    return standardized<ByClass>(i, load(logits + i, lanes));
  }
  template <bool ByClass, class Which>
  Vec<T> seen_at(int i, Which lanes) const {
    return standardized<ByClass>(i, load_seen(logits + i, lanes));
  }

 private:
  template <bool ByClass>
  Vec<T> standardized(int i, Vec<T> v) const {
    if constexpr (ByClass) return affine.at(i, v);
    return v;
  }
};

template <class T, bool ByClass>
T max_of(const Source<T>& source, const Classes& classes) {
  Vec<T> m[2] = {broadcast(T(-INFINITY)), broadcast(T(-INFINITY))};
  each_vector<T>(classes, [&](int i, auto lanes, int chain) INLINED {
    m[chain] = max(source.template at<ByClass>(i, lanes), m[chain]);
  });
  return horizontal_max<T>(max(m[0], m[1]));
}
template <class T>
T tile_max(const Source<T>& source, const Classes& classes) {
  return source.affine.high ? max_of<T, true>(source, classes) : max_of<T, false>(source, classes);
}

// The exponentials of a tile, kept for its gradient.
template <class T>
struct Exps {
  T* student = nullptr;
  T* teacher = nullptr;
  T* gap = nullptr;
};

// Memory that the next tile will come from, and that the gradient will soon go to: fetched while the arithmetic on this
// tile leaves the load ports idle.
struct Ahead {
  static constexpr char nothing = 0;  // a null pointer would be looked up in vain each time
  const char* student = &nothing;
  const char* teacher = &nothing;
  const char* gradient = &nothing;
  int64_t student_step = 0, teacher_step = 0, gradient_step = 0;  // bytes a class

  // What lies ahead of the vector from class i on. Where two vectors are a line, the first chain's fetch both.
  void fetch(int64_t i, int chain) const {
    if (KDK_VECTOR_BYTES < 64 && chain > 0) return;
    __builtin_prefetch(student + i * student_step);
    __builtin_prefetch(teacher + i * teacher_step);
    __builtin_prefetch(gradient + i * gradient_step, 1);
  }
};

// A sum of vectors in two chains, carried on in double precision: a few thousand roundings in float would show.
template <class T>
struct ChainedSum {
  Vec<T> chain[2]{};
  Vec<double> wide{};

  void flush() {
    if constexpr (sizeof(T) == 8) {
      wide += chain[0] + chain[1];
    } else {
      wide += doubles_of(chain[0], 0) + doubles_of(chain[0], 1);
      wide += doubles_of(chain[1], 0) + doubles_of(chain[1], 1);
    }
    chain[0] = chain[1] = Vec<T>{};
  }
  double total() const { return horizontal_sum(wide); }
};

// The sums of one group at one temperature.
template <class T, bool Reverse>
struct GroupSums {
  ChainedSum<T> student_sum, teacher_sum, teacher_gap, student_gap;

  // A masked class adds nothing, however infinite its gap: where there may be such. One that only the other side masks
  // has an infinite gap, and adds NaN where its exponential underflows: see settle_masked_classes().
  template <bool MayBeMasked>
  __attribute__((always_inline)) void add(int chain, Vec<T> es, Vec<T> et, Vec<T> xs, Vec<T> xt) {
    const Vec<T> gap = xt - xs;
    const auto add_gap = [&](Vec<T>& sum, Vec<T> e, Vec<T> x) INLINED {
      sum = MayBeMasked ? (x == -INFINITY ? sum : sum + e * gap) : sum + e * gap;
    };
    student_sum.chain[chain] += es;
    teacher_sum.chain[chain] += et;
    add_gap(teacher_gap.chain[chain], et, xt);
    if constexpr (Reverse) add_gap(student_gap.chain[chain], es, xs);
  }
  void flush() {
    student_sum.flush();
    teacher_sum.flush();
    teacher_gap.flush();
    if constexpr (Reverse) student_gap.flush();
  }
  // `gaps`: what a gap counts for.
  void add_to(GroupStats<double>& stats, double gaps) const {
    stats.student_sum += student_sum.total();
    stats.teacher_sum += teacher_sum.total();
    stats.teacher_gap += gaps * teacher_gap.total();
    if constexpr (Reverse) stats.student_gap += gaps * student_gap.total();
  }
};

// What the exponentials of a term also serve: nothing, a term at half the temperature, for which they are squared, or
// the student's softmax at T = 1.
enum class Also { nothing, squares, softmax };

// The power of a temperature of 1, 2 or 4, by that many squarings: the exponential at T = 1.
template <class T>
inline Vec<T> squared(Vec<T> e, int times) {
  if (times > 0) e *= e;
  if (times > 1) e *= e;
  return e;
}

// Where the sums of a tile are added: those of the term and of what else is served.
struct SumsTo {
  GroupStats<double>& stats;
  GroupStats<double>* squares = nullptr;
  SoftmaxStats<double>* softmax = nullptr;
  int squarings = 0;
};

// What was there before.
class SumsBefore {
 public:
  explicit SumsBefore(const SumsTo& to) : stats_(to.stats) {
    if (to.squares) squares_ = *to.squares;
    if (to.softmax) softmax_ = *to.softmax;
  }
  void restore(const SumsTo& to) const {
    to.stats = stats_;
    if (to.squares) *to.squares = squares_;
    if (to.softmax) *to.softmax = softmax_;
  }

 private:
  GroupStats<double> stats_, squares_;
  SoftmaxStats<double> softmax_;
};

// Adds a tile's sums to statistics. A class's exponential is 2^(k * (logit - origin)), with a logit near the maximum as
// origin: the difference of logits that are close is exact, however large they are. Gaps are differences of logits
// here, which stay finite where an exponent does not.
//
// `Careful` is right for every logit, if the origins are no smaller than the tile's
// maxima; without, sums that pass `plausible` are right, for any origins.
template <class T, bool ByClass, bool Reverse, Also Serves, bool Keep, bool Careful>
void add_sums(const Source<T>& student, const Source<T>& teacher, const Classes& classes, T k, const SumsTo& to,
              const Exps<T>& exps, const Ahead& ahead) {
  const Vec<T> student_start = broadcast(T(start(to.stats.student_origin)));
  const Vec<T> teacher_start = broadcast(T(start(to.stats.teacher_origin)));
  GroupSums<T, Reverse> sums, squares;
  ChainedSum<T> softmax;
  each_vector<T>(
      classes,
      [&, student, teacher, ahead, exps, times = to.squarings](int i, auto lanes, int chain) INLINED {
        ahead.fetch(i, chain);
        const auto at = [i, lanes](const Source<T>& from) INLINED {  // hidden classes are to be seen as masked
          return Careful ? from.template at<ByClass>(i, lanes) : from.template seen_at<ByClass>(i, lanes);
        };
        const Vec<T> xs = at(student) - student_start, xt = at(teacher) - teacher_start;
        const Vec<T> es = exp2(xs * k, lanes), et = exp2(xt * k, lanes);
        constexpr bool may_be_masked = Careful || std::is_same_v<decltype(lanes), Lanes>;
        sums.template add<may_be_masked>(chain, es, et, xs, xt);
        if constexpr (Serves == Also::squares) squares.template add<may_be_masked>(chain, es * es, et * et, xs, xt);
        if constexpr (Serves == Also::softmax) softmax.chain[chain] += squared<T>(es, times);
        if constexpr (Keep) {
          store(exps.student + i, es);
          store(exps.teacher + i, et);
          if constexpr (Reverse) store(exps.gap + i, xt - xs);
        }
      },
      [&]() INLINED {
        sums.flush();
        if constexpr (Serves == Also::squares) squares.flush();
        if constexpr (Serves == Also::softmax) softmax.flush();
      });
  sums.add_to(to.stats, k);
  if constexpr (Serves == Also::squares) squares.add_to(*to.squares, 2 * double(k));
  if constexpr (Serves == Also::softmax) to.softmax->sum += softmax.total();
}

// Whether nothing overflowed, no infinity met a zero, and no exponent is so far above its origin that its rounding
// shows.
inline bool plausible(double sum) { return sum < 0x1p32; }
inline bool plausible(const GroupStats<double>& stats) {
  return plausible(stats.student_sum + stats.teacher_sum + std::abs(stats.teacher_gap) + std::abs(stats.student_gap));
}

template <class T>
using AddSums = void (*)(const Source<T>&, const Source<T>&, const Classes&, T, const SumsTo&, const Exps<T>&,
                         const Ahead&);

// Which sums are wanted: forward KL's always, reverse KL's if asked for.
struct WantedSums {
  bool reverse;
  Also also;
};

template <class T, bool ByClass, bool Reverse, Also Serves>
AddSums<T> choose_add_sums(bool keep, bool careful) {
  if (keep && careful) return add_sums<T, ByClass, Reverse, Serves, true, true>;
  if (keep) return add_sums<T, ByClass, Reverse, Serves, true, false>;
  return careful ? add_sums<T, ByClass, Reverse, Serves, false, true>
                 : add_sums<T, ByClass, Reverse, Serves, false, false>;
}
template <class T, bool ByClass, bool Reverse>
AddSums<T> choose_add_sums(Also also, bool keep, bool careful) {
  if (also == Also::squares) return choose_add_sums<T, ByClass, Reverse, Also::squares>(keep, careful);
  if constexpr (!ByClass)  // the cross entropy sees raw logits
    if (also == Also::softmax) return choose_add_sums<T, false, Reverse, Also::softmax>(keep, careful);
  return choose_add_sums<T, ByClass, Reverse, Also::nothing>(keep, careful);
}
template <class T, bool ByClass>
AddSums<T> choose_add_sums(const WantedSums& wanted, bool keep, bool careful) {
  return wanted.reverse ? choose_add_sums<T, ByClass, true>(wanted.also, keep, careful)
                        : choose_add_sums<T, ByClass, false>(wanted.also, keep, careful);
}

// Adds a tile to the student's softmax at T = 1. It counts from a logit, so that a sure class has an exponential of 1.
template <class T>
void add_softmax(const T* student, const Classes& classes, SoftmaxStats<double>& stats) {
  constexpr T k = kLog2E;
  const double origin = tile_max<T>({student}, classes);
  if (origin > stats.origin) rebase(stats, origin, double(k));
  const Vec<T> from = broadcast(T(start(stats.origin)));
  ChainedSum<T> sum;
  each_vector<T>(
      classes,
      [&](int i, auto lanes, int chain) INLINED { sum.chain[chain] += exp2((load(student + i, lanes) - from) * k); },
      [&]() INLINED { sum.flush(); });
  stats.sum += sum.total();
}

// A class and its value in one integer: larger where the value is larger, then where the index is lower; NaN before
// all.
template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using bits = uint32_t;
  using type = uint64_t;
};
template <>
struct KeyOf<double> {
  using bits = uint64_t;
  using type = unsigned __int128;
};
template <class T>
using Key = typename KeyOf<T>::type;
template <class T>
using Ranking = std::vector<Key<T>>;  // best first

template <class T>
inline Key<T> key_of(T value, int64_t index) {
  using Bits = typename KeyOf<T>::bits;
  constexpr int width = 8 * sizeof(T);
  constexpr Bits sign = Bits{1} << (width - 1);
  value += T(0);  // -0 is 0
  Bits bits;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits ^= (Bits{} - (bits >> (width - 1))) | sign;
  if (value != value) bits = ~Bits{};
  return static_cast<Key<T>>(bits) << width | static_cast<Bits>(~static_cast<Bits>(index));
}
template <class T>
inline int64_t index_of(Key<T> key) {
  using Bits = typename KeyOf<T>::bits;
  return static_cast<int64_t>(static_cast<Bits>(~static_cast<Bits>(key)));
}
template <class T>
inline T value_of(Key<T> key) {
  using Bits = typename KeyOf<T>::bits;
  constexpr int width = 8 * sizeof(T);
  constexpr Bits sign = Bits{1} << (width - 1);
  Bits bits = static_cast<Bits>(key >> width);
  bits = bits & sign ? bits & ~sign : ~bits;
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Sorts a few distinct numbers, descending, by counting for each how many are larger: no branch to mispredict.
template <class N>
inline void sort_few(const N* from, int count, N* to) {
  for (int i = 0; i < count; ++i) {
    int larger = 0;
    for (int j = 0; j < count; ++j) larger += from[j] > from[i];
    to[larger] = from[i];
  }
}

// The k largest of distinct numbers, descending.
template <class N>
void keep_best(std::vector<N>& ranking, size_t k) {
  constexpr size_t kFew = 32;
  const size_t count = ranking.size();
  if (count <= kFew) {
    N unsorted[kFew];
    std::copy(ranking.begin(), ranking.end(), unsorted);
    sort_few(unsorted, static_cast<int>(count), ranking.data());
  } else if (k <= kFew) {
    std::partial_sort(ranking.begin(), ranking.begin() + k, ranking.end(), std::greater<>());
  } else {
    const auto end = ranking.begin() + std::min(k, count);
    if (k < count) std::nth_element(ranking.begin(), end, ranking.end(), std::greater<>());
    std::sort(ranking.begin(), end, std::greater<>());
  }
  if (count > k) ranking.resize(k);
}

// The values a selection ranks: the k largest of them are wanted, or, as their opposites, the k smallest.
template <class T, bool Largest>
struct Ranked {
  const T* values;

  T operator[](int i) const { return Largest ? values[i] : -values[i]; }
  template <class Which>
  Vec<T> at(int i, Which lanes) const {
    const Vec<T> v = load(values + i, lanes);
    return Largest ? v : -v;
  }
};

// A number that at least k of the values reach, close to the k-th largest: the k-th largest among the maxima of some
// subsets, at least twice as many as k. -inf where that would not pay.
template <class T, bool Largest>
T lower_bound_of_best(Ranked<T, Largest> ranked, int count, int k) {
  constexpr int W = kLanes<T>, kSubsets = 64;
  if (k > kSubsets / 2 || count < kSubsets) return -INFINITY;
  Vec<T> maxima[kSubsets / W];
  for (Vec<T>& m : maxima) m = broadcast(T(-INFINITY));
  for (int i = 0; i + kSubsets <= count; i += kSubsets)
    for (int j = 0; j < kSubsets / W; ++j) {
      __builtin_prefetch(ranked.values + count + i + j * W);  // the next tile, or row
      maxima[j] = max(ranked.at(i + j * W, AllLanes{}), maxima[j]);
    }
  int vectors = kSubsets / W;
  for (; vectors > 1 && vectors / 2 * W >= 2 * k; vectors /= 2)
    for (int j = 0; j < vectors / 2; ++j) maxima[j] = max(maxima[j], maxima[j + vectors / 2]);
  T all[kSubsets];
  for (int j = 0; j < vectors; ++j) store(all + j * W, maxima[j]);
  Vec<T> bound = broadcast(T(-INFINITY));
  for (int j = 0; j < vectors; ++j) {
    typename VecOf<T>::bits larger{};
    for (int i = 0; i < vectors * W; ++i) larger -= broadcast(all[i]) > maxima[j];
    bound = max(larger >= k - 1 ? maxima[j] : bound, bound);
  }
  return horizontal_max<T>(bound);
}

// Calls found(i) for the values that are not below a bound, in order. They are few: all comparisons go first, so that
// nothing has to be guessed at but which of their words hold one.
template <class T, bool Largest, class Found>
inline void each_not_below(Ranked<T, Largest> ranked, int count, T bound, const Found& found) {
  constexpr int W = kLanes<T>, kWord = 64;
  const Vec<T> bounds = broadcast(bound);
  uint64_t hits[kTile / kWord];
  const int whole = count / kWord;
  for (int word = 0; word < whole; ++word) {
    uint64_t bits = 0;
    for (int j = 0; j < kWord; j += W)
      bits |= static_cast<uint64_t>(not_less<T>(ranked.at(word * kWord + j, AllLanes{}), bounds)) << j;
    hits[word] = bits;
  }
  if (count % kWord) hits[whole] = 0;
  for (int i = whole * kWord; i < count; i += W) {
    const Lanes there = (uint64_t{1} << std::min(W, count - i)) - 1;
    hits[whole] |= static_cast<uint64_t>(not_less<T>(ranked.at(i, there), bounds) & there) << i % kWord;
  }
  for (int word = 0; word < ceil_div(count, kWord); ++word)
    for (uint64_t bits = hits[word]; bits; bits &= bits - 1) found(word * kWord + __builtin_ctzll(bits));
}

// What a rounded number has more than the exact one. If it is next to nothing, the exact one was itself off by as much.
template <class R>
inline R lost_in_rounding(R rounded, R exact) {
  const R lost = rounded - exact;
  return lost * lost < 0x1p-92 * exact * exact ? R{} : lost;
}

// The gradient in a logit: es * (student + tilt * (gap - mean_gap)) - et * teacher. Gaps are of logits, and count from
// their mean, since of large ones nothing else is left where one class is sure.
template <class T>
struct LogitCoefficients {
  T student = 0, tilt = 0, teacher = 0, mean_gap = 0;

  // From one sample's result; `unit` is what gaps of logits count there.
  static LogitCoefficients from(const CentredTermResult<Doubles>& result, int g, int sample, double unit) {
    const auto student = static_cast<T>(result.student_level[g][sample]);
    const auto teacher = static_cast<T>(result.group[g].teacher[sample]);
    const double tilt = result.group[g].tilt[sample] * unit, mean_gap = result.mean_gap[g][sample] / unit;
    if (tilt == 0) return {student, 0, teacher};
    const double lost = lost_in_rounding<double>(static_cast<T>(mean_gap), mean_gap);
    return {static_cast<T>(result.student_level[g][sample] + tilt * lost), static_cast<T>(tilt), teacher,
            static_cast<T>(mean_gap)};
  }
};

// What the gradient of one group needs: the logits its exponentials count from, and the coefficients.
template <class T>
struct GroupGradient {
  T student_origin;
  T teacher_origin;
  LogitCoefficients<T> by;
};

// Writes a vector, or adds it, where `there` classes are left.
template <class T, bool Add, class Which>
inline void write_vector(T* out, Vec<T> v, Which, int there) {
  if (std::is_same_v<Which, AllLanes> || kLanes<T> <= there) {
    store(out, Add ? v + load(out) : v);
  } else {
    store(out, Add ? v + load(out, (Lanes{1} << there) - 1) : v, there);
  }
}

// Writes or adds value(i, lanes, chain) for each vector of classes to out; hidden ones get what value makes of them.
template <class T, bool Add, class Value>
inline __attribute__((always_inline)) void write_vectors(const Classes& classes, T* out, const Value& value) {
  each_vector<T>(classes, [&](int i, auto lanes, int chain) INLINED {
    write_vector<T, Add>(out + i, value(i, lanes, chain), lanes, classes.count - i);
  });
}

// What a gradient's exponentials are multiplied by: those of the term and of what else it serves.
template <class T>
struct GradientBy {
  LogitCoefficients<T> by{};
  LogitCoefficients<T> squares{};
  T softmax = 0;
  int squarings = 0;
};

template <class T, bool Tilt, Also Serves>
inline Vec<T> gradient_at(Vec<T> es, Vec<T> et, Vec<T> gap, const GradientBy<T>& c) {
  const auto of = [gap](Vec<T> s, Vec<T> t, const LogitCoefficients<T>& by) INLINED {
    if constexpr (!Tilt) return s * by.student - t * by.teacher;
    return (s == 0 ? Vec<T>{} : s * (by.student + by.tilt * (gap - by.mean_gap))) - t * by.teacher;
  };
  const Vec<T> gradient = of(es, et, c.by);
  if constexpr (Serves == Also::squares) return gradient + of(es * es, et * et, c.squares);
  if constexpr (Serves == Also::softmax) return gradient + squared<T>(es, c.squarings) * c.softmax;
  return gradient;
}

// Writes (or adds) a tile's gradient from its kept exponentials.
template <class T, bool Add, bool Tilt, Also Serves>
void gradient_of_exps(const Exps<T>& exps, int count, const GradientBy<T>& by, T* out) {
  write_vectors<T, Add>({count}, out, [=](int i, auto, int) INLINED {
    const Vec<T> gap = Tilt ? load(exps.gap + i) : Vec<T>{};
    return gradient_at<T, Tilt, Serves>(load(exps.student + i), load(exps.teacher + i), gap, by);
  });
}

// The same from the logits, whose exponentials count from the given origins.
template <class T, bool ByClass, bool Add, bool Tilt, Also Serves>
void gradient_of_logits(const Source<T>& student, const Source<T>& teacher, const Classes& classes, T k,
                        T student_origin, T teacher_origin, const GradientBy<T>& by, T* out, const Ahead& ahead) {
  const Vec<T> student_start = broadcast(start(student_origin)), teacher_start = broadcast(start(teacher_origin));
  write_vectors<T, Add>(classes, out, [&, student, teacher, by, ahead](int i, auto lanes, int chain) INLINED {
    ahead.fetch(i, chain);
    const Vec<T> xs = student.template seen_at<ByClass>(i, lanes) - student_start;
    const Vec<T> xt = teacher.template seen_at<ByClass>(i, lanes) - teacher_start;
    return gradient_at<T, Tilt, Serves>(exp2(xs * k, lanes), exp2(xt * k, lanes), xt - xs, by);
  });
}

// How a gradient is computed: on top of what is there or not, with gaps or not. Only the first term serves others.
struct WantedGradient {
  bool add, tilt;
  Also also;
};

// Calls use(add, tilt, also) with the choice as constants.
template <class Use>
inline auto with_constants(const WantedGradient& wanted, const Use& use) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  const auto by_tilt = [&](auto add, auto also) { return wanted.tilt ? use(add, yes, also) : use(add, no, also); };
  if (wanted.also == Also::squares) return by_tilt(no, std::integral_constant<Also, Also::squares>());
  if (wanted.also == Also::softmax) return by_tilt(no, std::integral_constant<Also, Also::softmax>());
  constexpr std::integral_constant<Also, Also::nothing> nothing;
  return wanted.add ? by_tilt(yes, nothing) : by_tilt(no, nothing);
}

template <class T>
using GradientOfExps = void (*)(const Exps<T>&, int, const GradientBy<T>&, T*);
template <class T>
using GradientOfLogits = void (*)(const Source<T>&, const Source<T>&, const Classes&, T, T, T, const GradientBy<T>&, T*,
                                  const Ahead&);

template <class T>
GradientOfExps<T> choose_gradient_of_exps(const WantedGradient& wanted) {
  return with_constants(wanted, [](auto add, auto tilt, auto also) -> GradientOfExps<T> {
    return gradient_of_exps<T, add(), tilt(), also()>;
  });
}
template <class T, bool ByClass>
GradientOfLogits<T> choose_gradient_of_logits(const WantedGradient& wanted) {
  return with_constants(wanted, [](auto add, auto tilt, auto also) -> GradientOfLogits<T> {
    return gradient_of_logits<T, ByClass, add(), tilt(), also()>;
  });
}

// Adds the softmax's part of the cross entropy's gradient.
template <class T>
void add_softmax_gradient(const T* student, int count, T origin, T factor, T* out) {
  const Vec<T> from = broadcast(start(origin));
  write_vectors<T, true>({count}, out, [&](int i, auto lanes, int) INLINED {
    return exp2((load(student + i, lanes) - from) * T(kLog2E)) * factor;
  });
}
