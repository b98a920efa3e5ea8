// Samples side by side in memory, classes apart, as the pixels of NCHW logits; and rows of few classes, transposed on
// the way. A sample is a lane for every class: planes of classes are walked, and nothing is gathered.
//
// A tile of samples is taken through all steps while its logits are in cache; where classes are too many for that, in
// chunks that are read again for the gradient.
#pragma once

#include "apply.h"
#include "class_norm.h"
#include "finalize_lanes.h"
#include "select.h"
#include "transpose.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kLeastSamples = 16;          // of a tile, where classes are many: still a whole line of floats
constexpr int kTileLogits = 16384;         // of a tile and a chunk of classes, one side: all arrays of them stay in L2
constexpr int64_t kStreamBytes = 8 << 20;  // gradients from here on would push everything else out of the caches
constexpr int kFewSelected = 32;           // by insertion: from more on, k steps a class cost more

// Whether samples are next to one another in memory, in lines of the last dimension's size.
inline bool side_by_side(const Problem& p, const Matrix& matrix) {
  return p.dims > 0 && matrix.sample_stride[p.dims - 1] == 1 && matrix.class_stride != 1;
}

// Whether samples go a lane each: those that lie side by side, and rows of few classes, along which vectors would be
// mostly empty.
inline bool by_channels(const Problem& p) {
  constexpr int64_t few_classes = 64;
  constexpr int64_t exact_in_float = int64_t{1} << 24;  // classes are compared as floats
  if (p.dims == 0 || p.samples == 0) return false;
  const bool planes = side_by_side(p, p.student) && side_by_side(p, p.teacher);
  return p.classes <= few_classes || (p.classes < exact_in_float && planes);
}

// Runs of at most `size` samples, which follow one another in memory where they do so in any of the matrices.
struct SampleRuns {
  int64_t line, runs_of_line, count;
  int most;

  SampleRuns(const Problem& p, int most_samples)
      : line(line_of(p)),
        runs_of_line(ceil_div(line, most_samples)),
        count(p.samples == 0 ? 0 : p.samples / line * runs_of_line),
        most(most_samples) {}

  int64_t first(int64_t run) const { return run / runs_of_line * line + run % runs_of_line * most; }
  int size(int64_t run) const { return static_cast<int>(std::min<int64_t>(most, line - run % runs_of_line * most)); }

 private:
  static int64_t line_of(const Problem& p) {
    if (p.dims == 0) return 1;
    for (const Matrix& matrix : {p.student, p.teacher, p.gradient})
      if (matrix.data && side_by_side(p, matrix)) return p.sample_size[p.dims - 1];
    return p.samples;
  }
};

// One class of some samples, in place or in `to`.
inline const float* read_samples(const Matrix& matrix, const void* samples, int64_t j, int count, float* to) {
  const float* from = nullptr;
  with_dtype(matrix.dtype, [&](auto element) {
    const auto* plane = static_cast<const decltype(element)*>(samples) + j * matrix.class_stride;
    if constexpr (std::is_same_v<float, decltype(element)>) {
      from = plane;
    } else {
      widen_all(plane, count, to);
      from = to;
    }
  });
  return from;
}

// One sample's k best classes so far, and at most as many that came after: O(1) a class whatever k.
class BestOf {
 public:
  BestOf(Key* room, int k) : keys_(room), k_(k) {}  // room for 2 k
  void add(float value, int64_t index) {
    const Key key = key_of(value, index);
    if (key < least_) return;
    if (held_ == 2 * k_) cut();
    keys_[held_++] = key;
  }
  // The k best, in order.
  const Key* sorted() {
    cut();
    std::sort(keys_, keys_ + k_, std::greater<>());
    return keys_;
  }

 private:
  void cut() {
    std::nth_element(keys_, keys_ + k_ - 1, keys_ + held_, std::greater<>());
    least_ = keys_[k_ - 1];
    held_ = k_;
  }
  Key* keys_;
  Key least_ = 0;
  int k_, held_ = 0;
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

// Sums over samples, for each class, of the gradient in the standardised logit and of its product with that logit.
class PlaneSums {
 public:
  explicit PlaneSums(int64_t classes) : classes_(classes) {
    std::fill_n(lanes_.data(2 * classes * kLanes), 2 * classes * kLanes, 0.0f);
  }
  // Adds to `totals`, 2 x classes, until the last flush().
  void start(double* totals) { totals_ = totals; }
  void add(int64_t j, Vec gradient, Vec product) {
    float* lanes = lanes_.data(0) + 2 * j * kLanes;
    store(lanes, load(lanes) + gradient);
    store(lanes + kLanes, load(lanes + kLanes) + product);
  }
  void end_tile() {
    constexpr int tiles_in_float = 8;
    if (++tiles_ % tiles_in_float == 0) flush();
  }
  void flush() {
    float* lanes = lanes_.data(0);
    for (int64_t j = 0; j < classes_; ++j)
      for (int which = 0; which < 2; ++which, lanes += kLanes) {
        totals_[which * classes_ + j] += horizontal_sum(load(lanes));
        store(lanes, Vec{});
      }
    tiles_ = 0;
  }

 private:
  const int64_t classes_;
  Buffer<float> lanes_;
  double* totals_ = nullptr;
  int tiles_ = 0;
};

// A sum over classes, a sample a lane; blocks of classes keep the chains of roundings short.
struct LaneSum {
  Vec block{}, blocks{};

  void flush() {
    blocks += block;
    block = Vec{};
  }
};

// Memory that a thread keeps from call to call.
struct ChannelScratch {
  Buffer<float> planes, ranking, columns, selected_logits;
  Buffer<int32_t> selected;
  Buffer<Key> keys;
  alignas(64) float valid[kMostSamples];
  // Where samples are standardised: as in Norm, of student and teacher, and the slope of the chain rule.
  alignas(64) float high[2][kMostSamples], factor[2][kMostSamples], offset[2][kMostSamples];
  alignas(64) float unit_slope[kMostSamples], slope[kMostSamples];

  static ChannelScratch& of_this_thread() {
    static thread_local ChannelScratch scratch;
    return scratch;
  }
};

// One tile of samples on its way through the steps.
class ChannelWorker {
 public:
  ChannelWorker(const Problem& problem, const ClassNorms& norms, PlaneSums* sums = nullptr)
      : p_(problem),
        o_(problem.objective),
        norms_(norms),
        sums_(sums),
        scratch_(ChannelScratch::of_this_thread()),
        tile_(tile_samples(problem)),
        pitch_(tile_ + 16),
        chunk_(std::min<int64_t>(kTileLogits / tile_, p_.classes)) {
    streams_ = p_.gradient.data && p_.dims > 0 && p_.gradient.sample_stride[p_.dims - 1] == 1 &&
               p_.samples * p_.gradient_classes * dtype_size(p_.gradient.dtype) >= kStreamBytes;
    allocate();
  }
  ~ChannelWorker() {
    if (streams_) stream_fence();
  }

  static int tile_samples(const Problem& p) {
    return p.classes * kMostSamples <= kTileLogits ? kMostSamples : kLeastSamples;
  }

  // Starts a tile of `count` samples from `first` on; false if none counts.
  bool begin_tile(int64_t first, int count) {
    first_ = first;
    count_ = count;
    side_[0] = element(p_, p_.student, first);
    side_[1] = element(p_, p_.teacher, first);
    out_ = p_.gradient.data ? element(p_, p_.gradient, first) : nullptr;
    std::fill_n(lanes_.weight, tile_, 0.0f);
    std::fill_n(scratch_.valid, tile_, 0.0f);
    int valid = 0;
    for (int i = 0; i < count; ++i) {
      lanes_.weight[i] = static_cast<float>(p_.weight(first + i));
      scratch_.valid[i] = lanes_.weight[i] != 0;
      valid += lanes_.weight[i] != 0;
    }
    all_valid_ = valid == tile_;
    loaded_ = reduced_ = false;
    return valid > 0;
  }
  // The same where coefficients say which samples count.
  void set_valid(const float* coefficients) {
    const int64_t size = coefficients_size(o_);
    for (int i = 0; i < count_; ++i)
      scratch_.valid[i] = scratch_.valid[i] != 0 && coefficients[i * size + size - 1] != 0;
    all_valid_ = false;
  }
  void set_norms() {
    if (o_.standardize == Standardize::by_sample) set_sample_norms();
  }

  // SELECT, for all sweeps.
  void select() {
    for (int s = 0; s < o_.sweeps; ++s) {
      const Partition& partition = o_.sweep[s].partition;
      int32_t* to = selected_[s];
      if (partition.by_rank()) partition.k <= kFewSelected ? select_few(partition, to) : select_many(partition, to);
    }
    set_targets();
  }
  // Takes what is selected by rank from, or writes it to, one sample after the other.
  void set_selected(const int64_t* from) {
    each_selected([&](int32_t& place, int64_t at) { place = static_cast<int32_t>(from[at]); });
    set_targets();
  }
  void get_selected(int64_t* to) const {
    each_selected([&](int32_t& place, int64_t at) { to[at] = place; });
  }

  // REDUCE: statistics of all groups, a sample a lane.
  void reduce() {
    reduced_ = true;
    each_chunk([&](int64_t begin, int64_t end) {
      load_chunk(begin, end);
      if (o_.has_ce()) add_target_logits();
      if (o_.has_ce() && !o_.ce_in_sweep()) add_own_softmax();
      for (int s = 0; s < o_.sweeps; ++s) {
        take_selected(s);
        reduce_group(s, rest_of(s), begin == 0, logits_[0], logits_[1], classes_, kept_[s]);
        put_selected(s);
      }
    });
    for (int s = 0; s < o_.sweeps; ++s)
      for (int g = 0; g < rest_of(s); ++g) {
        const Partition& partition = o_.sweep[s].partition;
        const int rank = partition.group_begin(g);
        reduce_selected(s, g, rank, partition.group_end(g) - rank);
      }
  }
  void finalize(const LanesFinalizer& finalizer) const {
    for (int i = 0; i < count_; i += kLanes) finalizer.run(lanes_, i);
  }
  const SampleLanes& lanes() const { return lanes_; }
  // Takes coefficients of one sample after the other, for an upstream gradient that is in the weights.
  void set_coefficients(const float* from) {
    const int64_t size = coefficients_size(o_);
    for (int i = 0; i < tile_; ++i) {
      const bool valid = i < count_ && scratch_.valid[i] != 0;
      for (int64_t c = 0; c < size; ++c) lanes_.coefficients[c][i] = valid ? from[i * size + c] : 0;
      multiply_coefficients(o_, {lanes_.coefficients.data + i, lanes_.coefficients.pitch},
                            valid ? lanes_.weight[i] : 0);
    }
  }

  // APPLY and STORE.
  void apply() {
    if (o_.standardize == Standardize::by_sample) set_slopes();
    each_chunk([&](int64_t begin, int64_t end) {
      if (!one_chunk() || o_.standardize != Standardize::by_sample) term_gradient(begin, end);
      finish_gradient();
    });
    if (sums_) sums_->end_tile();
    clear(p_.classes);
  }

  // No gradient for classes from `begin` on.
  void clear(int64_t begin) const {
    if (!p_.gradient.data || p_.gradient_is_zero) return;
    const int64_t end = p_.gradient_classes;
    if (!side_by_side(p_, p_.gradient)) {
      for (int i = 0; i < count_ && begin < end; ++i)
        clear_classes(p_.gradient, element(p_, p_.gradient, first_ + i), begin, end);
      return;
    }
    with_dtype(p_.gradient.dtype, [&](auto type) {
      using Element = decltype(type);
      for (int64_t j = begin; j < end; ++j)
        std::fill_n(static_cast<Element*>(out_) + j * p_.gradient.class_stride, count_, Element{});
    });
  }

 private:
  bool one_chunk() const { return chunk_ == p_.classes; }
  // Whether the exponentials of all classes are still there.
  bool kept() const { return reduced_ && one_chunk(); }
  int rest_of(int s) const { return o_.sweep[s].groups() - 1; }
  bool ce(int s) const { return s == 0 && o_.ce_in_sweep(); }
  template <class Body>
  void each_chunk(const Body& body) {
    for (int64_t begin = 0; begin < p_.classes; begin += chunk_) body(begin, std::min(begin + chunk_, p_.classes));
  }
  // The selected classes of target partitions.
  void set_targets() const {
    for (int s = 0; s < o_.sweeps; ++s)
      for (int i = 0; i < tile_ && o_.sweep[s].partition.kind == PartitionKind::target; ++i)
        selected_[s][i] = scratch_.valid[i] != 0 ? static_cast<int32_t>(p_.target[first_ + i]) : 0;
  }
  template <class Body>
  void each_selected(const Body& body) const {
    const int64_t size = selected_size(o_);
    int64_t column = 0;
    for (int s = 0; s < o_.sweeps; ++s) {
      if (!o_.sweep[s].partition.by_rank()) continue;
      for (int rank = 0; rank < o_.sweep[s].partition.k; ++rank, ++column)
        for (int i = 0; i < count_; ++i) body(selected_[s][rank * tile_ + i], (first_ + i) * size + column);
    }
  }

  // Planes of a chunk: logits of both sides, the gradient, the raw student, what is transposed, and exponentials.
  void allocate() {
    const int64_t size = chunk_ * pitch_;
    int64_t arrays = 5, selected = 0;
    for (int s = 0; s < o_.sweeps; ++s) {
      arrays += 2 + o_.sweep[s].reverse + ce(s);
      selected += o_.sweep[s].partition.selected();
    }
    float* next = scratch_.planes.data(size * arrays);
    const auto array = [&] {
      next += size;
      return next - size;
    };
    for (float** planes : {&logits_[0], &logits_[1], &gradient_, &raw_, &rows_}) *planes = array();
    int32_t* classes = scratch_.selected.data(selected * tile_);
    float* logits = scratch_.selected_logits.data(selected * pitch_ * 2);
    int64_t column = 0;
    for (int s = 0; s < o_.sweeps; ++s) {
      kept_[s] = {array(), array()};
      if (o_.sweep[s].reverse) kept_[s].gap = array();
      if (ce(s)) kept_[s].ce = array();
      const int count = o_.sweep[s].partition.selected();
      selected_[s] = classes;
      classes += count * tile_;
      for (float*& side : selected_logits_[s]) {
        side = logits;
        logits += count * pitch_;
      }
      first_column_[s] = column;
      column += o_.sweep[s].groups() * kGroupColumns;
    }
    ce_column_ = column;
    lanes_ = SampleLanes::in(scratch_.columns, o_, kMostSamples);
  }

  // Logits of a chunk as the terms see them, and raw ones of the student if the cross entropy needs those too.
  void load_chunk(int64_t begin, int64_t end) {
    begin_ = begin;
    classes_ = static_cast<int>(end - begin);
    if (loaded_) return;
    load_side(0, begin, end, logits_[0]);
    load_side(1, begin, end, logits_[1]);
    if (o_.has_ce() && o_.standardize != Standardize::none) read_planes(0, begin, end, raw_);
    loaded_ = one_chunk();
  }
  // The teacher's alone, unless the other side can stay.
  void load_teacher(int64_t begin, int64_t end) {
    if (one_chunk()) return load_chunk(begin, end);
    load_side(1, begin, end, logits_[1]);
  }
  const float* raw() const { return o_.standardize == Standardize::none ? logits_[0] : raw_; }

  // The classes of a chunk, plane by plane; zeros for samples that do not count.
  void read_planes(int side, int64_t begin, int64_t end, float* to) const {
    const Matrix& matrix = side ? p_.teacher : p_.student;
    if (!side_by_side(p_, matrix)) {
      read_rows(p_, matrix, block(begin, end), rows_, planes(to));
    } else {
      for (int64_t j = begin; j < end; ++j) copy_samples(side, j, to + (j - begin) * pitch_);
    }
    for (int64_t j = 0; j < end - begin && !all_valid_; ++j)
      for (int i = 0; i < tile_; i += kLanes) {
        float* at = to + j * pitch_ + i;
        store(at, load(scratch_.valid + i) == 0 ? Vec{} : load(at));
      }
  }
  Planes planes(float* data) const { return {data, tile_, pitch_}; }
  SampleBlock block(int64_t begin, int64_t end) const { return {first_, count_, begin, static_cast<int>(end - begin)}; }

  void copy_samples(int side, int64_t j, float* to) const {
    const float* from = read_samples(side ? p_.teacher : p_.student, side_[side], j, count_, to);
    if (count_ < tile_) {
      if (from != to) std::copy_n(from, count_, to);
      std::fill_n(to + count_, tile_ - count_, 0.0f);
    } else if (from != to) {
      for (int i = 0; i < tile_; i += kLanes) store(to + i, load(from + i));
    }
  }

  void load_side(int side, int64_t begin, int64_t end, float* to) const {
    read_planes(side, begin, end, to);
    if (o_.standardize == Standardize::none) return;
    const Norms own{scratch_.high[side], scratch_.factor[side], scratch_.offset[side]};
    for (int64_t j = begin; j < end; ++j, to += pitch_)
      for (int i = 0; i < tile_; i += kLanes) {
        const Vec logit = load(to + i);
        const Norms& of_class = norms_[side];
        store(to + i, o_.standardize == Standardize::by_sample
                          ? own.at(i, logit)
                          : (logit - of_class.high[j]) * of_class.factor[j] + of_class.offset[j]);
      }
  }

  // Each sample's own moments, from the raw logits, for both sides.
  void set_sample_norms() {
    for (int side = 0; side < 2; ++side)
      for (int i = 0; i < tile_; i += kLanes) {
        Vec centre{}, count{}, square{};
        // The second time from close to the mean, so that nothing cancels in the squares.
        for (const bool centred : {false, true}) {
          LaneSum there, sum, squares;
          each_chunk([&](int64_t begin, int64_t end) {
            if (!one_chunk() || (!centred && i == 0)) read_planes(side, begin, end, logits_[side]);
            const float* plane = logits_[side] + i;
            if (begin == 0 && !centred) centre = load(plane) == -INFINITY ? Vec{} : load(plane);
            for (int64_t j = 0; j < end - begin; ++j, plane += pitch_) {
              const Vec v = load(plane), d = v == -INFINITY ? Vec{} : v - centre;
              there.block += v == -INFINITY ? Vec{} : broadcast(1.0f);
              sum.block += d;
              squares.block += d * d;
              if (j % kRun == kRun - 1) there.flush(), sum.flush(), squares.flush();
            }
            there.flush(), sum.flush(), squares.flush();
          });
          count = there.blocks;
          const Vec some = max(count, broadcast(1.0f)), shift = sum.blocks / some;
          square = squares.blocks - sum.blocks * shift;
          if (!centred) centre += shift;
          for (int l = 0; l < kLanes && centred; ++l)
            set_sample_norm(side, i + l, {count[l], double(centre[l]) + shift[l], square[l]});
        }
      }
  }
  void set_sample_norm(int side, int i, Moments<double> moments) {
    const bool right = moments.m2 >= kLeastSquare * moments.count && moments.m2 < INFINITY;
    if (!right && i < count_ && scratch_.valid[i] != 0) {
      const Matrix& matrix = side ? p_.teacher : p_.student;
      const void* sample = element(p_, matrix, first_ + i);
      moments = moments_in_double(p_.classes, [&](int64_t j) { return read_class(matrix, sample, j); });
    }
    const Norm norm(moments.mean, o_.inv_std(moments));
    scratch_.high[side][i] = norm.high;
    scratch_.factor[side][i] = norm.factor;
    scratch_.offset[side][i] = norm.offset;
    if (side == 0) scratch_.unit_slope[i] = ::KDK_NAMESPACE::unit_slope(o_, moments);
  }

  // What the teacher's logits are ranked by: the largest first, NaN before all.
  static Vec rank_value(Vec teacher, bool largest) {
    const Vec value = largest ? teacher : -teacher;
    return value == value ? value : broadcast(INFINITY);
  }

  // By an insertion sort of vectors of samples.
  void select_few(const Partition& partition, int32_t* to) {
    const int k = partition.k;
    // Of each vector of samples, place by place: the values, then the classes. NaN marks a place that is still empty.
    float* best = scratch_.ranking.data(2 * k * tile_);
    std::fill_n(best, 2 * k * tile_, NAN);
    each_chunk([&](int64_t begin, int64_t end) {
      load_teacher(begin, end);
      for (int i = 0; i < tile_; i += kLanes)
        for (int64_t j = begin; j < end; ++j) {
          float* place = best + 2 * k * i;
          float* last = place + 2 * kLanes * (k - 1);
          Vec value = rank_value(load(logits_[1] + (j - begin) * pitch_ + i), partition.largest);
          Vec index = broadcast(static_cast<float>(j));
          if (j >= k && not_less(load(last), value) == (uint64_t{1} << kLanes) - 1) continue;
          for (; place <= last; place += 2 * kLanes) {
            const Vec held = load(place), held_index = load(place + kLanes);
            const auto stays = (held > value) | ((held == value) & (held_index < index));
            store(place, stays ? held : value);
            store(place + kLanes, stays ? held_index : index);
            value = stays ? value : held;
            index = stays ? index : held_index;
          }
        }
    });
    for (int rank = 0; rank < k; ++rank)
      for (int i = 0; i < tile_; ++i) {
        const int vector = i / kLanes * kLanes;
        to[rank * tile_ + i] = static_cast<int32_t>(best[2 * k * vector + (2 * rank + 1) * kLanes + i - vector]);
      }
  }

  // By partitioning each sample's own classes.
  void select_many(const Partition& partition, int32_t* to) {
    const int64_t room = 2 * static_cast<int64_t>(partition.k);
    Key* keys = scratch_.keys.data(room * tile_);
    std::vector<BestOf> best;
    for (int i = 0; i < tile_; ++i) best.emplace_back(keys + i * room, partition.k);
    each_chunk([&](int64_t begin, int64_t end) {
      load_teacher(begin, end);
      float values[kMostSamples];
      for (int64_t j = begin; j < end; ++j) {
        const float* plane = logits_[1] + (j - begin) * pitch_;
        for (int i = 0; i < tile_; i += kLanes) store(values + i, rank_value(load(plane + i), partition.largest));
        for (int i = 0; i < tile_; ++i) best[i].add(values[i], j);
      }
    });
    for (int i = 0; i < tile_; ++i) {
      const Key* sorted = best[i].sorted();
      for (int rank = 0; rank < partition.k; ++rank)
        to[rank * tile_ + i] = static_cast<int32_t>(index_of(sorted[rank]));
    }
  }

  // Calls body(place of the selected class in the chunk's planes, place among the selected ones) for those in the
  // chunk.
  template <class Body>
  void each_in_chunk(int s, const Body& body) const {
    const auto end = static_cast<uint32_t>(classes_);
    for (int rank = 0; rank < o_.sweep[s].partition.selected(); ++rank) {
      const int32_t* of_rank = selected_[s] + rank * tile_;
      bool any = one_chunk();
      for (int i = 0; i < tile_ && !one_chunk(); ++i) any |= static_cast<uint32_t>(of_rank[i] - begin_) < end;
      for (int i = 0; i < tile_ && any; ++i) {
        const auto j = static_cast<uint32_t>(of_rank[i] - begin_);
        if (j < end) body(static_cast<int64_t>(j) * pitch_ + i, static_cast<int64_t>(rank) * pitch_ + i);
      }
    }
  }
  // Takes the selected classes out of the chunk, to planes of their own, and puts them back.
  void take_selected(int s) const {
    each_in_chunk(s, [&](int64_t at, int64_t own) {
      for (int side = 0; side < 2; ++side) {
        selected_logits_[s][side][own] = logits_[side][at];
        logits_[side][at] = kAbsent;
      }
    });
  }
  void put_selected(int s) const {
    each_in_chunk(s, [&](int64_t at, int64_t own) {
      for (int side = 0; side < 2; ++side) logits_[side][at] = selected_logits_[s][side][own];
    });
  }
  void replace_absent(int s, float by) const {
    each_in_chunk(s, [&](int64_t at, int64_t) { logits_[0][at] = logits_[1][at] = by; });
  }

  // Statistics of planes of classes, merged with what is there unless they are the first.
  void reduce_group(int s, int g, bool first, const float* student, const float* teacher, int count, const Exps& exps) {
    bool careful = false;
    alignas(64) float tops[2][kMostSamples];
    const auto find_tops = [&] {
      bool deep = false;
      for (int i = 0; i < tile_; i += kLanes) {
        Vec top_s = broadcast(-INFINITY), top_t = top_s;
        for (int j = 0; j < count; ++j) {
          top_s = max(load(student + j * pitch_ + i), top_s);
          top_t = max(load(teacher + j * pitch_ + i), top_t);
        }
        store(tops[0] + i, top_s);
        store(tops[1] + i, top_t);
        const Ints low = (top_s > kDeep) & (top_t > kDeep);
        for (int l = 0; l < kLanes; ++l) deep |= low[l] == 0;
      }
      return deep;
    };
    if (find_tops() && g == rest_of(s)) {
      careful = true;
      replace_absent(s, -INFINITY);
      find_tops();
    }
    const int64_t column = first_column_[s] + g * kGroupColumns;
    for (int i = 0; i < tile_; i += kLanes) {
      const Vec top_s = load(tops[0] + i), top_t = load(tops[1] + i);
      const Shifts by{top_s == -INFINITY ? Vec{} : top_s, top_t == -INFINITY ? Vec{} : top_t, o_.sweep[s].inv_t()};
      GroupStats<Vec> stats;
      const auto add = [&](bool carefully) {
        return choose_add_planes(o_.sweep[s].reverse, ce(s), carefully)(*this, student + i, teacher + i, count, by,
                                                                        exps.from(i), stats);
      };
      if (careful || !add(false)) add(true);
      stats.student_shift = top_s;
      stats.teacher_shift = top_t;
      store_stats(column, i, o_.sweep[s].inv_t(), first, stats);
    }
    if (careful) replace_absent(s, kAbsent);
  }

  void store_stats(int64_t column, int i, float inv_t, bool first, const GroupStats<Vec>& stats) const {
    const Vec* values[] = {&stats.student_shift, &stats.teacher_shift, &stats.student_sum, &stats.teacher_sum,
                           &stats.teacher_ratio, &stats.student_ratio, &stats.ce_sum};
    if (first) {
      for (int c = 0; c < kGroupColumns; ++c) store(lanes_.stats[column + c] + i, *values[c]);
      return;
    }
    for (int l = 0; l < kLanes; ++l) {
      const auto at = [&](int c) { return double(lanes_.stats[column + c][i + l]); };
      const auto part = [&](int c) { return double((*values[c])[l]); };
      GroupStats<double> total{at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
      merge(total, {part(0), part(1), part(2), part(3), part(4), part(5), part(6)}, double(inv_t));
      set_stats(lanes_.stats, column, i + l, total);
    }
  }

  // Adds up planes for a vector of samples; false if it takes more care (see Sums).
  template <bool Reverse, bool Ce, bool Careful>
  static bool add_planes(const ChannelWorker& worker, const float* student, const float* teacher, int count,
                         const Shifts& shifts, const Exps& to, GroupStats<Vec>& stats) {
    const Exps exps = to;
    const Shifts by = shifts;
    const int pitch = worker.pitch_;
    Sums<Reverse, Ce, Careful> sums;
    for (int j = 0; j < count;) {
      for (const int end = std::min(count, j + 2 * kRun); j < end; ++j)
        sums.add(load(student + j * pitch), load(teacher + j * pitch), by, j % 2, exps, j * pitch);
      sums.flush();
    }
    if (!Careful && !sums.finite()) return false;
    stats.student_sum = sums.student.blocks;
    stats.teacher_sum = sums.teacher.blocks;
    stats.teacher_ratio = sums.teacher_ratio.blocks;
    stats.student_ratio = sums.student_ratio.blocks;
    stats.ce_sum = sums.ce.blocks;
    return true;
  }
  using AddPlanes = bool (*)(const ChannelWorker&, const float*, const float*, int, const Shifts&, const Exps&,
                             GroupStats<Vec>&);
  static AddPlanes choose_add_planes(bool reverse, bool ce, bool careful) {
    static constexpr AddPlanes kChoices[] = {
        add_planes<false, false, false>, add_planes<false, false, true>, add_planes<false, true, false>,
        add_planes<false, true, true>,   add_planes<true, false, false>, add_planes<true, false, true>,
        add_planes<true, true, false>,   add_planes<true, true, true>,
    };
    return kChoices[4 * reverse + 2 * ce + careful];
  }

  // A group of selected classes; one class exactly.
  void reduce_selected(int s, int g, int rank, int count) {
    const float* student = selected_logits_[s][0] + rank * pitch_;
    const float* teacher = selected_logits_[s][1] + rank * pitch_;
    if (count > 1) {
      Buffer<float>& room = scratch_.ranking;
      float* exps = room.data(static_cast<int64_t>(4) * count * pitch_);
      const int64_t size = static_cast<int64_t>(count) * pitch_;
      return reduce_group(s, g, true, student, teacher, count, {exps, exps + size, nullptr, exps + 3 * size});
    }
    const int64_t column = first_column_[s] + g * kGroupColumns;
    for (int i = 0; i < tile_; ++i) {
      GroupStats<double> stats;
      stats.student_shift = student[i];
      stats.teacher_shift = teacher[i];
      stats.student_sum = stats.ce_sum = single_sum(stats.student_shift);
      stats.teacher_sum = single_sum(stats.teacher_shift);
      set_stats(lanes_.stats, column, i, stats);
    }
  }

  // The target's raw logit, for the cross entropy.
  void add_target_logits() const {
    float* to = lanes_.stats[ce_column_];
    if (begin_ == 0) std::fill_n(to, tile_, 0.0f);
    for (int i = 0; i < count_; ++i) {
      if (scratch_.valid[i] == 0) continue;
      const int64_t j = p_.target[first_ + i] - begin_;
      if (0 <= j && j < classes_) to[i] = raw()[j * pitch_ + i];
    }
  }

  // The softmax of the cross entropy, where it sees other logits than the terms.
  void add_own_softmax() const {
    float *shifts = lanes_.stats[ce_column_ + 1], *sums = lanes_.stats[ce_column_ + 2];
    for (int i = 0; i < tile_; i += kLanes) {
      Vec top = begin_ == 0 ? broadcast(-INFINITY) : load(shifts + i);
      const Vec before = top;
      for (int j = 0; j < classes_; ++j) top = max(load(raw_ + j * pitch_ + i), top);
      const Vec from = top == -INFINITY ? Vec{} : top;
      LaneSum sum;
      for (int j = 0; j < classes_; ++j) {
        sum.block += VecMath::exp(load(raw_ + j * pitch_ + i) - from);
        if (j % kRun == kRun - 1) sum.flush();
      }
      sum.flush();
      const Vec rebased = begin_ == 0 ? Vec{} : load(sums + i) * VecMath::exp(before - from);
      store(shifts + i, top);
      store(sums + i, sum.blocks + rebased);
    }
  }

  // The terms' gradient in the logits they see, for one chunk.
  void term_gradient(int64_t begin, int64_t end) {
    load_chunk(begin, end);
    for (int s = 0; s < o_.sweeps; ++s) {
      const bool tilt = o_.sweep[s].tilted(rest_of(s));
      if (!kept()) take_selected(s);
      if (!kept()) replace_absent(s, -INFINITY);
      const int64_t column = first_column_[s] + rest_of(s) * kGroupColumns;
      for (int i = 0; i < tile_; i += kLanes) choose_apply_planes(tilt, ce(s), s > 0)(*this, s, column, i, classes_);
      if (!kept()) put_selected(s);
      add_selected_gradients(s);
    }
    if (o_.ce_in_sweep()) add_target_gradient();
  }

  // The coefficients of a vector of samples.
  Coefficients<Vec> coefficients(int64_t column, int i) const {
    const auto at = [&](int c) { return load(lanes_.coefficients[column + c] + i); };
    return {at(2), at(3), at(4), at(5), at(6)};
  }
  Shifts shifts(int s, int64_t column, int i) const {
    const Vec student = load(lanes_.coefficients[column] + i), teacher = load(lanes_.coefficients[column + 1] + i);
    return {student == -INFINITY ? Vec{} : student, teacher == -INFINITY ? Vec{} : teacher, o_.sweep[s].inv_t()};
  }

  template <bool Tilt, bool Ce, bool Add>
  static void apply_planes(const ChannelWorker& worker, int s, int64_t column, int i, int count) {
    const Coefficients<Vec> by = worker.coefficients(column, i);
    const Shifts shifts = worker.shifts(s, column, i);
    const Exps exps = worker.kept_[s].from(i);
    const float *student = worker.logits_[0] + i, *teacher = worker.logits_[1] + i;
    float* out = worker.gradient_ + i;
    const int pitch = worker.pitch_;
    const bool kept = worker.kept();
    for (int j = 0; j < count; ++j) {
      const int at = j * pitch;
      Vec gradient;
      if (kept) {
        gradient = gradient_at<Tilt, Ce>(load(exps.student + at), load(exps.teacher + at),
                                         Tilt ? load(exps.gap + at) : Vec{}, Ce ? load(exps.ce + at) : Vec{}, by);
      } else {
        const VectorExps<Tilt, Ce> now(load(student + at), load(teacher + at), shifts);
        gradient = gradient_at<Tilt, Ce>(now.student, now.teacher, now.gap, now.ce, by);
      }
      store(out + at, Add ? load(out + at) + gradient : gradient);
    }
  }
  using ApplyPlanes = void (*)(const ChannelWorker&, int, int64_t, int, int);
  static ApplyPlanes choose_apply_planes(bool tilt, bool ce, bool add) {
    static constexpr ApplyPlanes kChoices[] = {
        apply_planes<false, false, false>, apply_planes<false, false, true>, apply_planes<false, true, false>,
        apply_planes<false, true, true>,   apply_planes<true, false, false>, apply_planes<true, false, true>,
        apply_planes<true, true, false>,   apply_planes<true, true, true>,
    };
    return kChoices[4 * tilt + 2 * ce + add];
  }

  // Adds the gradients of a sweep's selected classes that are in the chunk.
  void add_selected_gradients(int s) {
    const Partition& partition = o_.sweep[s].partition;
    if (partition.selected() == 0) return;
    float* values = scratch_.ranking.data(static_cast<int64_t>(partition.selected()) * pitch_);
    for (int g = 0; g < rest_of(s); ++g) {
      const int64_t column = first_column_[s] + g * kGroupColumns;
      const bool single = partition.group_end(g) - partition.group_begin(g) == 1;
      for (int i = 0; i < tile_; i += kLanes) {
        const Coefficients<Vec> by = coefficients(column, i);
        const Shifts of = shifts(s, column, i);
        for (int rank = partition.group_begin(g); rank < partition.group_end(g); ++rank) {
          const int64_t at = static_cast<int64_t>(rank) * pitch_ + i;
          const VectorExps<true, true> exps(load(selected_logits_[s][0] + at), load(selected_logits_[s][1] + at), of);
          const Vec gap = single ? Vec{} : exps.gap;
          store(values + at, gradient_at<true, true>(exps.student, exps.teacher, gap, exps.ce, by));
        }
      }
    }
    each_in_chunk(s, [&](int64_t at, int64_t own) { gradient_[at] += values[own]; });
  }
  void add_target_gradient() const {
    for (int i = 0; i < count_; ++i) {
      if (scratch_.valid[i] == 0) continue;
      const int64_t j = p_.target[first_ + i] - begin_;
      if (0 <= j && j < classes_) gradient_[j * pitch_ + i] += lanes_.coefficients[ce_column_][i];
    }
  }

  // The slope of the chain rule through each sample's standardisation.
  void set_slopes() {
    LaneSum total[kMostSamples / kLanes];
    each_chunk([&](int64_t begin, int64_t end) {
      term_gradient(begin, end);
      for (int i = 0; i < tile_; i += kLanes) {
        LaneSum& sum = total[i / kLanes];
        for (int j = 0; j < classes_; ++j) {
          const Vec h = load(logits_[0] + j * pitch_ + i);
          sum.block += h == -INFINITY ? Vec{} : h * load(gradient_ + j * pitch_ + i);
          if (j % kRun == kRun - 1) sum.flush();
        }
        sum.flush();
      }
    });
    for (int i = 0; i < tile_; i += kLanes)
      store(scratch_.slope + i, load(scratch_.unit_slope + i) * total[i / kLanes].blocks);
  }

  // From the gradient in the standardised logits to that in the logits, with the cross entropy's, written where it
  // belongs.
  void finish_gradient() {
    if (o_.standardize != Standardize::none) {
      if (sums_) add_class_sums();
      chain();
      if (o_.has_ce()) {
        add_own_softmax_gradient();
        add_target_gradient();
      }
    }
    for (int j = 0; j < classes_ && !all_valid_; ++j)
      for (int i = 0; i < tile_; i += kLanes) {
        float* at = gradient_ + j * pitch_ + i;
        store(at, load(scratch_.valid + i) == 0 ? Vec{} : load(at));
      }
    if (!side_by_side(p_, p_.gradient))
      return write_rows(p_, p_.gradient, block(begin_, begin_ + classes_), rows_, planes(gradient_));
    for (int j = 0; j < classes_; ++j) put(gradient_ + j * pitch_, begin_ + j);
  }

  void add_class_sums() const {
    for (int j = 0; j < classes_; ++j) {
      Vec sum{}, product{};
      for (int i = 0; i < tile_; i += kLanes) {
        const Vec h = load(logits_[0] + j * pitch_ + i), valid = load(scratch_.valid + i);
        const Vec kept = valid == 0 ? broadcast(-INFINITY) : h;  // nothing comes from masked classes either
        const Vec gradient = kept == -INFINITY ? Vec{} : load(gradient_ + j * pitch_ + i);
        sum += gradient;
        product += kept == -INFINITY ? Vec{} : gradient * h;
      }
      sums_->add(begin_ + j, sum, product);
    }
  }

  void chain() const {
    const bool by_class = o_.standardize == Standardize::by_class;
    for (int j = 0; j < classes_; ++j)
      for (int i = 0; i < tile_; i += kLanes) {
        float* at = gradient_ + j * pitch_ + i;
        const Vec h = load(logits_[0] + j * pitch_ + i), gradient = load(at);
        const Vec value = by_class ? gradient * norms_[0].factor[begin_ + j]
                                   : (gradient - h * load(scratch_.slope + i)) * load(scratch_.factor[0] + i);
        store(at, h == -INFINITY ? Vec{} : value);
      }
  }

  void add_own_softmax_gradient() const {
    for (int i = 0; i < tile_; i += kLanes) {
      const Vec shift = load(lanes_.coefficients[ce_column_ + 1] + i);
      const Vec from = shift == -INFINITY ? Vec{} : shift, factor = load(lanes_.coefficients[ce_column_ + 2] + i);
      for (int j = 0; j < classes_; ++j) {
        float* at = gradient_ + j * pitch_ + i;
        store(at, load(at) + VecMath::exp(load(raw_ + j * pitch_ + i) - from) * factor);
      }
    }
  }

  // Writes a plane's gradient where it belongs.
  void put(const float* plane, int64_t j) const {
    with_dtype(p_.gradient.dtype, [&](auto type) {
      using Element = decltype(type);
      auto* to = static_cast<Element*>(out_) + j * p_.gradient.class_stride;
      if constexpr (std::is_same_v<Element, float>) {
        if (streams_ && count_ == tile_ && reinterpret_cast<uintptr_t>(to) % sizeof(Vec) == 0) {
          for (int i = 0; i < tile_; i += kLanes) stream(to + i, load(plane + i));
          return;
        }
      }
      narrow_all(plane, count_, to);
    });
  }

  const Problem& p_;
  const Objective& o_;
  const ClassNorms& norms_;
  PlaneSums* const sums_;
  ChannelScratch& scratch_;
  bool streams_ = false;  // the gradient past the caches
  const int tile_;        // samples of a tile, some of which may be missing
  const int pitch_;       // from plane to plane: no power of two, or the planes would share their place in L1
  const int64_t chunk_;   // classes of a chunk
  // Of the chunk at hand, plane by plane.
  float *logits_[2], *gradient_, *raw_, *rows_;
  Exps kept_[kMaxTerms];
  // Selected classes by rank, and their logits: tile_, or pitch_, apart.
  int32_t* selected_[kMaxTerms];
  float* selected_logits_[kMaxTerms][2];
  int64_t first_column_[kMaxTerms], ce_column_;
  SampleLanes lanes_;
  int64_t begin_ = 0;
  int classes_ = 0;
  bool loaded_ = false, reduced_ = false;  // all classes of the tile
  // Of the tile at hand.
  int64_t first_ = 0;
  int count_ = 0;
  bool all_valid_ = true;
  const void* side_[2];
  void* out_ = nullptr;
};

// The steps over all samples ------------------------------------------------------------------------------------------

class ChannelRunner {
 public:
  ChannelRunner(const Problem& p, const Parallel& parallel)
      : p_(p), parallel_(parallel), norms_(p, parallel), runs_(p, ChannelWorker::tile_samples(p)) {}

  void fused(const Values& values, double* sums) const {
    const LanesFinalizer finalizer(p_.objective, p_.classes, values.parts);
    each_tile(
        values.totals ? values.columns : 0, sums,
        [&](ChannelWorker& worker, int64_t first, int count, double* totals) {
          if (!worker.begin_tile(first, count)) {
            if (values.of_samples) std::fill_n(values.of_samples + first * values.columns, count * values.columns, 0.0);
            return worker.clear(0);
          }
          worker.set_norms();
          worker.select();
          worker.reduce();
          worker.finalize(finalizer);
          store_values(worker.lanes(), values, first, count, totals);
          if (p_.gradient.data) worker.apply();
        },
        values.totals);
  }

  void select(int64_t* selected) const {
    if (selected_size(p_.objective) == 0) return;
    each_tile(0, nullptr, [&](ChannelWorker& worker, int64_t first, int count, double*) {
      const int64_t size = selected_size(p_.objective);
      if (!worker.begin_tile(first, count))
        return static_cast<void>(std::fill_n(selected + first * size, count * size, 0));
      worker.set_norms();
      worker.select();
      worker.get_selected(selected);
    });
  }

  void reduce(const int64_t* selected, float* stats) const {
    const int64_t size = stats_size(p_.objective);
    each_tile(0, nullptr, [&](ChannelWorker& worker, int64_t first, int count, double*) {
      if (!worker.begin_tile(first, count))
        return static_cast<void>(std::fill_n(stats + first * size, count * size, 0.0f));
      start(worker, selected);
      worker.reduce();
      for (int i = 0; i < count; ++i)
        for (int64_t c = 0; c < size; ++c)
          stats[(first + i) * size + c] = p_.weight(first + i) == 0 ? 0 : worker.lanes().stats[c][i];
    });
  }

  void apply(const int64_t* selected, const float* coefficients, double* sums) const {
    const int64_t size = coefficients_size(p_.objective);
    each_tile(0, sums, [&](ChannelWorker& worker, int64_t first, int count, double*) {
      if (!worker.begin_tile(first, count)) return worker.clear(0);
      const float* of_tile = coefficients + first * size;
      worker.set_valid(of_tile);
      start(worker, selected);
      worker.set_coefficients(of_tile);
      worker.apply();
    });
  }

 private:
  // Selected classes, and where they are groups of their own their logits, from what was selected before.
  void start(ChannelWorker& worker, const int64_t* selected) const {
    worker.set_norms();
    worker.set_selected(selected);
  }

  void store_values(const SampleLanes& lanes, const Values& values, int64_t first, int count, double* totals) const {
    for (int i = 0; i < count; ++i)
      for (int64_t v = 0; v < values.columns; ++v) {
        const double value = lanes.weight[i] == 0 ? 0 : lanes.values[v][i];
        if (totals) {
          totals[v] += value == 0 ? 0 : p_.weight(first + i) * value;
        } else {
          values.of_samples[(first + i) * values.columns + v] = value;
        }
      }
  }

  // Calls body(worker, first, count, totals) for all tiles, in blocks whose totals and sums of classes are added up in
  // order: the same whatever the threads.
  template <class Body>
  void each_tile(int64_t columns, double* sums, const Body& body, double* totals = nullptr) const {
    constexpr int64_t kBlockLogits = 1 << 18, kMostSummed = 16;
    const int64_t most = sums ? kMostSummed : runs_.count * runs_.most * p_.classes / kBlockLogits;
    const int64_t blocks = std::clamp<int64_t>(most, 1, std::max<int64_t>(runs_.count, 1));
    const int64_t of_sums = sums ? 2 * p_.classes : 0;
    std::vector<double> partial_totals(blocks * columns), partial_sums(blocks * of_sums);
    parallel_.run(0, blocks, 1, [&](int64_t begin, int64_t end) {
      PlaneSums of_block(sums ? p_.classes : 0);
      ChannelWorker worker(p_, norms_, sums ? &of_block : nullptr);
      for (int64_t block = begin; block < end; ++block) {
        of_block.start(partial_sums.data() + block * of_sums);
        double* to = columns ? partial_totals.data() + block * columns : nullptr;
        for (int64_t i = block * runs_.count / blocks; i < (block + 1) * runs_.count / blocks; ++i)
          body(worker, runs_.first(i), runs_.size(i), to);
        if (sums) of_block.flush();
      }
    });
    if (sums) add_blocks(partial_sums, blocks, sums);
    if (columns) add_blocks(partial_totals, blocks, totals);
  }

  const Problem& p_;
  const Parallel& parallel_;
  const ClassNorms norms_;
  const SampleRuns runs_;
};

// Runs of samples that are gone through at a time, class by class.
constexpr int kMomentsRun = 1024;

// Count, mean and m2 of each class, plane by plane.
inline void channel_moments(const Problem& p, const Parallel& parallel, double* moments) {
  const SampleRuns runs(p, kMomentsRun);
  const int64_t blocks = std::min<int64_t>(runs.count, 16), size = 2 * p.classes;
  std::vector<Moments<double>> partial(blocks * size);
  parallel.run(0, blocks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float scratch[kMomentsRun];
    for (int64_t block = begin; block < end; ++block)
      for (int64_t run = block * runs.count / blocks; run < (block + 1) * runs.count / blocks; ++run) {
        const int64_t first = runs.first(run);
        const int count = runs.size(run);
        bool valid[kMomentsRun];
        for (int i = 0; i < count; ++i) valid[i] = p.weight(first + i) != 0;
        const bool all = std::find(valid, valid + count, false) == valid + count;
        for (int64_t j = 0; j < size; ++j) {
          const Matrix& matrix = j < p.classes ? p.student : p.teacher;
          const float* logits = read_samples(matrix, element(p, matrix, first), j % p.classes, count, scratch);
          if (!all) {  // masked logits count in no moments
            for (int i = 0; i < count; ++i) scratch[i] = valid[i] ? logits[i] : -INFINITY;
            logits = scratch;
          }
          merge(partial[block * size + j], moments_of(logits, count));
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

inline void channel_norm_backward(const Problem& p, const NormBackward& backward, const Parallel& parallel) {
  const SampleRuns runs(p, kMomentsRun);
  parallel.run(0, runs.count, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float logits[kMomentsRun], gradient[kMomentsRun];
    for (int64_t run = end; run-- > begin;) {
      const int64_t first = runs.first(run);
      const int count = runs.size(run);
      const void* student = element(p, p.student, first);
      void* out = element(p, p.gradient, first);
      for (int64_t j = 0; j < p.classes; ++j) {
        const float* z = read_samples(p.student, student, j, count, logits);
        float* g = const_cast<float*>(read_samples(p.gradient, out, j, count, gradient));
        if (g != gradient) std::copy_n(g, count, gradient);
        backward.samples(j, count, z, gradient);
        with_dtype(p.gradient.dtype, [&](auto type) {
          auto* to = static_cast<decltype(type)*>(out) + j * p.gradient.class_stride;
          for (int i = 0; i < count; ++i)
            if (p.weight(first + i) != 0) narrow(gradient[i], to[i]);
        });
      }
    }
  });
}

}  // namespace
}  // namespace KDK_NAMESPACE
