// Samples side by side in memory, classes apart, as the pixels of NCHW logits; and rows of few classes, transposed on
// the way. A sample is a lane for every class: planes of classes are walked, and nothing is gathered.
//
// A tile is all classes of some samples, which are taken through all steps while their logits are in cache.
#pragma once

#include "apply.h"
#include "class_norm.h"
#include "finalize_lanes.h"
#include "select.h"
#include "transpose.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kLeastSamples = 16;          // of a tile, where classes are many: still a whole line of floats
constexpr int kTileLogits = 16384;         // of a tile, one side, so that all arrays of it stay in L2
constexpr int64_t kStreamBytes = 8 << 20;  // gradients from here on would push everything else out of the caches
constexpr int kLaneRun = 8;                // classes that a lane adds up before the sum goes on
constexpr int kFewSelected = 32;           // by insertion: from more on, k steps a class cost more

// Whether samples are next to one another in memory, in lines of the last dimension's size.
inline bool side_by_side(const Problem& p, const Matrix& matrix) {
  return p.dims > 0 && matrix.sample_stride[p.dims - 1] == 1 && matrix.class_stride != 1;
}

// Whether samples go a lane each: those that lie side by side, and rows of few classes, along which vectors would be
// mostly empty.
inline bool by_channels(const Problem& p) {
  constexpr int64_t very_few_classes = 64, few_classes = 256;  // the latter pay where tiles are full
  constexpr int64_t exact_in_float = int64_t{1} << 24;         // classes are compared as floats
  if (p.dims == 0 || p.samples == 0) return false;
  const bool planes = side_by_side(p, p.student) && side_by_side(p, p.teacher);
  const bool few = p.classes <= (p.samples >= kMostSamples ? few_classes : very_few_classes);
  return few || (p.classes < exact_in_float && planes);
}

// Runs of at most `most_samples` samples, which follow one another in memory where they do so in any of the matrices.
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

// A sum over classes j, a sample a lane; blocks of classes keep the chains of roundings short.
struct LaneSum {
  Vec block{}, blocks{};

  KDK_INLINE void add(Vec value, int64_t j) {
    block += value;
    if (j % kLaneRun != kLaneRun - 1) return;
    blocks += block;
    block = Vec{};
  }
  Vec total() const { return blocks + block; }
};

// Memory that a thread keeps from call to call.
struct ChannelScratch {
  Buffer<float> planes, few, columns, selected_logits;
  Buffer<int32_t> selected;
  Buffer<Key> keys;
  alignas(64) float valid[kMostSamples];
  // Where samples are standardised: as in Norm, of student and teacher, and the slope of the chain rule.
  alignas(64) float high[2][kMostSamples], factor[2][kMostSamples], offset[2][kMostSamples];
  alignas(64) float unit_slope[kMostSamples];

  static ChannelScratch& of_this_thread() {
    static thread_local ChannelScratch scratch;
    return scratch;
  }
};

// One tile of samples on its way through the steps.
class ChannelWorker {
 public:
  // `sums` are added to; `flow` is what flows through the classes' mean and deviation, if that is to be taken off.
  ChannelWorker(const Problem& problem, const ClassNorms& norms, PlaneSums* sums, const NormBackward* flow = nullptr)
      : p_(problem),
        o_(problem.objective),
        norms_(norms),
        sums_(sums),
        flow_(flow),
        scratch_(ChannelScratch::of_this_thread()),
        tile_(tile_samples(problem)),
        pitch_(tile_ + 16) {
    streams_ = p_.gradient.data && p_.gradient.sample_stride[p_.dims - 1] == 1 &&
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
      scratch_.valid[i] = p_.valid(first + i);
      valid += p_.valid(first + i);
    }
    all_valid_ = valid == tile_;
    return valid > 0;
  }

  // LOAD and SELECT: logits as the terms see them, and raw ones of the student if the cross entropy needs those too.
  // Selected are the best classes, or those that are given. By sample raw logits are ranked: their order is the same,
  // and large ones differ where standardised they do not.
  void load_logits(const int64_t* selected) {
    read_planes(0, logits_[0]);
    read_planes(1, logits_[1]);
    const bool raw = o_.standardize != Standardize::by_class;
    if (raw) selected ? set_selected(selected) : select();
    if (o_.standardize != Standardize::none) {
      if (o_.has_ce()) std::copy_n(logits_[0], p_.classes * pitch_, raw_);
      for (int side = 0; side < 2; ++side) standardize_planes(side);
    }
    if (!raw) selected ? set_selected(selected) : select();
  }
  void get_selected(int64_t* to) const {
    each_selected([&](int32_t& place, int i, int64_t at) {
      if (i < count_) to[at] = place;
    });
  }

  // REDUCE: statistics of all groups, a sample a lane.
  void reduce() {
    if (o_.has_ce()) set_target_logits();
    if (o_.has_ce() && !o_.ce_in_sweep()) set_own_softmax();
    for (int s = 0; s < o_.sweeps; ++s) {
      const Partition& partition = o_.sweep[s].partition;
      take_selected(s);
      reduce_group(s, rest_of(s), logits_[0], logits_[1], static_cast<int>(p_.classes), kept_[s]);
      put_selected(s);
      for (int g = 0; g < rest_of(s); ++g)
        reduce_selected(s, g, partition.group_begin(g), partition.group_end(g) - partition.group_begin(g));
    }
  }
  void finalize(const LanesFinalizer& finalizer) const {
    for (int i = 0; i < count_; i += kLanes) finalizer.run(lanes_, i);
  }
  const SampleLanes& lanes() const { return lanes_; }
  // Takes coefficients of one sample after the other, for an upstream gradient.
  void set_coefficients() {
    const int64_t size = coefficients_size(o_);
    const float* from = p_.coefficients + first_ * size;
    for (int i = 0; i < tile_; ++i) {
      const bool valid = i < count_ && scratch_.valid[i] != 0;
      for (int64_t c = 0; c < size; ++c) lanes_.coefficients[c][i] = valid ? from[i * size + c] : 0;
      multiply_coefficients(o_, {lanes_.coefficients.data + i, lanes_.coefficients.pitch}, lanes_.weight[i]);
    }
  }

  // APPLY and STORE, from the exponentials that reduce() kept.
  void apply() {
    for (int s = 0; s < o_.sweeps; ++s) {
      const int64_t column = first_column_[s] + rest_of(s) * kGroupColumns;
      const ApplyPlanes apply = choose_apply_planes(o_.sweep[s].tilted(rest_of(s)), ce(s), s > 0);
      for (int i = 0; i < tile_; i += kLanes) apply(*this, s, column, i);
      add_selected_gradients(s);
    }
    if (sums_) add_class_sums();
    if (!p_.gradient.data) return;
    if (o_.standardize != Standardize::none) chain();
    if (o_.has_ce()) add_ce_gradient();
    store_gradient();
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
  int rest_of(int s) const { return o_.sweep[s].groups() - 1; }
  bool ce(int s) const { return s == 0 && o_.ce_in_sweep(); }
  const float* raw() const { return o_.standardize == Standardize::none ? logits_[0] : raw_; }
  Planes planes(float* data) const { return {data, tile_, pitch_}; }
  SampleBlock block() const { return {first_, count_, 0, static_cast<int>(p_.classes)}; }

  // Planes: logits of both sides, the gradient, the raw student, what is transposed, and exponentials.
  void allocate() {
    const int64_t size = p_.classes * pitch_;
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

  // Calls body(class, first sample, place in planes) for all vectors.
  template <class Body>
  KDK_INLINE void each_vector(const Body& body) const {
    for (int64_t j = 0; j < p_.classes; ++j)
      for (int i = 0; i < tile_; i += kLanes) body(j, i, j * pitch_ + i);
  }

  // Raw logits, plane by plane; zeros for samples that do not count.
  void read_planes(int side, float* to) const {
    const Matrix& matrix = side ? p_.teacher : p_.student;
    if (!side_by_side(p_, matrix)) {
      read_rows(p_, matrix, block(), rows_, planes(to));
    } else {
      for (int64_t j = 0; j < p_.classes; ++j) copy_samples(side, j, to + j * pitch_);
    }
    if (!all_valid_) zero_invalid(to);
  }
  void zero_invalid(float* to) const {
    each_vector([&](int64_t, int i, int64_t at) KDK_INLINE {
      store(to + at, load(scratch_.valid + i) == 0 ? Vec{} : load(to + at));
    });
  }
  void copy_samples(int side, int64_t j, float* to) const {
    const float* from = read_samples(side ? p_.teacher : p_.student, side_[side], j, count_, to);
    if (count_ < tile_) {
      if (from != to) std::copy_n(from, count_, to);
      std::fill_n(to + count_, tile_ - count_, 0.0f);
    } else if (from != to) {
      for (int i = 0; i < tile_; i += kLanes) store(to + i, load(from + i));
    }
  }

  void standardize_planes(int side) {
    float* to = logits_[side];
    if (o_.standardize == Standardize::by_sample) {
      for (int i = 0; i < tile_; i += kLanes) set_sample_norms(side, i);
      const Norms own{scratch_.high[side], scratch_.factor[side], scratch_.offset[side]};
      each_vector([&](int64_t, int i, int64_t at) KDK_INLINE { store(to + at, own.at(i, load(to + at))); });
    } else {
      const Norms& of = norms_[side];
      each_vector([&](int64_t j, int, int64_t at) KDK_INLINE {
        store(to + at, (load(to + at) - of.high[j]) * of.factor[j] + of.offset[j]);
      });
    }
  }
  // Each sample's own moments, from the raw logits.
  void set_sample_norms(int side, int i) {
    const float* first = logits_[side] + i;
    Vec centre = load(first) == -INFINITY ? Vec{} : load(first);
    // The second time from close to the mean, so that nothing cancels in the squares.
    for (const bool centred : {false, true}) {
      LaneSum there, sum, squares;
      for (int64_t j = 0; j < p_.classes; ++j) {
        const Vec v = load(first + j * pitch_), d = v == -INFINITY ? Vec{} : v - centre;
        there.add(v == -INFINITY ? Vec{} : broadcast(1.0f), j);
        sum.add(d, j);
        squares.add(d * d, j);
      }
      const Vec count = there.total(), shift = sum.total() / max(count, broadcast(1.0f));
      const Vec square = squares.total() - sum.total() * shift;
      for (int l = 0; l < kLanes && centred; ++l)
        set_sample_norm(side, i + l, {count[l], double(centre[l]) + shift[l], square[l]});
      centre += shift;
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
    if (side == 0) scratch_.unit_slope[i] = unit_slope(o_, moments);
  }

  // SELECT, for all sweeps.
  void select() {
    for (int s = 0; s < o_.sweeps; ++s) {
      const Partition& partition = o_.sweep[s].partition;
      if (!partition.by_rank()) continue;
      partition.k <= kFewSelected ? select_few(partition, selected_[s]) : select_many(partition, selected_[s]);
    }
    set_targets();
  }
  // Takes what is selected by rank from one sample after the other.
  void set_selected(const int64_t* from) {
    each_selected([&](int32_t& place, int i, int64_t at) {
      place = scratch_.valid[i] != 0 ? static_cast<int32_t>(from[at]) : 0;  // else there may be anything
    });
    set_targets();
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
        for (int i = 0; i < tile_; ++i) body(selected_[s][rank * tile_ + i], i, (first_ + i) * size + column);
    }
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
    float* best = scratch_.few.data(2 * k * tile_);
    std::fill_n(best, 2 * k * tile_, NAN);
    for (int i = 0; i < tile_; i += kLanes)
      for (int64_t j = 0; j < p_.classes; ++j) {
        float* place = best + 2 * k * i;
        float* last = place + 2 * kLanes * (k - 1);
        Vec value = rank_value(load(logits_[1] + j * pitch_ + i), partition.largest);
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
    float values[kMostSamples];
    for (int64_t j = 0; j < p_.classes; ++j) {
      for (int i = 0; i < tile_; i += kLanes)
        store(values + i, rank_value(load(logits_[1] + j * pitch_ + i), partition.largest));
      for (int i = 0; i < tile_; ++i) best[i].add(values[i], j);
    }
    for (int i = 0; i < tile_; ++i) {
      const Key* sorted = best[i].sorted();
      for (int rank = 0; rank < partition.k; ++rank)
        to[rank * tile_ + i] = static_cast<int32_t>(index_of(sorted[rank]));
    }
  }

  // Calls body(place of the selected class in planes, place among the selected ones).
  template <class Body>
  void each_place(int s, const Body& body) const {
    for (int64_t rank = 0; rank < o_.sweep[s].partition.selected(); ++rank)
      for (int i = 0; i < tile_; ++i) body(int64_t{selected_[s][rank * tile_ + i]} * pitch_ + i, rank * pitch_ + i);
  }
  // Takes the selected classes out of the tile, to planes of their own, and puts them back.
  void take_selected(int s) const {
    each_place(s, [&](int64_t at, int64_t own) {
      for (int side = 0; side < 2; ++side) {
        selected_logits_[s][side][own] = logits_[side][at];
        logits_[side][at] = kAbsent;
      }
    });
  }
  void put_selected(int s) const {
    each_place(s, [&](int64_t at, int64_t own) {
      for (int side = 0; side < 2; ++side) logits_[side][at] = selected_logits_[s][side][own];
    });
  }
  void replace_absent(int s, float by) const {
    each_place(s, [&](int64_t at, int64_t) { logits_[0][at] = logits_[1][at] = by; });
  }

  // Statistics of planes of classes.
  void reduce_group(int s, int g, const float* student, const float* teacher, int count, const Exps& exps) {
    Vec tops[2][kMostSamples / kLanes];
    const auto find_tops = [&] {
      Ints deep{};
      for (int i = 0; i < tile_; i += kLanes) {
        Vec top_s = broadcast(-INFINITY), top_t = top_s;
        for (int j = 0; j < count; ++j) {
          top_s = max(load(student + j * pitch_ + i), top_s);
          top_t = max(load(teacher + j * pitch_ + i), top_t);
        }
        tops[0][i / kLanes] = top_s;
        tops[1][i / kLanes] = top_t;
        deep |= ~((top_s > kDeep) & (top_t > kDeep));
      }
      return any(deep);
    };
    const bool careful = find_tops() && g == rest_of(s);
    if (careful) {
      replace_absent(s, -INFINITY);
      find_tops();
    }
    const int64_t column = first_column_[s] + g * kGroupColumns;
    for (int i = 0; i < tile_; i += kLanes) {
      GroupStats<Vec> stats;
      stats.student_shift = tops[0][i / kLanes];
      stats.teacher_shift = tops[1][i / kLanes];
      const auto add = [&](bool carefully) {
        return choose_add_planes(o_.sweep[s].reverse, ce(s), carefully)(student + i, teacher + i, count, pitch_,
                                                                        o_.sweep[s].inv_t(), exps.from(i), stats);
      };
      if (careful || !add(false)) add(true);
      store_stats(lanes_.stats, column, i, stats);
    }
    if (careful) replace_absent(s, kAbsent);
  }

  // Adds up planes for a vector of samples; false if it takes more care (see Sums).
  template <bool Reverse, bool Ce, bool Careful>
  static bool add_planes(const float* student, const float* teacher, int count, int pitch, float inv_t, const Exps& to,
                         GroupStats<Vec>& stats) {
    const Exps exps = to;
    const Vec student_shift = stats.student_shift, teacher_shift = stats.teacher_shift;
    const Shifts by{student_shift == -INFINITY ? Vec{} : student_shift,
                    teacher_shift == -INFINITY ? Vec{} : teacher_shift, inv_t};
    // Few classes leave no room for the roundings of long chains; of many, blocks are added up in blocks again.
    constexpr int block = 2 * kLaneRun, blocks = kRun * block;
    Vec total[5]{};
    for (int first = 0; first < count; first += blocks) {
      Sums<Reverse, Ce, Careful> sums;
      const int last = std::min(count, first + blocks);
      for (int j = first; j < last; sums.flush())
        for (const int end = std::min(last, j + block); j < end; ++j)
          sums.add(load(student + j * pitch), load(teacher + j * pitch), by, j % 2, exps, j * pitch);
      if (!Careful && !sums.finite()) return false;
      total[0] += sums.student.blocks;
      total[1] += sums.teacher.blocks;
      total[2] += sums.teacher_ratio.blocks;
      total[3] += sums.student_ratio.blocks;
      total[4] += sums.ce.blocks;
    }
    stats.student_sum = total[0];
    stats.teacher_sum = total[1];
    stats.teacher_ratio = total[2];
    stats.student_ratio = total[3];
    stats.ce_sum = total[4];
    return true;
  }
  using AddPlanes = bool (*)(const float*, const float*, int, int, float, const Exps&, GroupStats<Vec>&);
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
      const int64_t size = static_cast<int64_t>(count) * pitch_;
      float* exps = scratch_.few.data(3 * size);
      return reduce_group(s, g, student, teacher, count, {exps, exps + size, nullptr, exps + 2 * size});
    }
    for (int i = 0; i < tile_; i += kLanes) {
      GroupStats<Vec> stats;
      stats.student_shift = load(student + i);
      stats.teacher_shift = load(teacher + i);
      stats.student_sum = stats.ce_sum = single_exp(stats.student_shift);
      stats.teacher_sum = single_exp(stats.teacher_shift);
      store_stats(lanes_.stats, first_column_[s] + g * kGroupColumns, i, stats);
    }
  }

  // The target's raw logit, for the cross entropy.
  void set_target_logits() const {
    for (int i = 0; i < tile_; ++i)
      lanes_.stats[ce_column_][i] = scratch_.valid[i] == 0 ? 0 : raw()[p_.target[first_ + i] * pitch_ + i];
  }
  // The softmax of the cross entropy, where it sees other logits than the terms.
  void set_own_softmax() const {
    for (int i = 0; i < tile_; i += kLanes) {
      Vec top = broadcast(-INFINITY);
      for (int64_t j = 0; j < p_.classes; ++j) top = max(load(raw_ + j * pitch_ + i), top);
      const Vec from = top == -INFINITY ? Vec{} : top;
      LaneSum sum;
      for (int64_t j = 0; j < p_.classes; ++j) sum.add(VecMath::exp(load(raw_ + j * pitch_ + i) - from), j);
      store(lanes_.stats[ce_column_ + 1] + i, top);
      store(lanes_.stats[ce_column_ + 2] + i, sum.total());
    }
  }

  // The coefficients and shifts of a group, for a vector of samples.
  Coefficients<Vec> coefficients(int64_t column, int i) const {
    const auto at = [&](int c) { return load(lanes_.coefficients[column + c] + i); };
    return {at(2), at(3), at(4), at(5), at(6)};
  }
  Shifts shifts(int s, int64_t column, int i) const {
    const Vec student = load(lanes_.coefficients[column] + i), teacher = load(lanes_.coefficients[column + 1] + i);
    return {student == -INFINITY ? Vec{} : student, teacher == -INFINITY ? Vec{} : teacher, o_.sweep[s].inv_t()};
  }

  // The terms' gradient in the logits they see.
  template <bool Tilt, bool Ce, bool Add>
  static void apply_planes(const ChannelWorker& worker, int s, int64_t column, int i) {
    const Coefficients<Vec> by = worker.coefficients(column, i);
    const Exps exps = worker.kept_[s].from(i);
    float* out = worker.gradient_ + i;
    const int64_t pitch = worker.pitch_, end = worker.p_.classes * pitch;
    for (int64_t at = 0; at < end; at += pitch) {
      const Vec gradient =
          gradient_at<Tilt, Ce>(load(exps.student + at), load(exps.teacher + at), Tilt ? load(exps.gap + at) : Vec{},
                                Ce ? load(exps.ce + at) : Vec{}, by);
      store(out + at, Add ? load(out + at) + gradient : gradient);
    }
  }
  using ApplyPlanes = void (*)(const ChannelWorker&, int, int64_t, int);
  static ApplyPlanes choose_apply_planes(bool tilt, bool ce, bool add) {
    static constexpr ApplyPlanes kChoices[] = {
        apply_planes<false, false, false>, apply_planes<false, false, true>, apply_planes<false, true, false>,
        apply_planes<false, true, true>,   apply_planes<true, false, false>, apply_planes<true, false, true>,
        apply_planes<true, true, false>,   apply_planes<true, true, true>,
    };
    return kChoices[4 * tilt + 2 * ce + add];
  }

  // Adds the gradients of a sweep's selected classes.
  void add_selected_gradients(int s) {
    const Partition& partition = o_.sweep[s].partition;
    if (partition.selected() == 0) return;
    float* values = scratch_.few.data(static_cast<int64_t>(partition.selected()) * pitch_);
    for (int g = 0; g < rest_of(s); ++g) {
      const int64_t column = first_column_[s] + g * kGroupColumns;
      for (int i = 0; i < tile_; i += kLanes) {
        const Coefficients<Vec> by = coefficients(column, i);
        const Shifts of = shifts(s, column, i);
        for (int rank = partition.group_begin(g); rank < partition.group_end(g); ++rank) {
          const int64_t at = static_cast<int64_t>(rank) * pitch_ + i;
          const VectorExps<true, true> exps(load(selected_logits_[s][0] + at), load(selected_logits_[s][1] + at), of);
          store(values + at, o_.sweep[s].tilted(g)
                                 ? gradient_at<true, true>(exps.student, exps.teacher, exps.gap, exps.ce, by)
                                 : gradient_at<false, true>(exps.student, exps.teacher, Vec{}, exps.ce, by));
        }
      }
    }
    each_place(s, [&](int64_t at, int64_t own) { gradient_[at] += values[own]; });
  }

  // Adds up, for each class, the gradient in the standardised logit and its product with that logit.
  void add_class_sums() const {
    for (int64_t j = 0; j < p_.classes; ++j) {
      Vec sum{}, product{};
      for (int i = 0; i < tile_; i += kLanes) {
        const Vec h = load(logits_[0] + j * pitch_ + i), valid = load(scratch_.valid + i);
        const Vec kept = valid == 0 ? broadcast(-INFINITY) : h;  // nothing comes from masked classes either
        const Vec gradient = kept == -INFINITY ? Vec{} : load(gradient_ + j * pitch_ + i);
        sum += gradient;
        product += kept == -INFINITY ? Vec{} : gradient * h;
      }
      sums_->add(j, sum, product);
    }
    sums_->end_tile();
  }

  // From the gradient in the standardised logits to that in the logits. By sample the terms do not change when all its
  // logits move together, so that the mean of their gradient is 0.
  void chain() const {
    const bool by_class = o_.standardize == Standardize::by_class;
    for (int i = 0; i < tile_; i += kLanes) {
      LaneSum product;
      for (int64_t j = 0; j < p_.classes && !by_class; ++j) {
        const Vec h = load(logits_[0] + j * pitch_ + i);
        product.add(h == -INFINITY ? Vec{} : h * load(gradient_ + j * pitch_ + i), j);
      }
      const Vec slope = by_class ? Vec{} : load(scratch_.unit_slope + i) * product.total();
      const Vec factor = by_class ? Vec{} : load(scratch_.factor[0] + i);
      for (int64_t j = 0; j < p_.classes; ++j) {
        float* at = gradient_ + j * pitch_ + i;
        const Vec h = load(logits_[0] + j * pitch_ + i);
        const Vec through = !by_class ? h * slope : flow_ ? flow_->flow_of_one(j, h) : Vec{};
        const Vec value = (load(at) - through) * (by_class ? broadcast(norms_[0].factor[j]) : factor);
        store(at, h == -INFINITY ? Vec{} : value);
      }
    }
  }

  void add_ce_gradient() const {
    for (int i = 0; i < tile_ && !o_.ce_in_sweep(); i += kLanes) {
      const Vec shift = load(lanes_.coefficients[ce_column_ + 1] + i);
      const Vec from = shift == -INFINITY ? Vec{} : shift, factor = load(lanes_.coefficients[ce_column_ + 2] + i);
      for (int64_t j = 0; j < p_.classes; ++j) {
        float* at = gradient_ + j * pitch_ + i;
        store(at, load(at) + VecMath::exp(load(raw_ + j * pitch_ + i) - from) * factor);
      }
    }
    for (int i = 0; i < count_; ++i)
      if (scratch_.valid[i] != 0) gradient_[p_.target[first_ + i] * pitch_ + i] += lanes_.coefficients[ce_column_][i];
  }

  void store_gradient() const {
    if (!all_valid_) zero_invalid(gradient_);
    if (!side_by_side(p_, p_.gradient)) return write_rows(p_, p_.gradient, block(), rows_, planes(gradient_));
    for (int64_t j = 0; j < p_.classes; ++j) put(gradient_ + j * pitch_, j);
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
  const NormBackward* const flow_;
  ChannelScratch& scratch_;
  bool streams_ = false;  // the gradient past the caches
  const int tile_;        // samples of a tile, some of which may be missing
  const int pitch_;       // from plane to plane: no power of two, or the planes would share their place in L1
  // Plane by plane: logits of both sides, the gradient, raw logits of the student, rows to be transposed, exponentials.
  float *logits_[2], *gradient_, *raw_, *rows_;
  Exps kept_[kMaxTerms];
  // Selected classes by rank, tile_ apart, and their logits, pitch_ apart.
  int32_t* selected_[kMaxTerms];
  float* selected_logits_[kMaxTerms][2];
  int64_t first_column_[kMaxTerms], ce_column_;
  SampleLanes lanes_;
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
    const Sums of{values.totals, values.totals ? values.columns : 0, sums};
    each_tile(of, [&](ChannelWorker& worker, int64_t first, int count, double* totals) {
      if (!worker.begin_tile(first, count)) {
        if (!totals) std::fill_n(values.of_samples + first * values.columns, count * values.columns, 0.0);
        return worker.clear(0);
      }
      worker.load_logits(nullptr);
      worker.reduce();
      worker.finalize(finalizer);
      store_values(worker.lanes(), values, first, count, totals);
      if (p_.gradient.data) worker.apply();
    });
  }

  void select(int64_t* selected) const {
    const int64_t size = selected_size(p_.objective);
    if (size == 0) return;
    std::fill_n(selected, p_.samples * size, 0);
    each_tile({}, [&](ChannelWorker& worker, int64_t first, int count, double*) {
      if (!worker.begin_tile(first, count)) return;
      worker.load_logits(nullptr);
      worker.get_selected(selected);
    });
  }

  void reduce(const int64_t* selected, float* stats) const {
    const int64_t size = stats_size(p_.objective);
    std::fill_n(stats, p_.samples * size, 0.0f);
    each_tile({}, [&](ChannelWorker& worker, int64_t first, int count, double*) {
      if (!worker.begin_tile(first, count)) return;
      worker.load_logits(selected);
      worker.reduce();
      for (int i = 0; i < count; ++i)
        for (int64_t c = 0; c < size && p_.weight(first + i) != 0; ++c)
          stats[(first + i) * size + c] = worker.lanes().stats[c][i];
    });
  }

  void apply(const int64_t* selected, const double* sums) const {
    const std::unique_ptr<NormBackward> flow(sums ? new NormBackward(p_, norms_, sums, 1) : nullptr);
    apply({}, selected, flow.get());
  }
  void class_sums(const int64_t* selected, double* sums) const { apply({nullptr, 0, sums}, selected, nullptr); }

 private:
  // What is added up over samples: totals of the values, and, of classes, what class standardisation needs.
  struct Sums {
    double* totals = nullptr;
    int64_t columns = 0;
    double* of_classes = nullptr;
  };

  void apply(const Sums& sums, const int64_t* selected, const NormBackward* flow) const {
    each_tile(
        sums,
        [&](ChannelWorker& worker, int64_t first, int count, double*) {
          if (!worker.begin_tile(first, count)) return worker.clear(0);
          worker.load_logits(selected);
          worker.reduce();  // for the exponentials
          worker.set_coefficients();
          worker.apply();
        },
        flow);
  }

  void store_values(const SampleLanes& lanes, const Values& values, int64_t first, int count, double* totals) const {
    for (int i = 0; i < count; ++i)
      for (int64_t v = 0; v < values.columns; ++v) {
        const double value = lanes.weight[i] == 0 ? 0 : lanes.values[v][i];
        if (!totals) {
          values.of_samples[(first + i) * values.columns + v] = value;
        } else if (lanes.weight[i] != 0) {
          totals[v] += p_.weight(first + i) * value;
        }
      }
  }

  // Calls body(worker, first, count, totals) for all tiles, in blocks whose sums are added up in order: the same
  // whatever the threads.
  template <class Body>
  void each_tile(const Sums& sums, const Body& body, const NormBackward* flow = nullptr) const {
    constexpr int64_t kBlockLogits = 1 << 13, kMostSummed = 16;
    const int64_t most = sums.of_classes ? kMostSummed : runs_.count * runs_.most * p_.classes / kBlockLogits;
    const int64_t blocks = std::clamp<int64_t>(most, 1, std::max<int64_t>(runs_.count, 1));
    const int64_t classes = sums.of_classes ? p_.classes : 0;
    std::vector<double> totals(blocks * sums.columns), of_classes(blocks * 2 * classes);
    parallel_.run(0, blocks, 1, [&](int64_t begin, int64_t end) {
      PlaneSums of_block(classes);
      ChannelWorker worker(p_, norms_, classes ? &of_block : nullptr, flow);
      for (int64_t block = begin; block < end; ++block) {
        of_block.start(of_classes.data() + block * 2 * classes);
        double* to = sums.totals ? totals.data() + block * sums.columns : nullptr;
        for (int64_t i = block * runs_.count / blocks; i < (block + 1) * runs_.count / blocks; ++i)
          body(worker, runs_.first(i), runs_.size(i), to);
        of_block.flush();
      }
    });
    if (classes) add_blocks(of_classes, blocks, sums.of_classes, parallel_);
    if (sums.totals) add_blocks(totals, blocks, sums.totals, parallel_);
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
