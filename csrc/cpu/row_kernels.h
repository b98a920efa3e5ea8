// The row kernels, built once per instruction set (see simd.h): tiles of a row are loaded, widened and summed or
// differentiated; rows, and chunks of long rows, are spread over threads.
//
// A chunk has a fixed number of classes and partial statistics merge in the order of the classes, so that results
// depend neither on the number of threads nor on who computed what.

constexpr int kTile = 2048;               // classes of a tile: both sides and the gradient stay in L1
constexpr int64_t kChunk = 8 * kTile;     // classes of a chunk, the unit of work where a row is split over threads
constexpr int64_t kKeptClasses = 65536;   // exponentials of rows up to here are kept for the gradient (they fit in L2)
constexpr int64_t kSplitSamples = 16;     // fewer samples than this may be split over threads
constexpr int kBatch = kLanes<double>;    // rows that take step 2 together
constexpr int64_t kGrainClasses = 16384;  // least work that is worth a thread

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
inline int64_t sample_offset(const RowsProblem& problem, const Matrix& matrix, int64_t sample) {
  int64_t offset = 0;
  for (int d = problem.dims - 1; d > 0; --d) {
    offset += sample % problem.sample_size[d] * matrix.sample_stride[d];
    sample /= problem.sample_size[d];
  }
  return offset + sample * matrix.sample_stride[0];
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
// Inputs are whole vectors, padded with -inf.

template <class T>
T tile_max(const T* x, int count) {
  constexpr int W = kLanes<T>;
  Vec<T> m0 = broadcast(T(-INFINITY)), m1 = m0;
  int i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    m0 = max(load(x + i), m0);
    m1 = max(load(x + i + W), m1);
  }
  if (i < count) m0 = max(load(x + i), m0);
  return horizontal_max<T>(max(m0, m1));
}

// Copies classes, pads them to whole vectors with -inf and returns their maximum.
template <class T>
T copy_max(const T* from, int count, T* to) {
  constexpr int W = kLanes<T>;
  Vec<T> m0 = broadcast(T(-INFINITY)), m1 = m0;
  int i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    const Vec<T> v0 = load(from + i), v1 = load(from + i + W);
    store(to + i, v0);
    store(to + i + W, v1);
    m0 = max(v0, m0);
    m1 = max(v1, m1);
  }
  for (; i < count; i += W) {
    Vec<T> v = broadcast(T(-INFINITY));
    for (int j = 0; j < W && i + j < count; ++j) v[j] = from[i + j];
    store(to + i, v);
    m0 = max(v, m0);
  }
  return horizontal_max<T>(max(m0, m1));
}

// The exponentials of a tile, kept for its gradient.
template <class T>
struct Exps {
  T* student = nullptr;
  T* teacher = nullptr;
  T* gap = nullptr;
};

// Memory that the next tile will come from: fetched while the arithmetic on this one leaves the load ports idle.
struct Ahead {
  const char* student = nullptr;
  const char* teacher = nullptr;
  int student_step = 0, teacher_step = 0;  // bytes a vector

  void fetch(int vector) const {
    __builtin_prefetch(student + vector * student_step);
    __builtin_prefetch(teacher + vector * teacher_step);
  }
};

// Adds a tile's sums to statistics that already count from maxima no smaller than the tile's.
template <class T, bool Forward, bool Reverse, bool Keep>
void add_sums(const T* student, const T* teacher, int count, T k, GroupStats<double>& stats, const Exps<T>& exps,
              const Ahead& ahead) {
  constexpr int W = kLanes<T>;
  const Vec<T> student_origin = broadcast(T(origin(stats.student_max)));
  const Vec<T> teacher_origin = broadcast(T(origin(stats.teacher_max)));
  struct Sums {
    Vec<T> student{}, teacher{}, teacher_gap{}, student_gap{};
  };
  const auto add = [&](int i, Sums& sums) {
    ahead.fetch(i / W);
    const Vec<T> xs = exponents(load(student + i), student_origin, k);
    const Vec<T> xt = exponents(load(teacher + i), teacher_origin, k);
    const Vec<T> es = exp2(xs), et = exp2(xt), gap = xt - xs;
    sums.student += es;
    sums.teacher += et;
    // A class without probability adds nothing, however infinite its gap.
    if constexpr (Forward) sums.teacher_gap = et == 0 ? sums.teacher_gap : sums.teacher_gap + et * gap;
    if constexpr (Reverse) sums.student_gap = es == 0 ? sums.student_gap : sums.student_gap + es * gap;
    if constexpr (Keep) {
      store(exps.student + i, es);
      store(exps.teacher + i, et);
      if constexpr (Reverse) store(exps.gap + i, gap);
    }
  };
  Sums even, odd;  // two independent chains keep the pipelines full
  int i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    add(i, even);
    add(i + W, odd);
  }
  if (i < count) add(i, even);
  stats.student_sum += horizontal_sum(even.student + odd.student);
  stats.teacher_sum += horizontal_sum(even.teacher + odd.teacher);
  if constexpr (Forward) stats.teacher_gap += horizontal_sum(even.teacher_gap + odd.teacher_gap);
  if constexpr (Reverse) stats.student_gap += horizontal_sum(even.student_gap + odd.student_gap);
}

template <class T>
using AddSums = void (*)(const T*, const T*, int, T, GroupStats<double>&, const Exps<T>&, const Ahead&);

template <class T>
AddSums<T> choose_add_sums(const Term& term, bool keep) {
  const bool forward = term.wants_forward(), reverse = term.wants_reverse();
  if (forward && reverse) return keep ? add_sums<T, true, true, true> : add_sums<T, true, true, false>;
  if (reverse) return keep ? add_sums<T, false, true, true> : add_sums<T, false, true, false>;
  return keep ? add_sums<T, true, false, true> : add_sums<T, true, false, false>;
}

// Adds a tile to the student's softmax at T = 1.
template <class T>
void add_softmax(const T* student, int count, T maximum, SoftmaxStats<double>& stats) {
  constexpr T k = kLog2E;
  const double start_max = origin_at(maximum, k);
  if (start_max > stats.max) rebase(stats, start_max, origin_unit(k));
  const Vec<T> start = broadcast(T(origin(stats.max)));
  const auto exps = [&](int i) { return exp2(exponents(load(student + i), start, k)); };
  constexpr int W = kLanes<T>;
  Vec<T> even{}, odd{};
  int i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    even += exps(i);
    odd += exps(i + W);
  }
  if (i < count) even += exps(i);
  stats.sum += horizontal_sum(even + odd);
}

// Classes with their values, best first.
template <class T>
using Ranking = std::vector<std::pair<T, int64_t>>;

// Larger values first, NaN before all, then lower indices.
template <class T>
inline bool better(const std::pair<T, int64_t>& a, const std::pair<T, int64_t>& b) {
  const bool a_nan = a.first != a.first, b_nan = b.first != b.first;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.first != b.first) return a.first > b.first;
  return a.second < b.second;
}

template <class T>
void keep_best(Ranking<T>& ranking, size_t k) {
  if (ranking.size() > 48) {
    const auto middle = ranking.begin() + std::min(k, ranking.size());
    std::partial_sort(ranking.begin(), middle, ranking.end(), better<T>);
  } else {
    for (size_t i = 1; i < ranking.size(); ++i) {
      const std::pair<T, int64_t> moving = ranking[i];
      size_t j = i;
      for (; j > 0 && better(moving, ranking[j - 1]); --j) ranking[j] = ranking[j - 1];
      ranking[j] = moving;
    }
  }
  if (ranking.size() > k) ranking.erase(ranking.begin() + k, ranking.end());
}

// A value that at least k of the values reach, close to the k-th largest: it is the k-th largest among the maxima of
// some subsets. -inf where that would not pay.
template <class T>
T lower_bound_of_best(const T* values, int count, int k) {
  constexpr int kSubsets = 64, kVectors = kSubsets / kLanes<T>;
  if (k > kSubsets / 2 || count < kSubsets) return -INFINITY;
  Vec<T> maxima[kVectors];
  for (Vec<T>& m : maxima) m = broadcast(T(-INFINITY));
  for (int i = 0; i + kSubsets <= count; i += kSubsets)
    for (int j = 0; j < kVectors; ++j) maxima[j] = max(load(values + i + j * kLanes<T>), maxima[j]);
  T bound = -INFINITY;
  for (int round = 0; round < k; ++round) {
    Vec<T> all = maxima[0];
    for (int j = 1; j < kVectors; ++j) all = max(all, maxima[j]);
    bound = horizontal_max<T>(all);
    for (Vec<T>& m : maxima) m = m == bound ? broadcast(T(-INFINITY)) : m;
  }
  return bound;
}

// What the gradient of one group needs: where its exponentials count from, and the coefficients.
template <class T>
struct GroupGradient {
  T student_max;
  T teacher_max;
  GroupCoefficients<T> by;
};

// Calls value(i) for each vector and writes or adds it to out, of which only `count` elements exist.
template <class T, bool Add, class Value>
inline void write_vectors(int64_t count, T* out, const Value& value) {
  constexpr int W = kLanes<T>;
  const auto write = [&](int i, Vec<T> v) { store(out + i, Add ? v + load(out + i) : v); };
  int i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    const Vec<T> even = value(i), odd = value(i + W);
    write(i, even);
    write(i + W, odd);
  }
  for (; i + W <= count; i += W) write(i, value(i));
  if (i < count) {
    T tail[W];
    store(tail, value(i));
    for (int j = 0; i + j < count; ++j) out[i + j] = Add ? out[i + j] + tail[j] : tail[j];
  }
}

// Writes (or adds) a tile's gradient from its kept exponentials.
template <class T, bool Add, bool Tilt>
void gradient_of_exps(Exps<T> exps, int64_t count, GroupCoefficients<T> by, T* out) {
  write_vectors<T, Add>(count, out, [&](int i) {
    const Vec<T> es = load(exps.student + i), et = load(exps.teacher + i);
    if constexpr (!Tilt) return es * by.student - et * by.teacher;
    const Vec<T> tilted = es == 0 ? Vec<T>{} : es * (by.student + by.tilt * load(exps.gap + i));
    return tilted - et * by.teacher;
  });
}

// The same from the logits.
template <class T, bool Add, bool Tilt>
void gradient_of_logits(const T* student, const T* teacher, int64_t count, T k, const GroupGradient<T>& group, T* out) {
  const Vec<T> student_origin = broadcast(origin(group.student_max)), teacher_origin = broadcast(origin(group.teacher_max));
  const GroupCoefficients<T> by = group.by;
  write_vectors<T, Add>(count, out, [&](int i) {
    const Vec<T> xs = exponents(load(student + i), student_origin, k);
    const Vec<T> xt = exponents(load(teacher + i), teacher_origin, k);
    const Vec<T> es = exp2(xs), et = exp2(xt);
    if constexpr (!Tilt) return es * by.student - et * by.teacher;
    const Vec<T> tilted = es == 0 ? Vec<T>{} : es * (by.student + by.tilt * (xt - xs));
    return tilted - et * by.teacher;
  });
}

// Adds the softmax's part of the cross entropy's gradient.
template <class T>
void add_softmax_gradient(const T* student, int64_t count, T maximum, T factor, T* out) {
  const Vec<T> start = broadcast(origin(maximum));
  write_vectors<T, true>(count, out, [&](int i) { return exp2(exponents(load(student + i), start, T(kLog2E))) * factor; });
}

// Rows ---------------------------------------------------------------------------------------------------------------

// The logits that a mask hides.
template <class T>
struct Masked {
  int index;
  T student, teacher;
};

// Memory that a thread keeps from call to call.
template <class T>
struct Scratch {
  alignas(64) T student[kTile];
  alignas(64) T teacher[kTile];
  alignas(64) T gradient[kTile];
  Buffer<T> leads, kept;
  std::vector<int64_t> members;
  Ranking<T> found, merged, lead_gradients;
  std::vector<Masked<T>> masked;

  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// Partial statistics of the rest groups over some classes of a row.
struct PartialStats {
  GroupStats<double> rest[kMaxTerms];
  SoftmaxStats<double> ce;
};

// Statistics of several rows, a row a lane: step 2 is the same for all.
struct BatchStats {
  GroupStats<Doubles> group[kMaxTerms][kMaxGroups];
  SoftmaxStats<Doubles> ce;
};

inline void set_lane(GroupStats<Doubles>& batch, int lane, const GroupStats<double>& stats) {
  batch.student_max[lane] = stats.student_max;
  batch.teacher_max[lane] = stats.teacher_max;
  batch.student_sum[lane] = stats.student_sum;
  batch.teacher_sum[lane] = stats.teacher_sum;
  batch.teacher_gap[lane] = stats.teacher_gap;
  batch.student_gap[lane] = stats.student_gap;
}

// One row on its way through the three steps.
template <class T>
struct Row {
  int64_t sample;
  int lane;  // its place in the batch
  const void* student;
  const void* teacher;
  void* gradient;
  int64_t* members[kMaxTerms];  // classes that lead, by rank
  T weight, ce_max, ce_inverse;
  GroupGradient<T> group[kMaxTerms][kMaxGroups];
};

template <class T>
class Worker {
 public:
  explicit Worker(const RowsProblem& problem)
      : p_(problem), o_(problem.objective), scratch_(Scratch<T>::of_this_thread()) {
    for (int t = 0; t < o_.terms; ++t) {
      exponent_[t] = static_cast<T>(o_.term[t].exponent());
      add_sums_[t] = choose_add_sums<T>(o_.term[t], keeps(problem));
      add_sums_leads_[t] = choose_add_sums<T>(o_.term[t], false);
    }
    if (keeps(problem)) {
      const int64_t size = padded<T>(p_.classes);
      kept_row_ = size * kept_arrays(o_);
      T* next = scratch_.kept.data(kept_row_ * batch());
      for (int t = 0; t < o_.terms; ++t) {
        kept_[t] = {next, next + size, nullptr};
        next += 2 * size;
        if (!o_.term[t].wants_reverse()) continue;
        kept_[t].gap = next;
        next += size;
      }
    }
  }

  // Whether exponentials are kept: they must fit in cache, and rows that may be split over threads never keep them,
  // so that the arithmetic is a matter of the shape alone.
  static bool keeps(const RowsProblem& p) {
    const bool may_split = p.samples < kSplitSamples && p.classes > kChunk;
    return p.gradient.data != nullptr && p.row_loss != nullptr && !may_split &&
           p.classes * kept_arrays(p.objective) <= 2 * kKeptClasses;
  }

  int64_t chunks() const { return std::max<int64_t>(ceil_div(p_.classes, kChunk), 1); }

  Row<T> row(int64_t sample) const {
    Row<T> row{};
    row.sample = sample;
    row.student = element(p_.student, sample);
    row.teacher = element(p_.teacher, sample);
    row.gradient = p_.gradient.data ? element(p_.gradient, sample) : nullptr;
    return row;
  }

  // Rows that take step 2 together: their kept exponentials have to stay in cache until step 3.
  int64_t batch() const { return std::clamp<int64_t>(kTile / p_.classes, 1, kBatch); }

  // Steps 1 to 3 of a batch of rows.
  void forward(int64_t begin, int64_t end) {
    Row<T> rows[kBatch];
    BatchStats stats;
    int count = 0;
    for (int64_t n = begin; n < end; ++n) {
      Row<T>& row = rows[count];
      row = this->row(n);
      row.lane = count;
      if (skip(row)) continue;
      ++count;
      place_members(row);
      for (int t = 0; t < o_.terms; ++t) {
        if (!selects(t)) continue;
        scratch_.merged.clear();
        for (int64_t c = 0; c < chunks(); ++c) select(row, t, c, scratch_.merged);
        rank(row, t, scratch_.merged);
      }
      PartialStats total;
      add_chunk(row, 0, total);
      for (int64_t c = 1; c < chunks(); ++c) {
        PartialStats part;
        add_chunk(row, c, part);
        merge_into(total, part);
      }
      collect(row, total, stats);
    }
    finish(rows, count, stats);
    if (p_.gradient.data)
      for (int i = 0; i < count; ++i)
        for (int64_t c = 0; c < chunks(); ++c) gradient(rows[i], c);
  }

  // A whole row, step 3 from what was saved.
  void backward(int64_t sample) {
    Row<T> row = this->row(sample);
    restore(row);
    if (row.weight == 0) {
      clear(row);
      return;
    }
    for (int64_t c = 0; c < chunks(); ++c) gradient(row, c);
  }

  // Handles a sample that does not count; false if it does.
  bool skip(Row<T>& row) {
    if (p_.row_weight[row.sample] != 0) return false;
    p_.row_loss[row.sample] = 0;
    if (p_.row_parts) std::fill_n(p_.row_parts + row.sample * o_.parts(), o_.parts(), 0.0);
    if (p_.saved) std::fill_n(saved(row), saved_size(o_), T(0));
    if (p_.members) std::fill_n(p_.members + row.sample * members_size(o_), members_size(o_), 0);
    if (row.gradient) clear(row);
    return true;
  }

  // That of the maxima in the statistics of a term (see stats.h).
  double unit(int t) const { return origin_unit(exponent_[t]); }

  bool selects(int t) const { return o_.term[t].by_rank() && !repeats(t); }

  // Points each term at its leading classes: the target, or room for those still to be selected.
  void place_members(Row<T>& row) {
    int64_t* next;
    if (p_.members) {
      next = p_.members + row.sample * members_size(o_);
    } else {
      scratch_.members.resize(kBatch * members_size(o_));
      next = scratch_.members.data() + row.lane * members_size(o_);
    }
    for (int t = 0; t < o_.terms; ++t) {
      row.members[t] = o_.term[t].kind == PartitionKind::target ? const_cast<int64_t*>(p_.target + row.sample) : next;
      if (o_.term[t].by_rank()) next += o_.term[t].k;
    }
  }

  // Appends the k best classes of a chunk, by the teacher.
  void select(const Row<T>& row, int t, int64_t chunk, Ranking<T>& best) {
    const Term& term = o_.term[t];
    const size_t k = term.k;
    auto& found = scratch_.found;
    found.clear();
    const int64_t end = std::min(p_.classes, (chunk + 1) * kChunk);
    for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(end - begin, kTile));
      // A row of one tile is all in scratch when its statistics are taken.
      const bool stays = term.largest && p_.classes <= kTile;
      T maximum;
      const T* values = read(p_.teacher, row.teacher, begin, count, scratch_.teacher, stays || !term.largest, &maximum);
      held_ = stays ? Held{row.sample, maximum} : Held{};
      if (!term.largest) {
        for (int i = 0; i < count; ++i) scratch_.teacher[i] = -scratch_.teacher[i];
        maximum = tile_max(values, padded<T>(count));
      }
      T bound;
      if (found.size() < k) {
        bound = lower_bound_of_best(values, count, term.k);
      } else {
        bound = found.back().first;
        if (maximum <= bound) continue;  // a tie goes to the class that was there first
      }
      const Vec<T> bounds = broadcast(bound);
      for (int block = 0; block < count; block += 64) {
        uint64_t hits = 0;  // gathered over several vectors: most blocks have none
        for (int i = 0; i < 64 && block + i < count; i += kLanes<T>)
          hits |= static_cast<uint64_t>(not_less<T>(load(values + block + i), bounds)) << i;
        for (; hits; hits &= hits - 1) {
          const int i = block + __builtin_ctzll(hits);
          if (i < count) found.emplace_back(values[i], begin + i);
        }
      }
      keep_best(found, k);
    }
    best.insert(best.end(), found.begin(), found.end());
  }

  // Settles which classes lead, from the best of all chunks.
  void rank(Row<T>& row, int t, Ranking<T>& best) {
    keep_best(best, o_.term[t].k);
    for (int i = 0; i < o_.term[t].k; ++i) row.members[t][i] = best[i].second;
    for (int other = t + 1; other < o_.terms; ++other)
      if (repeats(other)) std::copy_n(row.members[t], o_.term[t].k, row.members[other]);
  }

  // Step 1 for the rest groups of one chunk.
  void add_chunk(const Row<T>& row, int64_t chunk, PartialStats& stats) {
    const int64_t end = std::min(p_.classes, (chunk + 1) * kChunk);
    for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
      const Tile tile = load_tile(row, begin, end);
      if (o_.has_ce()) add_softmax(tile.student, padded<T>(tile.count), tile.student_max, stats.ce);
      for (int t = 0; t < o_.terms; ++t) {
        const Mask mask(*this, row, t, tile);
        GroupStats<double>& rest = stats.rest[t];
        const int count = padded<T>(tile.count);
        const double student_max = std::max<double>(rest.student_max, origin_at(mask.student_max(), exponent_[t]));
        const double teacher_max = std::max<double>(rest.teacher_max, origin_at(mask.teacher_max(), exponent_[t]));
        rebase(rest, student_max, teacher_max, unit(t));
        add_sums_[t](tile.student, tile.teacher, count, exponent_[t], rest, kept(row, t, begin), ahead(row, begin + tile.count));
        if (kept_[t].student) kept_origin_[t][row.lane + begin / kTile] = {student_max, teacher_max};
      }
    }
  }

  void merge_into(PartialStats& into, const PartialStats& part) const {
    for (int t = 0; t < o_.terms; ++t) merge(into.rest[t], part.rest[t], unit(t));
    if (o_.has_ce()) merge(into.ce, part.ce, origin_unit(T(kLog2E)));
  }

  // Takes a row's statistics, those of its leading classes included, into its batch.
  void collect(const Row<T>& row, const PartialStats& total, BatchStats& batch) {
    for (int t = 0; t < o_.terms; ++t) {
      const int rest = o_.term[t].groups() - 1;
      for (int g = 0; g < rest; ++g) {
        GroupStats<double> stats;
        add_leads(row, t, g, stats);
        set_lane(batch.group[t][g], row.lane, stats);
      }
      set_lane(batch.group[t][rest], row.lane, total.rest[t]);
    }
    batch.ce.max[row.lane] = total.ce.max;
    batch.ce.sum[row.lane] = total.ce.sum;
  }

  // Step 2 of a batch: losses, their parts and the gradients' coefficients.
  void finish(Row<T>* rows, int count, const BatchStats& stats) {
    const Doubles log_ce_sum = o_.has_ce() ? log(stats.ce.sum) : Doubles{};
    for (int i = 0; i < count; ++i) {
      Row<T>& row = rows[i];
      row.weight = static_cast<T>(p_.row_weight[row.sample]);
      double ce = 0;
      if (o_.has_ce()) {
        const double max = stats.ce.max[i], at_target = value(p_.student, row.student, p_.target[row.sample]);
        ce = log_ce_sum[i] - kLn2 * exponents(at_target, origin(max), double(T(kLog2E)));
        row.ce_max = static_cast<T>(max);
        row.ce_inverse = static_cast<T>(1 / stats.ce.sum[i]);
      }
      p_.row_loss[row.sample] = o_.has_ce() ? o_.ce_weight * ce : 0;
      if (p_.row_parts) p_.row_parts[row.sample * o_.parts()] = ce;
    }
    int64_t first_part = 1;
    for (int t = 0; t < o_.terms; ++t) {
      const Term& term = o_.term[t];
      const int rest = term.groups() - 1;
      int64_t sizes[kMaxGroups];
      for (int g = 0; g < rest; ++g) sizes[g] = term.group_end(g) - term.group_begin(g);
      sizes[rest] = p_.classes - (rest ? term.leads() : 0);
      TermResult<Doubles> result;
      evaluate(term, stats.group[t], sizes, unit(t), result);
      for (int i = 0; i < count; ++i) {
        Row<T>& row = rows[i];
        p_.row_loss[row.sample] += result.loss[i];
        if (p_.row_parts)
          for (int j = 0; j < term.parts(); ++j)
            p_.row_parts[row.sample * o_.parts() + first_part + j] = result.parts[j][i];
        for (int g = 0; g <= rest; ++g) {
          const GroupCoefficients<Doubles>& by = result.group[g];
          row.group[t][g] = {T(stats.group[t][g].student_max[i]), T(stats.group[t][g].teacher_max[i]),
                             {T(by.student[i]), T(by.tilt[i]), T(by.teacher[i])}};
        }
      }
      first_part += term.parts();
    }
    if (p_.saved)
      for (int i = 0; i < count; ++i) save(rows[i]);
  }

  // Step 3 for one chunk.
  void gradient(const Row<T>& row, int64_t chunk) {
    const int64_t end = std::min(p_.classes, (chunk + 1) * kChunk);
    const bool direct = p_.gradient.class_stride == 1 && is_arithmetic(p_.gradient.dtype);
    const bool reads_logits = kept_[0].student == nullptr || o_.has_ce();
    compute_lead_gradients(row);
    for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
      Tile tile{begin, static_cast<int>(std::min<int64_t>(end - begin, kTile)), nullptr, nullptr, 0, 0};
      if (reads_logits) tile = load_tile(row, begin, end);
      T* out = direct ? static_cast<T*>(row.gradient) + begin : scratch_.gradient;
      for (int t = 0; t < o_.terms; ++t) {
        const bool tilt = o_.term[t].tilted();
        const GroupGradient<T> rest = weighed_group(row, t, o_.term[t].groups() - 1);
        if (kept_[t].student) {
          const auto kernel = t == 0 ? (tilt ? gradient_of_exps<T, false, true> : gradient_of_exps<T, false, false>)
                                     : (tilt ? gradient_of_exps<T, true, true> : gradient_of_exps<T, true, false>);
          kernel(kept(row, t, begin), tile.count, from_tile_origin(row, rest, t, begin), out);
        } else {
          const Mask mask(*this, row, t, tile);
          const auto kernel = t == 0 ? (tilt ? gradient_of_logits<T, false, true> : gradient_of_logits<T, false, false>)
                                     : (tilt ? gradient_of_logits<T, true, true> : gradient_of_logits<T, true, false>);
          kernel(tile.student, tile.teacher, tile.count, exponent_[t], rest, out);
        }
      }
      if (o_.has_ce()) {
        const T factor = static_cast<T>(o_.ce_weight) * row.weight;
        add_softmax_gradient(tile.student, tile.count, row.ce_max, factor * row.ce_inverse, out);
      }
      for (const auto& [added, index] : scratch_.lead_gradients)
        if (index >= begin && index < begin + tile.count) out[index - begin] += added;
      if (!direct) write(p_.gradient, row.gradient, begin, tile.count, scratch_.gradient);
    }
    if (end == p_.classes) clear_beyond(row, p_.classes);
  }

 private:
  struct Tile {
    int64_t begin;
    int count;
    const T* student;
    const T* teacher;
    T student_max;
    T teacher_max;
  };

  // Hides a term's leading classes in the tile in scratch while it lives: what is left is the rest group.
  class Mask {
   public:
    Mask(Worker& worker, const Row<T>& row, int t, const Tile& tile) : scratch_(worker.scratch_), tile_(tile) {
      const Term& term = worker.o_.term[t];
      const int leads = term.groups() == 1 ? 0 : term.leads();
      scratch_.masked.clear();
      for (int i = 0; i < leads; ++i) {
        const int64_t j = row.members[t][i] - tile.begin;
        if (j < 0 || j >= tile.count) continue;
        scratch_.masked.push_back({static_cast<int>(j), scratch_.student[j], scratch_.teacher[j]});
        hides_student_max_ |= scratch_.student[j] == tile.student_max;
        hides_teacher_max_ |= scratch_.teacher[j] == tile.teacher_max;
        scratch_.student[j] = scratch_.teacher[j] = -INFINITY;
      }
    }
    // The maxima of what is left.
    T student_max() const {
      return hides_student_max_ ? tile_max(tile_.student, padded<T>(tile_.count)) : tile_.student_max;
    }
    T teacher_max() const {
      return hides_teacher_max_ ? tile_max(tile_.teacher, padded<T>(tile_.count)) : tile_.teacher_max;
    }
    ~Mask() {
      for (const Masked<T>& masked : scratch_.masked) {
        scratch_.student[masked.index] = masked.student;
        scratch_.teacher[masked.index] = masked.teacher;
      }
    }
    Mask(const Mask&) = delete;
    Mask& operator=(const Mask&) = delete;

   private:
    Scratch<T>& scratch_;
    const Tile& tile_;
    bool hides_student_max_ = false, hides_teacher_max_ = false;
  };

  static int64_t kept_arrays(const Objective& objective) {
    int64_t arrays = 0;
    for (int t = 0; t < objective.terms; ++t) arrays += objective.term[t].wants_reverse() ? 3 : 2;
    return arrays;
  }

  static bool is_arithmetic(DType dtype) { return dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32); }

  // Whether this term's leading classes are those of an earlier term.
  bool repeats(int t) const {
    const Term &term = o_.term[t], &first = o_.term[0];
    return t > 0 && term.by_rank() && first.by_rank() && term.k == first.k && term.largest == first.largest;
  }

  void* element(const Matrix& matrix, int64_t sample) const {
    return static_cast<char*>(matrix.data) + sample_offset(p_, matrix, sample) * dtype_size(matrix.dtype);
  }

  // Classes of a row as whole vectors: in place where nothing has to be converted, padded or `changed`, else in `to`.
  const T* read(const Matrix& matrix, const void* row, int64_t begin, int count, T* to, bool changed, T* max) const {
    if (matrix.class_stride == 1 && is_arithmetic(matrix.dtype)) {
      const T* from = static_cast<const T*>(row) + begin;
      const bool in_place = !changed && count % kLanes<T> == 0;
      *max = in_place ? tile_max(from, count) : copy_max(from, count, to);
      return in_place ? from : to;
    }
    with_dtype(matrix.dtype, [&](auto element) {
      const auto* from = static_cast<const decltype(element)*>(row) + begin * matrix.class_stride;
      if (matrix.class_stride == 1) {
        widen_all(from, count, to);
      } else {
        for (int i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i * matrix.class_stride]));
      }
    });
    for (int i = count; i < padded<T>(count); ++i) to[i] = -INFINITY;
    *max = tile_max(to, padded<T>(count));
    return to;
  }

  void write(const Matrix& matrix, void* row, int64_t begin, int count, const T* from) const {
    with_dtype(matrix.dtype, [&](auto element) {
      auto* to = static_cast<decltype(element)*>(row) + begin * matrix.class_stride;
      if (matrix.class_stride == 1) {
        narrow_all(from, count, to);
      } else {
        for (int i = 0; i < count; ++i) narrow(from[i], to[i * matrix.class_stride]);
      }
    });
  }

  T value(const Matrix& matrix, const void* row, int64_t index) const {
    T result{};
    with_dtype(matrix.dtype, [&](auto element) {
      result = static_cast<T>(widen(static_cast<const decltype(element)*>(row)[index * matrix.class_stride]));
    });
    return result;
  }

  void clear_beyond(const Row<T>& row, int64_t first) const {
    if (first == p_.gradient_classes) return;
    with_dtype(p_.gradient.dtype, [&](auto element) {
      auto* to = static_cast<decltype(element)*>(row.gradient);
      for (int64_t i = first; i < p_.gradient_classes; ++i) to[i * p_.gradient.class_stride] = decltype(element){};
    });
  }
  void clear(const Row<T>& row) const { clear_beyond(row, 0); }

  Tile load_tile(const Row<T>& row, int64_t begin, int64_t end) {
    const int count = static_cast<int>(std::min<int64_t>(end - begin, kTile));
    const bool masked = has_leads(row, begin, count);
    Tile tile{begin, count, nullptr, nullptr, 0, 0};
    tile.student = read(p_.student, row.student, begin, count, scratch_.student, masked, &tile.student_max);
    if (held_.sample == row.sample) {
      tile.teacher = scratch_.teacher;
      tile.teacher_max = held_.teacher_max;
    } else {
      tile.teacher = read(p_.teacher, row.teacher, begin, count, scratch_.teacher, masked, &tile.teacher_max);
    }
    held_ = {};
    return tile;
  }

  bool has_leads(const Row<T>& row, int64_t begin, int count) const {
    for (int t = 0; t < o_.terms; ++t) {
      const int leads = o_.term[t].groups() == 1 ? 0 : o_.term[t].leads();
      for (int i = 0; i < leads; ++i)
        if (row.members[t][i] >= begin && row.members[t][i] < begin + count) return true;
    }
    return false;
  }

  Exps<T> kept(const Row<T>& row, int t, int64_t begin) const {
    if (!kept_[t].student) return {};
    const int64_t at = row.lane * kept_row_ + begin;
    return {kept_[t].student + at, kept_[t].teacher + at, kept_[t].gap ? kept_[t].gap + at : nullptr};
  }

  // The classes from `begin` on: of this row or, where rows follow one another in memory, of the next.
  Ahead ahead(const Row<T>& row, int64_t begin) const {
    const auto bytes = [begin](const Matrix& matrix) { return begin * matrix.class_stride * dtype_size(matrix.dtype); };
    const auto step = [](const Matrix& matrix) {
      return matrix.class_stride == 1 ? static_cast<int>(kLanes<T> * dtype_size(matrix.dtype)) : 0;
    };
    return {static_cast<const char*>(row.student) + bytes(p_.student),
            static_cast<const char*>(row.teacher) + bytes(p_.teacher), step(p_.student), step(p_.teacher)};
  }

  // The logits of a leading group, gathered into whole vectors, and room for their gradient.
  struct Leads {
    int count;
    T* student;
    T* teacher;
    T* gradient;
  };
  Leads gather(const Row<T>& row, int t, int g) {
    const Term& term = o_.term[t];
    const int first = term.group_begin(g), count = term.group_end(g) - first, size = padded<T>(count);
    T* student = scratch_.leads.data(3 * size);
    T* teacher = student + size;
    std::fill_n(student, 2 * size, T(-INFINITY));
    for (int i = 0; i < count; ++i) {
      student[i] = value(p_.student, row.student, row.members[t][first + i]);
      teacher[i] = value(p_.teacher, row.teacher, row.members[t][first + i]);
    }
    return {count, student, teacher, teacher + size};
  }

  void add_leads(const Row<T>& row, int t, int g, GroupStats<double>& stats) {
    const Leads leads = gather(row, t, g);
    const int count = padded<T>(leads.count);
    const bool single = leads.count == 1;
    if (single && std::isfinite(*leads.student) && std::isfinite(*leads.teacher)) {
      // Exact in double precision, so that the sums are exactly 1.
      stats.student_max = origin_at<double>(*leads.student, exponent_[t]);
      stats.teacher_max = origin_at<double>(*leads.teacher, exponent_[t]);
      stats.student_sum = stats.teacher_sum = 1;
    } else {
      stats.student_max = origin_at(tile_max(leads.student, count), exponent_[t]);
      stats.teacher_max = origin_at(tile_max(leads.teacher, count), exponent_[t]);
      add_sums_leads_[t](leads.student, leads.teacher, count, exponent_[t], stats, {}, ahead(row, 0));
    }
  }

  // What the leading classes' gradients get on top of the rest's sweep.
  void compute_lead_gradients(const Row<T>& row) {
    auto& list = scratch_.lead_gradients;
    list.clear();
    for (int t = 0; t < o_.terms; ++t) {
      const Term& term = o_.term[t];
      const auto kernel = term.tilted() ? gradient_of_logits<T, false, true> : gradient_of_logits<T, false, false>;
      for (int g = 0; g + 1 < term.groups(); ++g) {
        const GroupGradient<T> group = weighed_group(row, t, g);
        if (term.group_end(g) - term.group_begin(g) == 1 && std::isfinite(group.student_max) && std::isfinite(group.teacher_max)) {
          list.emplace_back(group.by.student - group.by.teacher, row.members[t][term.group_begin(g)]);
          continue;
        }
        const Leads leads = gather(row, t, g);
        kernel(leads.student, leads.teacher, leads.count, exponent_[t], group, leads.gradient);
        for (int i = 0; i < leads.count; ++i)
          list.emplace_back(leads.gradient[i], row.members[t][term.group_begin(g) + i]);
      }
    }
    if (o_.has_ce()) list.emplace_back(-static_cast<T>(o_.ce_weight) * row.weight, p_.target[row.sample]);
  }

  GroupGradient<T> weighed_group(const Row<T>& row, int t, int g) const {
    GroupGradient<T> group = row.group[t][g];
    group.by = {group.by.student * row.weight, group.by.tilt * row.weight, group.by.teacher * row.weight};
    return group;
  }

  // Coefficients for a tile's kept exponentials, which count from the maxima known when they were computed.
  GroupCoefficients<T> from_tile_origin(const Row<T>& row, const GroupGradient<T>& group, int t, int64_t begin) const {
    const auto [student_max, teacher_max] = kept_origin_[t][row.lane + begin / kTile];
    const double student_to = group.student_max, teacher_to = group.teacher_max;
    const double student = rebase_factor(student_max, student_to, unit(t));
    const double teacher = rebase_factor(teacher_max, teacher_to, unit(t));
    const double gap = rebase_gap(student_max, student_to, teacher_max, teacher_to, unit(t));
    const GroupCoefficients<T>& by = group.by;
    const double level = by.tilt == 0 ? by.student : by.student + by.tilt * gap;
    return {T(student * level), T(student * by.tilt), T(teacher * by.teacher)};
  }

  T* saved(const Row<T>& row) const { return static_cast<T*>(p_.saved) + row.sample * saved_size(o_); }

  void save(const Row<T>& row) const {
    T* out = saved(row);
    *out++ = row.weight;
    *out++ = row.ce_max;
    *out++ = row.ce_inverse;
    for (int t = 0; t < o_.terms; ++t)
      for (int g = 0; g < o_.term[t].groups(); ++g) {
        const GroupGradient<T>& group = row.group[t][g];
        for (const T number : {group.student_max, group.teacher_max, group.by.student, group.by.tilt, group.by.teacher})
          *out++ = number;
      }
  }

  void restore(Row<T>& row) {
    const T* in = saved(row);
    row.weight = static_cast<T>(*in++ * p_.row_weight[row.sample]);
    row.ce_max = *in++;
    row.ce_inverse = *in++;
    for (int t = 0; t < o_.terms; ++t)
      for (int g = 0; g < o_.term[t].groups(); ++g, in += 5) row.group[t][g] = {in[0], in[1], {in[2], in[3], in[4]}};
    place_members(row);
  }

  // The sample whose teacher's logits a selection left in scratch, if any.
  struct Held {
    int64_t sample = -1;
    T teacher_max = 0;
  };

  const RowsProblem& p_;
  const Objective& o_;
  Held held_;
  Scratch<T>& scratch_;
  T exponent_[kMaxTerms];
  AddSums<T> add_sums_[kMaxTerms], add_sums_leads_[kMaxTerms];
  Exps<T> kept_[kMaxTerms];  // of the batch's first row
  int64_t kept_row_ = 0;     // from row to row
  // What they count from, a tile; only a batch of one has more than one tile.
  std::array<std::pair<double, double>, kKeptClasses / kTile> kept_origin_[kMaxTerms];
};

// Calls ---------------------------------------------------------------------------------------------------------------

inline int64_t row_grain(const RowsProblem& p) { return std::max<int64_t>(kGrainClasses / (p.classes + 64), 1); }

// Few long rows: the chunks of all rows are spread over threads, step by step.
template <class T>
void forward_split(const RowsProblem& problem, const Parallel& parallel) {
  RowsProblem p = problem;
  std::vector<int64_t> members(p.samples * members_size(p.objective));
  if (!p.members) p.members = members.data();
  Worker<T> main(p);
  const int64_t chunks = main.chunks();
  std::vector<Row<T>> rows;
  for (int64_t n = 0; n < p.samples; ++n) {
    Row<T> row = main.row(n);
    if (main.skip(row)) continue;
    main.place_members(row);
    rows.push_back(row);
  }
  const int64_t tasks = static_cast<int64_t>(rows.size()) * chunks;
  const auto each_chunk = [&](auto body) {
    parallel.run(0, tasks, 1, [&](int64_t begin, int64_t end) {
      Worker<T> worker(p);
      for (int64_t i = begin; i < end; ++i) body(worker, i / chunks, i % chunks);
    });
  };
  for (int t = 0; t < p.objective.terms; ++t) {
    if (!main.selects(t)) continue;
    std::vector<Ranking<T>> best(tasks);
    each_chunk([&](Worker<T>& worker, int64_t r, int64_t c) { worker.select(rows[r], t, c, best[r * chunks + c]); });
    for (size_t r = 0; r < rows.size(); ++r) {
      Ranking<T> merged;
      for (int64_t c = 0; c < chunks; ++c) merged.insert(merged.end(), best[r * chunks + c].begin(), best[r * chunks + c].end());
      main.rank(rows[r], t, merged);
    }
  }
  std::vector<PartialStats> stats(tasks);
  each_chunk([&](Worker<T>& worker, int64_t r, int64_t c) { worker.add_chunk(rows[r], c, stats[r * chunks + c]); });
  for (size_t r = 0; r < rows.size(); ++r) {
    PartialStats total;
    for (int64_t c = 0; c < chunks; ++c) main.merge_into(total, stats[r * chunks + c]);
    BatchStats batch;
    main.collect(rows[r], total, batch);
    main.finish(&rows[r], 1, batch);
  }
  if (p.gradient.data)
    each_chunk([&](Worker<T>& worker, int64_t r, int64_t c) { worker.gradient(rows[r], c); });
}

template <class T>
void forward_typed(const RowsProblem& p, const Parallel& parallel) {
  if (p.samples < parallel.threads && p.samples < kSplitSamples && p.classes > kChunk) {
    forward_split<T>(p, parallel);
    return;
  }
  parallel.run(0, p.samples, row_grain(p), [&](int64_t begin, int64_t end) {
    Worker<T> worker(p);
    for (int64_t n = begin; n < end; n += worker.batch()) worker.forward(n, std::min(n + worker.batch(), end));
  });
}

template <class T>
void backward_typed(const RowsProblem& p, const Parallel& parallel) {
  parallel.run(0, p.samples, row_grain(p), [&](int64_t begin, int64_t end) {
    Worker<T> worker(p);
    for (int64_t n = begin; n < end; ++n) worker.backward(n);
  });
}

inline void forward(const RowsProblem& p, const Parallel& parallel) {
  (p.double_arithmetic ? forward_typed<double> : forward_typed<float>)(p, parallel);
}

inline void backward(const RowsProblem& p, const Parallel& parallel) {
  (p.double_arithmetic ? backward_typed<double> : backward_typed<float>)(p, parallel);
}

inline void scale(const RowsProblem& p, const double* factor, bool per_sample, const Parallel& parallel) {
  const Matrix& matrix = p.gradient;
  parallel.run(0, p.samples, row_grain(p), [&](int64_t begin, int64_t end) {
    with_dtype(matrix.dtype, [&](auto element) {
      using Element = decltype(element);
      using T = decltype(widen(element));
      for (int64_t n = begin; n < end; ++n) {
        Element* row = static_cast<Element*>(matrix.data) + sample_offset(p, matrix, n);
        const T by = static_cast<T>(factor[per_sample ? n : 0]);
        for (int64_t i = 0; i < p.gradient_classes; ++i) {
          Element& value = row[i * matrix.class_stride];
          narrow(widen(value) * by, value);
        }
      }
    });
  });
}

constexpr RowKernels kRowKernels{forward, backward, scale};
