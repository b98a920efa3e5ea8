// The row kernels, built once per instruction set (see simd.h): tiles of a row are loaded, widened and summed or
// differentiated; rows, and chunks of long rows, are spread over threads.
//
// A chunk has a fixed number of classes and partial statistics merge in the order of the classes, so that results
// depend neither on the number of threads nor on who computed what.

constexpr int kTile = 2048;               // classes of a tile: both sides and the gradient stay in L1
constexpr int64_t kChunk = 8 * kTile;     // classes of a chunk, the unit of work where a row is split over threads
constexpr int64_t kKeptClasses = 65536;   // exponentials of rows up to here are kept for the gradient (they fit in L2)
constexpr int64_t kSplitSamples = 16;     // fewer samples than this may be split over threads
constexpr int64_t kGrainClasses = 16384;  // least work that is worth a thread

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
inline int padded(int64_t count) {
  return static_cast<int>(ceil_div(count, kLanes<T>) * kLanes<T>);
}

inline int64_t dtype_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Calls body with a value of the element type that `dtype` names.
template <class Body>
inline void with_dtype(DType dtype, Body body) {
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

// The exponentials of a tile, kept for its gradient.
template <class T>
struct Exps {
  T* student = nullptr;
  T* teacher = nullptr;
  T* gap = nullptr;
};

// Adds a tile's sums to statistics that already count from maxima no smaller than the tile's.
template <class T, bool Forward, bool Reverse, bool Keep>
void add_sums(const T* student, const T* teacher, int count, T k, GroupStats<double>& stats, Exps<T> exps) {
  const Vec<T> student_origin = broadcast(T(origin(stats.student_max)));
  const Vec<T> teacher_origin = broadcast(T(origin(stats.teacher_max)));
  Vec<T> student_sum{}, teacher_sum{}, teacher_gap{}, student_gap{};
  for (int i = 0; i < count; i += kLanes<T>) {
    const Vec<T> xs = (load(student + i) - student_origin) * k;
    const Vec<T> xt = (load(teacher + i) - teacher_origin) * k;
    const Vec<T> es = exp2(xs), et = exp2(xt), gap = xt - xs;
    student_sum += es;
    teacher_sum += et;
    // A class without probability adds nothing, however infinite its gap.
    if constexpr (Forward) teacher_gap += et == 0 ? Vec<T>{} : et * gap;
    if constexpr (Reverse) student_gap += es == 0 ? Vec<T>{} : es * gap;
    if constexpr (Keep) {
      store(exps.student + i, es);
      store(exps.teacher + i, et);
      if constexpr (Reverse) store(exps.gap + i, gap);
    }
  }
  stats.student_sum += horizontal_sum<T>(student_sum);
  stats.teacher_sum += horizontal_sum<T>(teacher_sum);
  if constexpr (Forward) stats.teacher_gap += horizontal_sum<T>(teacher_gap);
  if constexpr (Reverse) stats.student_gap += horizontal_sum<T>(student_gap);
}

template <class T>
using AddSums = void (*)(const T*, const T*, int, T, GroupStats<double>&, Exps<T>);

template <class T>
AddSums<T> choose_add_sums(const Term& term, bool keep) {
  const bool forward = term.wants_forward(), reverse = term.wants_reverse();
  if (forward && reverse) return keep ? add_sums<T, true, true, true> : add_sums<T, true, true, false>;
  if (reverse) return keep ? add_sums<T, false, true, true> : add_sums<T, false, true, false>;
  return keep ? add_sums<T, true, false, true> : add_sums<T, true, false, false>;
}

// Adds a tile to the student's softmax at T = 1.
template <class T>
void add_softmax(const T* student, int count, SoftmaxStats<double>& stats) {
  const T maximum = tile_max(student, count);
  if (maximum > stats.max) rebase(stats, double(maximum));
  const Vec<T> start = broadcast(T(origin(stats.max)));
  Vec<T> sum{};
  for (int i = 0; i < count; i += kLanes<T>) sum += exp2((load(student + i) - start) * T(kLog2E));
  stats.sum += horizontal_sum<T>(sum);
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
inline void write_vectors(int64_t count, T* out, Value value) {
  constexpr int W = kLanes<T>;
  int i = 0;
  for (; i + W <= count; i += W) {
    Vec<T> v = value(i);
    if constexpr (Add) v += load(out + i);
    store(out + i, v);
  }
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
    const Vec<T> xs = (load(student + i) - student_origin) * k;
    const Vec<T> xt = (load(teacher + i) - teacher_origin) * k;
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
  write_vectors<T, true>(count, out, [&](int i) { return exp2((load(student + i) - start) * T(kLog2E)) * factor; });
}

// Rows ---------------------------------------------------------------------------------------------------------------

// Memory that a thread keeps from call to call.
template <class T>
struct Scratch {
  alignas(64) T student[kTile];
  alignas(64) T teacher[kTile];
  alignas(64) T gradient[kTile];
  Buffer<T> leads, kept;
  std::vector<int64_t> members;
  std::vector<std::pair<T, int64_t>> candidates, merged;

  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// Partial statistics of the rest groups over one chunk.
struct ChunkStats {
  GroupStats<double> rest[kMaxTerms];
  SoftmaxStats<double> ce;
};

// One row on its way through the three steps.
template <class T>
struct Row {
  int64_t sample;
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
      T* next = scratch_.kept.data(size * kept_arrays(o_));
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

  // A whole row, steps 1 to 3.
  void forward(int64_t sample) {
    Row<T> row = this->row(sample);
    if (skip(row)) return;
    place_members(row);
    for (int t = 0; t < o_.terms; ++t) {
      if (!selects(t)) continue;
      scratch_.merged.clear();
      for (int64_t c = 0; c < chunks(); ++c) select(row, t, c, scratch_.merged);
      rank(row, t, scratch_.merged);
    }
    ChunkStats total;
    for (int64_t c = 0; c < chunks(); ++c) {
      ChunkStats part;
      add_chunk(row, c, part);
      merge_chunk(total, part);
    }
    finish(row, total);
    if (!row.gradient) return;
    for (int64_t c = 0; c < chunks(); ++c) gradient(row, c);
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

  bool selects(int t) const { return o_.term[t].by_rank() && !repeats(t); }

  // Points each term at its leading classes: the target, or room for those still to be selected.
  void place_members(Row<T>& row) {
    int64_t* next;
    if (p_.members) {
      next = p_.members + row.sample * members_size(o_);
    } else {
      scratch_.members.resize(members_size(o_));
      next = scratch_.members.data();
    }
    for (int t = 0; t < o_.terms; ++t) {
      row.members[t] = o_.term[t].kind == PartitionKind::target ? const_cast<int64_t*>(p_.target + row.sample) : next;
      if (o_.term[t].by_rank()) next += o_.term[t].k;
    }
  }

  // Appends the k best classes of a chunk, by the teacher.
  void select(const Row<T>& row, int t, int64_t chunk, std::vector<std::pair<T, int64_t>>& best) {
    constexpr int kAccumulators = 64;  // enough subsets that the k-th best of their maxima is a close bound
    const Term& term = o_.term[t];
    auto& candidates = scratch_.candidates;
    candidates.clear();
    T bound = -INFINITY;  // the k-th best so far is no worse
    const int64_t end = std::min(p_.classes, (chunk + 1) * kChunk);
    for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(end - begin, kTile));
      T* values = scratch_.teacher;
      read(p_.teacher, row.teacher, begin, count, values);
      if (!term.largest)
        for (int i = 0; i < count; ++i) values[i] = -values[i];
      if (term.k <= kAccumulators / 2 && count >= kAccumulators) {
        alignas(64) T maxima[kAccumulators];
        std::fill_n(maxima, kAccumulators, T(-INFINITY));
        int i = 0;
        for (; i + kAccumulators <= count; i += kAccumulators)
          for (int j = 0; j < kAccumulators; j += kLanes<T>) store(maxima + j, max(load(values + i + j), load(maxima + j)));
        std::nth_element(maxima, maxima + term.k - 1, maxima + kAccumulators, std::greater<T>());
        bound = std::max(bound, maxima[term.k - 1]);
      }
      const Vec<T> bounds = broadcast(bound);
      for (int i = 0; i < count; i += kLanes<T>)
        for (uint32_t hits = not_less<T>(load(values + i), bounds); hits; hits &= hits - 1) {
          const int j = i + __builtin_ctz(hits);
          if (j < count) candidates.emplace_back(values[j], begin + j);
        }
      keep_best(candidates, term.k);
      if (static_cast<int>(candidates.size()) == term.k) bound = std::max(bound, candidates.back().first);
    }
    best.insert(best.end(), candidates.begin(), candidates.end());
  }

  void rank(Row<T>& row, int t, std::vector<std::pair<T, int64_t>>& best) {
    keep_best(best, o_.term[t].k);
    for (int i = 0; i < o_.term[t].k; ++i) row.members[t][i] = best[i].second;
    for (int other = t + 1; other < o_.terms; ++other)
      if (repeats(other)) std::copy_n(row.members[t], o_.term[t].k, row.members[other]);
  }

  // Step 1 for the rest groups of one chunk.
  void add_chunk(const Row<T>& row, int64_t chunk, ChunkStats& stats) {
    const int64_t end = std::min(p_.classes, (chunk + 1) * kChunk);
    for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
      const Tile tile = load_tile(row, begin, end);
      if (o_.has_ce()) add_softmax(tile.student, padded<T>(tile.count), stats.ce);
      for (int t = 0; t < o_.terms; ++t) {
        const Mask mask(*this, row, t, tile);
        GroupStats<double>& rest = stats.rest[t];
        const int count = padded<T>(tile.count);
        const double student_max = std::max<double>(rest.student_max, tile_max(tile.student, count));
        const double teacher_max = std::max<double>(rest.teacher_max, tile_max(tile.teacher, count));
        rebase(rest, student_max, teacher_max, double(exponent_[t]));
        add_sums_[t](tile.student, tile.teacher, count, exponent_[t], rest, kept(t, begin));
        if (kept_[t].student) kept_origin_[t][begin / kTile] = {student_max, teacher_max};
      }
    }
  }

  void merge_chunk(ChunkStats& into, const ChunkStats& part) const {
    for (int t = 0; t < o_.terms; ++t) merge(into.rest[t], part.rest[t], double(exponent_[t]));
    if (o_.has_ce()) merge(into.ce, part.ce);
  }

  // Step 2: the loss, its parts and the gradient's coefficients.
  void finish(Row<T>& row, const ChunkStats& total) {
    double loss = 0;
    double* parts = p_.row_parts ? p_.row_parts + row.sample * o_.parts() : nullptr;
    if (parts) *parts = 0;
    row.weight = static_cast<T>(p_.row_weight[row.sample]);
    if (o_.has_ce()) {
      const double at_target = value(p_.student, row.student, p_.target[row.sample]);
      const double ce = std::log(total.ce.sum) - (at_target - origin(total.ce.max));
      loss += o_.ce_weight * ce;
      row.ce_max = static_cast<T>(total.ce.max);
      row.ce_inverse = static_cast<T>(1 / total.ce.sum);
      if (parts) *parts = ce;
    }
    if (parts) ++parts;
    for (int t = 0; t < o_.terms; ++t) {
      const Term& term = o_.term[t];
      GroupStats<double> stats[kMaxGroups];
      int64_t sizes[kMaxGroups];
      const int rest = term.groups() - 1;
      for (int g = 0; g < rest; ++g) {
        sizes[g] = term.group_end(g) - term.group_begin(g);
        stats[g] = lead_stats(row, t, g);
      }
      sizes[rest] = p_.classes - (rest ? term.leads() : 0);
      stats[rest] = total.rest[t];
      TermResult<double> result;
      evaluate(term, stats, sizes, result);
      loss += result.loss;
      if (parts) parts = std::copy_n(result.parts, term.parts(), parts);
      for (int g = 0; g <= rest; ++g) {
        const GroupCoefficients<double>& by = result.group[g];
        row.group[t][g] = {T(stats[g].student_max), T(stats[g].teacher_max), {T(by.student), T(by.tilt), T(by.teacher)}};
      }
    }
    p_.row_loss[row.sample] = loss;
    if (p_.saved) save(row);
  }

  // Step 3 for one chunk.
  void gradient(const Row<T>& row, int64_t chunk) {
    const int64_t end = std::min(p_.classes, (chunk + 1) * kChunk);
    const bool direct = p_.gradient.class_stride == 1 && is_arithmetic(p_.gradient.dtype);
    const bool reads_logits = kept_[0].student == nullptr || o_.has_ce();
    const int leads = lead_gradients(row);
    for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
      Tile tile{begin, static_cast<int>(std::min<int64_t>(end - begin, kTile)), nullptr, nullptr, false};
      if (reads_logits) tile = load_tile(row, begin, end);
      T* out = direct ? static_cast<T*>(row.gradient) + begin : scratch_.gradient;
      for (int t = 0; t < o_.terms; ++t) {
        const bool tilt = o_.term[t].tilted();
        const GroupGradient<T> rest = weighed_group(row, t, o_.term[t].groups() - 1);
        if (kept_[t].student) {
          const auto kernel = t == 0 ? (tilt ? gradient_of_exps<T, false, true> : gradient_of_exps<T, false, false>)
                                     : (tilt ? gradient_of_exps<T, true, true> : gradient_of_exps<T, true, false>);
          kernel(kept(t, begin), tile.count, from_tile_origin(rest, t, begin), out);
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
      for (int i = 0; i < leads; ++i) {
        const auto [added, index] = scratch_.candidates[i];
        if (index >= begin && index < begin + tile.count) out[index - begin] += added;
      }
      if (!direct) write(p_.gradient, row.gradient, begin, tile.count, scratch_.gradient);
    }
    if (end == p_.classes) clear_beyond(row, p_.classes);
  }

 private:
  struct Tile {
    int64_t begin;
    int count;
    T* student;
    T* teacher;
    bool own;  // whether this is our copy, which may be masked
  };

  // Hides a term's leading classes in a tile while it lives: the tile then holds the rest group alone.
  class Mask {
   public:
    Mask(Worker& worker, const Row<T>& row, int t, const Tile& tile) : worker_(worker), tile_(tile) {
      if (worker.o_.term[t].groups() == 1 || !tile.own) return;
      members_ = row.members[t];
      leads_ = worker.o_.term[t].leads();
      worker.masked_.clear();
      for (int i = 0; i < leads_; ++i) {
        const int64_t j = members_[i] - tile.begin;
        if (j < 0 || j >= tile.count) continue;
        worker.masked_.push_back({static_cast<int>(j), tile.student[j], tile.teacher[j]});
        tile.student[j] = tile.teacher[j] = -INFINITY;
      }
    }
    ~Mask() {
      if (leads_ == 0) return;
      for (const auto& [j, student, teacher] : worker_.masked_) {
        tile_.student[j] = student;
        tile_.teacher[j] = teacher;
      }
    }
    Mask(const Mask&) = delete;
    Mask& operator=(const Mask&) = delete;

   private:
    Worker& worker_;
    const Tile& tile_;
    const int64_t* members_ = nullptr;
    int leads_ = 0;
  };

  static bool better(const std::pair<T, int64_t>& a, const std::pair<T, int64_t>& b) {
    const bool a_nan = a.first != a.first, b_nan = b.first != b.first;
    if (a_nan != b_nan) return a_nan;
    if (!a_nan && a.first != b.first) return a.first > b.first;
    return a.second < b.second;
  }

  static void keep_best(std::vector<std::pair<T, int64_t>>& candidates, int k) {
    const auto middle = candidates.begin() + std::min<int64_t>(k, candidates.size());
    std::partial_sort(candidates.begin(), middle, candidates.end(), better);
    candidates.erase(middle, candidates.end());
  }

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

  // Reads classes of a row into whole vectors.
  void read(const Matrix& matrix, const void* row, int64_t begin, int count, T* to) const {
    with_dtype(matrix.dtype, [&](auto element) {
      const auto* from = static_cast<const decltype(element)*>(row) + begin * matrix.class_stride;
      if (matrix.class_stride == 1) {
        widen_all(from, count, to);
      } else {
        for (int i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i * matrix.class_stride]));
      }
    });
    for (int i = count; i < padded<T>(count); ++i) to[i] = -INFINITY;
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
    with_dtype(p_.gradient.dtype, [&](auto element) {
      auto* to = static_cast<decltype(element)*>(row.gradient);
      for (int64_t i = first; i < p_.gradient_classes; ++i) to[i * p_.gradient.class_stride] = decltype(element){};
    });
  }
  void clear(const Row<T>& row) const { clear_beyond(row, 0); }

  // The tile that starts at `begin`, in place where nothing of it has to be converted, padded or masked.
  Tile load_tile(const Row<T>& row, int64_t begin, int64_t end) {
    const int count = static_cast<int>(std::min<int64_t>(end - begin, kTile));
    const bool as_is = p_.student.class_stride == 1 && p_.teacher.class_stride == 1 && is_arithmetic(p_.student.dtype) &&
                       is_arithmetic(p_.teacher.dtype) && count % kLanes<T> == 0 && !has_leads(row, begin, count);
    if (as_is) {
      return {begin, count, const_cast<T*>(static_cast<const T*>(row.student) + begin),
              const_cast<T*>(static_cast<const T*>(row.teacher) + begin), false};
    }
    read(p_.student, row.student, begin, count, scratch_.student);
    read(p_.teacher, row.teacher, begin, count, scratch_.teacher);
    return {begin, count, scratch_.student, scratch_.teacher, true};
  }

  bool has_leads(const Row<T>& row, int64_t begin, int count) const {
    for (int t = 0; t < o_.terms; ++t) {
      const int leads = o_.term[t].groups() == 1 ? 0 : o_.term[t].leads();
      for (int i = 0; i < leads; ++i)
        if (row.members[t][i] >= begin && row.members[t][i] < begin + count) return true;
    }
    return false;
  }

  Exps<T> kept(int t, int64_t begin) const {
    if (!kept_[t].student) return {};
    return {kept_[t].student + begin, kept_[t].teacher + begin, kept_[t].gap ? kept_[t].gap + begin : nullptr};
  }

  // The logits of a leading group, gathered into whole vectors.
  Tile gather(const Row<T>& row, int t, int g) {
    const Term& term = o_.term[t];
    const int first = term.group_begin(g), count = term.group_end(g) - first, size = padded<T>(count);
    T* student = scratch_.leads.data(3 * size);
    T* teacher = student + size;
    std::fill_n(student, 2 * size, T(-INFINITY));
    for (int i = 0; i < count; ++i) {
      student[i] = value(p_.student, row.student, row.members[t][first + i]);
      teacher[i] = value(p_.teacher, row.teacher, row.members[t][first + i]);
    }
    return {0, count, student, teacher, true};
  }

  GroupStats<double> lead_stats(const Row<T>& row, int t, int g) {
    const Tile tile = gather(row, t, g);
    GroupStats<double> stats;
    if (tile.count == 1 && std::isfinite(*tile.student) && std::isfinite(*tile.teacher)) {
      return {double(*tile.student), double(*tile.teacher), 1, 1, 0, 0};
    }
    const int count = padded<T>(tile.count);
    stats.student_max = tile_max(tile.student, count);
    stats.teacher_max = tile_max(tile.teacher, count);
    add_sums_leads_[t](tile.student, tile.teacher, count, exponent_[t], stats, {});
    return stats;
  }

  // What the leading classes' gradients get on top of the rest's sweep; into scratch_.candidates.
  int lead_gradients(const Row<T>& row) {
    auto& list = scratch_.candidates;
    list.clear();
    for (int t = 0; t < o_.terms; ++t) {
      const Term& term = o_.term[t];
      const auto kernel = term.tilted() ? gradient_of_logits<T, false, true> : gradient_of_logits<T, false, false>;
      for (int g = 0; g + 1 < term.groups(); ++g) {
        const Tile tile = gather(row, t, g);
        T* out = tile.student + 2 * padded<T>(tile.count);
        kernel(tile.student, tile.teacher, tile.count, exponent_[t], weighed_group(row, t, g), out);
        for (int i = 0; i < tile.count; ++i) list.emplace_back(out[i], row.members[t][term.group_begin(g) + i]);
      }
    }
    if (o_.has_ce()) list.emplace_back(-static_cast<T>(o_.ce_weight) * row.weight, p_.target[row.sample]);
    return static_cast<int>(list.size());
  }

  GroupGradient<T> weighed_group(const Row<T>& row, int t, int g) const {
    GroupGradient<T> group = row.group[t][g];
    group.by = {group.by.student * row.weight, group.by.tilt * row.weight, group.by.teacher * row.weight};
    return group;
  }

  // Coefficients for a tile's kept exponentials, which count from the maxima known when they were computed.
  GroupCoefficients<T> from_tile_origin(const GroupGradient<T>& group, int t, int64_t begin) const {
    const auto [student_max, teacher_max] = kept_origin_[t][begin / kTile];
    const double k = exponent_[t], student_to = group.student_max, teacher_to = group.teacher_max;
    const double student = rebase_factor(student_max, student_to, k), teacher = rebase_factor(teacher_max, teacher_to, k);
    const double gap = rebase_gap(student_max, student_to, teacher_max, teacher_to, k);
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

  struct Masked {
    int index;
    T student, teacher;
  };

  const RowsProblem& p_;
  const Objective& o_;
  Scratch<T>& scratch_;
  T exponent_[kMaxTerms];
  AddSums<T> add_sums_[kMaxTerms], add_sums_leads_[kMaxTerms];
  Exps<T> kept_[kMaxTerms];
  std::array<std::pair<double, double>, kKeptClasses / kTile> kept_origin_[kMaxTerms];
  std::vector<Masked> masked_;
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
    std::vector<std::vector<std::pair<T, int64_t>>> best(tasks);
    each_chunk([&](Worker<T>& worker, int64_t r, int64_t c) { worker.select(rows[r], t, c, best[r * chunks + c]); });
    for (size_t r = 0; r < rows.size(); ++r) {
      std::vector<std::pair<T, int64_t>> merged;
      for (int64_t c = 0; c < chunks; ++c) merged.insert(merged.end(), best[r * chunks + c].begin(), best[r * chunks + c].end());
      main.rank(rows[r], t, merged);
    }
  }
  std::vector<ChunkStats> stats(tasks);
  each_chunk([&](Worker<T>& worker, int64_t r, int64_t c) { worker.add_chunk(rows[r], c, stats[r * chunks + c]); });
  for (size_t r = 0; r < rows.size(); ++r) {
    ChunkStats total;
    for (int64_t c = 0; c < chunks; ++c) main.merge_chunk(total, stats[r * chunks + c]);
    main.finish(rows[r], total);
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
    for (int64_t n = begin; n < end; ++n) worker.forward(n);
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
