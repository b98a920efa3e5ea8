// Samples whose classes are side by side in memory, or of any strides: one sample after the other, tile by tile.
//
// load -> select -> reduce -> finalize -> apply -> store. Rows are spread over threads and, where they are few and
// long, their chunks are. A chunk has a fixed number of classes and statistics merge in the order of the classes, so
// that results depend neither on the number of threads nor on who computed what.
#pragma once

#include "apply.h"
#include "class_norm.h"
#include "finalize_lanes.h"
#include "select.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kChunk = 4 * kTile;         // classes of a chunk, the unit of work where a row is split over threads
constexpr int64_t kKeptFloats = 1 << 17;      // of a row's exponentials that are kept for the gradient (they fit in L2)
constexpr int64_t kSplitSamples = 16;         // fewer samples than this may be split over threads
constexpr int64_t kBatchClasses = 8 * kTile;  // of the rows that finalize takes together, at most
constexpr int64_t kGrainClasses = 16384;      // least work that is worth a thread

// Whether rows are few and long enough to be split over threads, if those are more. Samples that are standardised each
// by its own moments are not.
inline bool may_split(const Problem& p) {
  return p.samples < kSplitSamples && p.classes > kChunk && p.objective.standardize == Standardize::none;
}

// Statistics of the classes of one row, or of some of them.
struct RowStats {
  GroupStats<double> group[kMaxTerms][kMaxGroups];
  double ce_shift = -INFINITY, ce_sum = 0;  // of logits that the terms see standardised

  // Makes them those of no class, for the groups that an objective has.
  void start(const Objective& o) {
    for (int s = 0; s < o.sweeps; ++s) std::fill_n(group[s], o.sweep[s].groups(), GroupStats<double>{});
    ce_shift = -INFINITY;
    ce_sum = 0;
  }
  void add_ce(double shift, double sum) {
    const double top = std::max(shift, ce_shift);
    ce_sum = ce_sum * rebase_factor(ce_shift, top, kLog2E) + sum * rebase_factor(shift, top, kLog2E);
    ce_shift = top;
  }
  void merge_rest(const Objective& o, const RowStats& part) {
    for (int s = 0; s < o.sweeps; ++s) {
      const int rest = o.sweep[s].groups() - 1;
      merge(group[s][rest], part.group[s][rest], static_cast<double>(o.sweep[s].inv_t()));
    }
    if (part.ce_shift != -INFINITY || part.ce_sum != 0) add_ce(part.ce_shift, part.ce_sum);
  }
};

// Memory that a thread keeps from call to call.
struct RowScratch {
  alignas(64) float student[kTile], teacher[kTile];          // logits as they are read
  alignas(64) float few_student[kTile], few_teacher[kTile];  // those of selected classes
  Patches patches;
  alignas(64) float exps[4][kTile], gradient[kTile];
  Buffer<float> kept, columns;
  std::vector<int64_t> selected;
  std::vector<int> unsorted, holes;
  std::vector<std::pair<float, int64_t>> selected_gradients;
  Ranking ranking, best;
  RowStats stats, part;

  Exps tile_exps(bool gap, bool ce) { return {exps[0], exps[1], gap ? exps[2] : nullptr, ce ? exps[3] : nullptr}; }
  static RowScratch& of_this_thread() {
    static thread_local RowScratch scratch;
    return scratch;
  }
};

// One row on its way through the steps.
struct Row {
  int64_t sample;
  int lane;  // its place among the rows that finalize takes together
  const void* student;
  const void* teacher;
  void* gradient;
  const int64_t* selected[kMaxTerms];  // by rank
  Norm norm[2];                        // where samples are standardised: of student and teacher
  float unit_slope = 0;                // and the slope of the chain rule, for a sum of 1
};

class RowWorker {
 public:
  // `sums` are added to; `flow` is what flows through the classes' mean and deviation, if that is to be taken off.
  RowWorker(const Problem& problem, const ClassNorms& norms, ColumnSums* sums = nullptr,
            const NormBackward* flow = nullptr)
      : p_(problem),
        o_(problem.objective),
        norms_(norms),
        sums_(sums),
        flow_(flow),
        scratch_(RowScratch::of_this_thread()) {
    int64_t columns = 0;
    for (int s = 0; s < o_.sweeps; ++s) {
      first_column_[s] = columns;
      columns += o_.sweep[s].groups() * kGroupColumns;
    }
    ce_column_ = columns;
    lanes_ = SampleLanes::in(scratch_.columns, o_, kLanes);
  }

  static int64_t chunks(const Problem& p) { return std::max<int64_t>(ceil_div(p.classes, kChunk), 1); }

  // All steps of rows in [begin, end).
  void fused(const Values& values, int64_t begin, int64_t end) {
    keep_exps();
    const LanesFinalizer finalizer(o_, p_.classes, values.parts);
    const int64_t batch = std::clamp<int64_t>(kBatchClasses / std::max<int64_t>(p_.classes, 1), 1, kLanes);
    scratch_.selected.resize(batch * selected_size(o_));
    for (int64_t n = begin; n < end; n += batch) fused_batch(finalizer, values, n, std::min(n + batch, end));
  }

  // Starts a row. `selected` is what is selected of it by rank, or room for that; false if the sample does not count.
  bool begin_row(Row& row, int64_t sample, int lane, const int64_t* selected) {
    row.sample = sample;
    row.lane = lane;
    row.gradient = p_.gradient.data ? element(p_, p_.gradient, sample) : nullptr;
    if (!p_.valid(sample)) return false;
    row.student = element(p_, p_.student, sample);
    row.teacher = element(p_, p_.teacher, sample);
    for (int s = 0; s < o_.sweeps; ++s) {
      const Partition& partition = o_.sweep[s].partition;
      row.selected[s] = partition.kind == PartitionKind::target ? p_.target + sample : selected;
      if (partition.by_rank()) selected += partition.k;
    }
    if (o_.standardize == Standardize::by_sample) set_norms(row);
    return true;
  }

  // SELECT: the best classes of a chunk, for one sweep.
  void select_chunk(const Row& row, int s, int64_t chunk, Ranking& best) {
    const Partition& partition = o_.sweep[s].partition;
    Selection selection(best, partition.k, partition.largest);
    each_tile(chunk * kChunk, std::min(p_.classes, (chunk + 1) * kChunk), [&](int64_t begin, int count) {
      // By sample raw logits are ranked: their order is the same, and large ones differ where standardised they do not.
      const bool raw = o_.standardize != Standardize::by_class;
      selection.add(raw ? read_classes(p_.teacher, row.teacher, begin, count, scratch_.teacher)
                        : source(row, 1, begin, count, scratch_.teacher),
                    begin, count);
    });
    selection.finish();
  }

  // The selected classes of a row, all sweeps.
  void select(const Row& row, int64_t* selected) {
    for (int s = 0; s < o_.sweeps; ++s) {
      if (!o_.sweep[s].partition.by_rank()) continue;
      select_chunk(row, s, 0, scratch_.best);
      for (int64_t c = 1; c < chunks(p_); ++c) {
        select_chunk(row, s, c, scratch_.ranking);
        scratch_.best.insert(scratch_.best.end(), scratch_.ranking.begin(), scratch_.ranking.end());
      }
      selected = store_selected(s, scratch_.best, selected);
    }
  }
  // Writes the best of all chunks; returns where those of the next sweep go.
  int64_t* store_selected(int s, Ranking& best, int64_t* to) const {
    const int k = o_.sweep[s].partition.k;
    if (best.size() > static_cast<size_t>(k)) keep_best(best, k);
    for (int i = 0; i < k; ++i) *to++ = index_of(best[i]);
    return to;
  }

  // REDUCE: the rest groups' classes of one chunk.
  void reduce_chunk(const Row& row, int64_t chunk, RowStats& stats) {
    stats.start(o_);
    each_tile(chunk * kChunk, std::min(p_.classes, (chunk + 1) * kChunk), [&](int64_t begin, int count) {
      const float* student = source(row, 0, begin, count, scratch_.student);
      const float* teacher = source(row, 1, begin, count, scratch_.teacher);
      for (int s = 0; s < o_.sweeps; ++s) {
        const Holes holes = holes_of(row, s, begin, count);
        const auto load = [&](float absent, Tile& tile) {
          return load_tile(student, teacher, count, holes, absent, scratch_.patches, tile);
        };
        GroupStats<double>& rest = stats.group[s][o_.sweep[s].groups() - 1];
        reduce_tile(reduction(s), load, exps_of(row, s, begin), ahead(row, begin + count), rest);
        if (kept_row_) kept_shifts_[s][tile_index(row, begin)] = {rest.student_shift, rest.teacher_shift};
      }
      if (o_.has_ce() && !o_.ce_in_sweep()) add_own_softmax(row, begin, count, stats);
    });
  }

  // The groups of selected classes.
  void reduce_selected(const Row& row, RowStats& stats) {
    for (int s = 0; s < o_.sweeps; ++s)
      for (int g = 0; g + 1 < o_.sweep[s].groups(); ++g)
        each_selected(row, s, g, [&](const int64_t* classes, int count) {
          if (single(s, g)) return reduce_single(row, s, classes, stats.group[s][g]);
          reduce_few(row, s, classes, count, stats.group[s][g]);
        });
  }

  // All statistics of a row, into a lane of some columns.
  void reduce(const Row& row, const Columns& to) {
    reduce_chunk(row, 0, scratch_.stats);
    for (int64_t c = 1; c < chunks(p_); ++c) {
      reduce_chunk(row, c, scratch_.part);
      scratch_.stats.merge_rest(o_, scratch_.part);
    }
    finish_stats(row, scratch_.stats, to);
  }
  void finish_stats(const Row& row, RowStats& stats, const Columns& to) {
    reduce_selected(row, stats);
    for (int s = 0; s < o_.sweeps; ++s)
      for (int g = 0; g < o_.sweep[s].groups(); ++g)
        set_stats(to, first_column_[s] + g * kGroupColumns, row.lane, stats.group[s][g]);
    if (!o_.has_ce()) return;
    to[ce_column_][row.lane] = read_class(p_.student, row.student, p_.target[row.sample]);
    if (o_.ce_in_sweep()) return;
    to[ce_column_ + 1][row.lane] = static_cast<float>(stats.ce_shift);
    to[ce_column_ + 2][row.lane] = static_cast<float>(stats.ce_sum);
  }

  // APPLY: the gradient of classes in [first, end).
  void apply(const Row& row, const Columns& coefficients, int64_t first, int64_t end) {
    by_ = coefficients;
    const bool direct = row.gradient && in_place(p_.gradient);
    list_selected_gradients(row);
    const float slope = o_.standardize == Standardize::by_sample ? row.unit_slope * product_sum(row) : 0;
    each_tile(first, end, [&](int64_t begin, int count) {
      float* out = direct ? static_cast<float*>(row.gradient) + begin : scratch_.gradient;
      tile_gradient(row, begin, count, out);
      if (o_.standardize != Standardize::none) chain(row, slope, begin, count, out);
      if (!direct && row.gradient) write_classes(p_.gradient, row.gradient, begin, count, out);
    });
    if (row.gradient && end == p_.classes) clear_classes(p_.gradient, row.gradient, p_.classes, p_.gradient_classes);
  }
  // The coefficients of one row for an upstream gradient.
  Columns weighted(int64_t sample) {
    float* to = lanes_.coefficients.data;
    const int64_t size = coefficients_size(o_);
    std::copy_n(p_.coefficients + sample * size, size, to);
    multiply_coefficients(o_, {to, 1}, static_cast<float>(p_.weight(sample)));
    return {to, 1};
  }
  // The same of a sample that does not count.
  void clear(const Row& row, int64_t first, int64_t end) const {
    if (!row.gradient || p_.gradient_is_zero) return;
    clear_classes(p_.gradient, row.gradient, first, end == p_.classes ? p_.gradient_classes : end);
  }

 private:
  template <class Body>
  static void each_tile(int64_t begin, int64_t end, const Body& body) {
    for (; begin < end; begin += kTile) body(begin, static_cast<int>(std::min<int64_t>(end - begin, kTile)));
  }
  // The selected classes of a group, at most a tile at a time.
  template <class Body>
  void each_selected(const Row& row, int s, int g, const Body& body) const {
    const Partition& partition = o_.sweep[s].partition;
    each_tile(partition.group_begin(g), partition.group_end(g),
              [&](int64_t rank, int count) { body(row.selected[s] + rank, count); });
  }

  void fused_batch(const LanesFinalizer& finalizer, const Values& values, int64_t begin, int64_t end) {
    Row rows[kLanes];
    int count = 0;
    for (int64_t n = begin; n < end; ++n) {
      Row& row = rows[count];
      int64_t* selected = scratch_.selected.data() + count * selected_size(o_);
      if (!begin_row(row, n, count, selected)) {
        std::fill_n(values.of_samples + n * values.columns, values.columns, 0.0);
        clear(row, 0, p_.classes);
        continue;
      }
      select(row, selected);
      reduce(row, lanes_.stats);
      lanes_.weight[count++] = static_cast<float>(p_.weight(n));
    }
    if (count == 0) return;
    finalizer.run(lanes_, 0);
    for (int i = 0; i < count; ++i)
      for (int64_t v = 0; v < values.columns; ++v)
        values.of_samples[rows[i].sample * values.columns + v] = lanes_.values[v][i];
    for (int i = 0; i < count && p_.gradient.data; ++i) apply(rows[i], lanes_.coefficients, 0, p_.classes);
  }

  // Keeps exponentials for the gradient where they fit in cache. Rows that may be split over threads never keep them,
  // so that the arithmetic is a matter of the shape alone.
  void keep_exps() {
    int64_t arrays = 0;
    for (int s = 0; s < o_.sweeps; ++s) arrays += 2 + tilted_rest(s) + reduction(s).ce;
    if (!p_.gradient.data || may_split(p_) || p_.classes * arrays > kKeptFloats) return;
    const int64_t size = padded(p_.classes);
    kept_row_ = size * arrays;
    float* next = scratch_.kept.data(kept_row_ * kLanes);
    const auto array = [&] {
      next += size;
      return next - size;
    };
    for (int s = 0; s < o_.sweeps; ++s) {
      kept_[s] = {array(), array()};
      if (tilted_rest(s)) kept_[s].gap = array();
      if (reduction(s).ce) kept_[s].ce = array();
      kept_shifts_[s].resize(kLanes * ceil_div(p_.classes, kTile));
    }
  }
  int64_t tile_index(const Row& row, int64_t begin) const {
    return row.lane * ceil_div(p_.classes, kTile) + begin / kTile;
  }
  // Whether a group of selected classes is of one class.
  bool single(int s, int g) const { return o_.sweep[s].partition.group_size(g, p_.classes) == 1; }
  bool tilted_rest(int s) const { return o_.sweep[s].tilted(o_.sweep[s].groups() - 1); }
  Reduction reduction(int s) const { return {o_.sweep[s].inv_t(), o_.sweep[s].reverse, s == 0 && o_.ce_in_sweep()}; }

  // Where the exponentials of a tile go.
  Exps exps_of(const Row& row, int s, int64_t begin) const {
    if (kept_row_) return kept_[s].from(row.lane * kept_row_ + begin);
    return scratch_.tile_exps(false, reduction(s).ce);
  }

  // Classes of one side (0 student, 1 teacher) as the terms see them: in place, or in `to`.
  const float* source(const Row& row, int side, int64_t begin, int count, float* to) const {
    const float* raw = read_classes(side ? p_.teacher : p_.student, side ? row.teacher : row.student, begin, count, to);
    if (o_.standardize == Standardize::none) return raw;
    if (o_.standardize == Standardize::by_class) {
      standardize(raw, count, norms_[side].from(begin), to);
    } else {
      standardize(raw, count, row.norm[side], to);
    }
    return to;
  }

  // A sample's own moments, for both sides.
  void set_norms(Row& row) const {
    for (int side = 0; side < 2; ++side) {
      Moments<double> moments;
      each_tile(0, p_.classes, [&](int64_t begin, int count) {
        const Matrix& matrix = side ? p_.teacher : p_.student;
        merge(
            moments,
            moments_of(read_classes(matrix, side ? row.teacher : row.student, begin, count, scratch_.teacher), count));
      });
      const double inv_std = o_.inv_std(moments);
      row.norm[side] = {moments.mean, inv_std};
      if (side == 0) row.unit_slope = unit_slope(o_, moments);
    }
  }

  // The positions of a sweep's selected classes in a tile. Valid until the next call.
  Holes holes_of(const Row& row, int s, int64_t begin, int count) const {
    const Partition& partition = o_.sweep[s].partition;
    const int selected = partition.selected();
    if (selected == 0) return {};
    std::vector<int>&unsorted = scratch_.unsorted, &holes = scratch_.holes;
    unsorted.resize(selected);
    holes.resize(selected);
    int found = 0;
    for (int i = 0; i < selected; ++i) {
      const int64_t j = row.selected[s][i] - begin;
      unsorted[found] = static_cast<int>(-j);  // ascending once sorted descending
      found += 0 <= j && j < count;
    }
    if (found <= 32) {
      sort_few(unsorted.data(), found, holes.data());
    } else {
      std::copy_n(unsorted.begin(), found, holes.begin());
      std::sort(holes.begin(), holes.begin() + found, std::greater<>());
    }
    for (int i = 0; i < found; ++i) holes[i] = -holes[i];
    return {holes.data(), found};
  }

  // The logits of the classes from `begin` on: of this row or, where rows follow one another in memory, of the next.
  // Of a row of one tile, the gradient follows before anything else.
  Prefetch ahead(const Row& row, int64_t begin) const {
    const auto set = [](const Matrix& matrix, const void* of, int64_t j, const char*& at, int64_t& step) {
      at = static_cast<const char*>(of) + j * matrix.class_stride * dtype_size(matrix.dtype);
      step = matrix.class_stride == 1 ? dtype_size(matrix.dtype) : 0;
    };
    Prefetch next;
    set(p_.student, row.student, begin, next.student, next.student_step);
    set(p_.teacher, row.teacher, begin, next.teacher, next.teacher_step);
    if (row.gradient && p_.classes <= kTile) set(p_.gradient, row.gradient, 0, next.gradient, next.gradient_step);
    return next;
  }

  // The softmax of the cross entropy, where it sees other logits than the terms.
  void add_own_softmax(const Row& row, int64_t begin, int count, RowStats& stats) const {
    const float* raw = read_classes(p_.student, row.student, begin, count, scratch_.student);
    Vec top = broadcast(-INFINITY);
    for (int i = 0; i < count; i += kLanes) top = max(load_first(raw + i, count - i, -INFINITY), top);
    const float shift = horizontal_max(top);
    const Vec from = broadcast(finite_shift(shift));
    BlockSum sum;
    for (int i = 0; i < count; i += kLanes) {
      const Vec x = load_first(raw + i, count - i, -INFINITY) - from;
      sum.chain[0] += exp2(x * static_cast<float>(kLog2E));
      if (i / kLanes % kRun == kRun - 1) sum.flush();
    }
    sum.flush();
    stats.add_ce(shift, sum.total());
  }

  // Loads some selected classes into the dense tile; absent ones behind.
  Maxima gather(const Row& row, const int64_t* classes, int count, float absent) const {
    Maxima top;
    const auto collect = [&](int side, float* to, float& largest) {
      const Matrix& matrix = side ? p_.teacher : p_.student;
      with_dtype(matrix.dtype, [&](auto element) {
        const auto* from = static_cast<const decltype(element)*>(side ? row.teacher : row.student);
        for (int i = 0; i < count; ++i) to[i] = widen(from[classes[i] * matrix.class_stride]);
      });
      for (int i = 0; i < count && o_.standardize != Standardize::none; ++i)
        to[i] = o_.standardize == Standardize::by_class ? norms_[side](classes[i], to[i]) : row.norm[side](to[i]);
      for (int i = 0; i < count; ++i) largest = to[i] > largest ? to[i] : largest;
      std::fill(to + count, to + padded(count), absent);
    };
    collect(0, scratch_.few_student, top.student);
    collect(1, scratch_.few_teacher, top.teacher);
    return top;
  }
  void reduce_few(const Row& row, int s, const int64_t* classes, int count, GroupStats<double>& stats) const {
    const auto load = [&](float absent, Tile& tile) {
      tile = {scratch_.few_student, scratch_.few_teacher, padded(count)};
      return gather(row, classes, count, absent);
    };
    reduce_tile(reduction(s), load, scratch_.tile_exps(false, reduction(s).ce), {}, stats);
  }

  // The selected classes' gradients, which come on top of the rest's.
  void list_selected_gradients(const Row& row) {
    auto& list = scratch_.selected_gradients;
    list.clear();
    for (int s = 0; s < o_.sweeps; ++s)
      for (int g = 0; g + 1 < o_.sweep[s].groups(); ++g) {
        const GroupCoefficients of = coefficients(row, s, g);
        const Apply& apply = choose_apply(o_.sweep[s].tilted(g), reduction(s).ce, false);
        if (single(s, g)) {
          list.emplace_back(single_gradient(of), row.selected[s][o_.sweep[s].partition.group_begin(g)]);
          continue;
        }
        each_selected(row, s, g, [&](const int64_t* classes, int count) {
          gather(row, classes, count, -INFINITY);
          apply.logits(scratch_.few_student, scratch_.few_teacher, count, of, scratch_.gradient);
          for (int i = 0; i < count; ++i) list.emplace_back(scratch_.gradient[i], classes[i]);
        });
      }
    if (o_.ce_in_sweep()) list.emplace_back(by_[ce_column_][row.lane], p_.target[row.sample]);
  }

  // Of a group of one class, whose logits are the shifts.
  static float single_gradient(const GroupCoefficients& of) {
    const float student = single_sum(of.student_shift), teacher = single_sum(of.teacher_shift);
    return student * (of.by.student + of.by.ce) - teacher * of.by.teacher;
  }

  GroupCoefficients coefficients(const Row& row, int s, int g) const {
    return get_coefficients(by_, first_column_[s] + g * kGroupColumns, row.lane, o_.sweep[s].inv_t());
  }

  // The terms' gradient in the logits they see. Follows list_selected_gradients(row).
  void tile_gradient(const Row& row, int64_t begin, int count, float* out) {
    const float *student = nullptr, *teacher = nullptr;
    if (!kept_row_) {
      student = source(row, 0, begin, count, scratch_.student);
      teacher = source(row, 1, begin, count, scratch_.teacher);
    }
    for (int s = 0; s < o_.sweeps; ++s) {
      GroupCoefficients of = coefficients(row, s, o_.sweep[s].groups() - 1);
      const Apply& apply = choose_apply(tilted_rest(s), reduction(s).ce, s > 0);
      if (kept_row_) {
        rebase_coefficients(kept_shifts_[s][tile_index(row, begin)], of);
        apply.exps(exps_of(row, s, begin), count, of.by, out);
        continue;
      }
      // Selected classes are not of the rest.
      const Holes holes = holes_of(row, s, begin, count);
      float* before = scratch_.patches.student;
      for (int i = 0; i < holes.count; ++i) before[i] = s > 0 ? out[holes.at[i]] : 0;
      apply.logits(student, teacher, count, of, out);
      for (int i = 0; i < holes.count; ++i) out[holes.at[i]] = before[i];
    }
    for (const auto& [gradient, j] : scratch_.selected_gradients)
      if (j >= begin && j < begin + count) out[j - begin] += gradient;
  }

  // Shifts that exponentials of a tile were computed with.
  struct KeptShifts {
    double student, teacher;
  };
  static void rebase_coefficients(const KeptShifts& kept, GroupCoefficients& of) {
    if (kept.student == of.student_shift && kept.teacher == of.teacher_shift) return;
    GroupStats<double> from;
    from.student_shift = kept.student;
    from.teacher_shift = kept.teacher;
    of.by.mean_gap -= static_cast<float>(rebase_gap<double>(from, of.student_shift, of.teacher_shift));
    Vec x{};  // as in rebase_factor, of both sides and of the cross entropy at once
    if (kept.student != -INFINITY) x[0] = static_cast<float>(kept.student - of.student_shift) * of.inv_t;
    if (kept.teacher != -INFINITY) x[1] = static_cast<float>(kept.teacher - of.teacher_shift) * of.inv_t;
    if (kept.student != -INFINITY) x[2] = static_cast<float>((kept.student - of.student_shift) * kLog2E);
    const Vec factor = exp2(x);
    of.by.student *= factor[0];
    of.by.log_ratio *= factor[0];
    of.by.teacher *= factor[1];
    of.by.ce *= factor[2];
  }

  // The sum of the terms' gradient times the standardised logits of a sample. Follows list_selected_gradients(row).
  float product_sum(const Row& row) {
    double total = 0;
    each_tile(0, p_.classes, [&](int64_t begin, int count) {
      tile_gradient(row, begin, count, scratch_.gradient);
      const float* h = source(row, 0, begin, count, scratch_.student);
      Vec sum{};
      for (int i = 0; i < count; i += kLanes) {
        const Vec logit = load_first(h + i, count - i, -INFINITY);
        sum += logit == -INFINITY ? Vec{} : logit * load(scratch_.gradient + i);
      }
      total += horizontal_sum(sum);  // a tile's: longer chains of roundings would show
    });
    return static_cast<float>(total);
  }

  // From a tile's gradient in the standardised logits to that in the logits, with the cross entropy's. By sample the
  // terms do not change when all its logits move together, so that the mean of their gradient is 0.
  void chain(const Row& row, float slope, int64_t begin, int count, float* out) {
    const float* h = source(row, 0, begin, count, scratch_.student);
    const bool by_class = o_.standardize == Standardize::by_class;
    if (by_class && sums_) sums_->add(begin, count, h, out);
    if (!row.gradient) return;
    const Vec factor = broadcast(row.norm[0].factor);
    for (int i = 0; i < count; i += kLanes) {
      const Vec logit = load_first(h + i, count - i, -INFINITY), gradient = load_first(out + i, count - i, 0);
      const Vec by = by_class ? load(norms_[0].factor + begin + i) : factor;
      const Vec through = !by_class ? logit * slope : flow_ ? flow_->flow(begin + i, logit) : Vec{};
      const Vec value = (gradient - through) * by;
      store_first(out + i, logit == -INFINITY ? Vec{} : value, count - i);
    }
    if (o_.has_ce()) add_own_softmax_gradient(row, begin, count, out);
  }
  void add_own_softmax_gradient(const Row& row, int64_t begin, int count, float* out) const {
    const float* raw = read_classes(p_.student, row.student, begin, count, scratch_.student);
    const Vec from = broadcast(finite_shift(by_[ce_column_ + 1][row.lane]));
    const Vec factor = broadcast(by_[ce_column_ + 2][row.lane]);
    for (int i = 0; i < count; i += kLanes) {
      const Vec x = load_first(raw + i, count - i, -INFINITY) - from;
      const Vec value = load_first(out + i, count - i, 0) + exp2(x * static_cast<float>(kLog2E)) * factor;
      store_first(out + i, value, count - i);
    }
    const int64_t target = p_.target[row.sample] - begin;
    if (0 <= target && target < count) out[target] += by_[ce_column_][row.lane];
  }

  // A group of one class, exactly.
  void reduce_single(const Row& row, int s, const int64_t* classes, GroupStats<double>& stats) const {
    gather(row, classes, 1, 0);
    stats = {};
    stats.student_shift = *scratch_.few_student;
    stats.teacher_shift = *scratch_.few_teacher;
    stats.student_sum = single_sum(stats.student_shift);
    stats.teacher_sum = single_sum(stats.teacher_shift);
    if (reduction(s).ce) stats.ce_sum = stats.student_sum;
  }

  const Problem& p_;
  const Objective& o_;
  const ClassNorms& norms_;
  ColumnSums* const sums_;
  const NormBackward* const flow_;
  RowScratch& scratch_;
  int64_t first_column_[kMaxTerms], ce_column_;  // of the statistics and of the coefficients
  SampleLanes lanes_;
  Columns by_{};          // coefficients of the row at hand
  Exps kept_[kMaxTerms];  // of the first row
  int64_t kept_row_ = 0;  // from row to row; 0 if none are kept
  std::vector<KeptShifts> kept_shifts_[kMaxTerms];
};

// The steps over all rows.

inline int64_t row_grain(const Problem& p) { return std::max<int64_t>(kGrainClasses / (p.classes + 64), 1); }

// Rows, or chunks of rows, over threads.
class RowRunner {
 public:
  RowRunner(const Problem& p, const Parallel& parallel)
      : p_(p),
        parallel_(parallel),
        norms_(p, parallel),
        split_(may_split(p) && p.samples < parallel.threads),
        chunks_(RowWorker::chunks(p)) {}

  // Calls body(worker, row, chunk) for each chunk of each row that counts; `selected` as in begin_row().
  template <class Body>
  void each_chunk(const int64_t* selected, const Body& body) const {
    parallel_.run(0, p_.samples * chunks_, 1, [&](int64_t begin, int64_t end) {
      RowWorker worker(p_, norms_);
      for (int64_t i = begin; i < end; ++i) {
        Row row;
        worker.begin_row(row, i / chunks_, 0, selected_of(selected, i / chunks_));
        body(worker, row, i % chunks_);
      }
    });
  }
  // Calls body(worker, row) for each row.
  template <class Body>
  void each_row(const int64_t* selected, const Body& body, const NormBackward* flow = nullptr) const {
    parallel_.run(0, p_.samples, row_grain(p_), [&](int64_t begin, int64_t end) {
      RowWorker worker(p_, norms_, nullptr, flow);
      for (int64_t n = begin; n < end; ++n) {
        Row row;
        worker.begin_row(row, n, 0, selected_of(selected, n));
        body(worker, row);
      }
    });
  }

  void fused(const Values& values, double* sums) const {
    if (split_) return stepwise(values);
    if (sums) {
      each_block(sums, [&](RowWorker& worker, int64_t begin, int64_t end) { worker.fused(values, begin, end); });
    } else {
      parallel_.run(0, p_.samples, row_grain(p_),
                    [&](int64_t begin, int64_t end) { RowWorker(p_, norms_).fused(values, begin, end); });
    }
  }

  void select(int64_t* selected) const {
    const int64_t size = selected_size(p_.objective);
    if (size == 0) return;
    std::fill_n(selected, p_.samples * size, 0);
    if (!split_) {
      return each_row(selected, [&](RowWorker& worker, const Row& row) {
        if (counts(row)) worker.select(row, selected + row.sample * size);
      });
    }
    int64_t first = 0;
    for (int s = 0; s < p_.objective.sweeps; ++s) {
      const Partition& partition = p_.objective.sweep[s].partition;
      if (!partition.by_rank()) continue;
      std::vector<Ranking> best(p_.samples * chunks_);
      each_chunk(selected, [&](RowWorker& worker, const Row& row, int64_t chunk) {
        if (counts(row)) worker.select_chunk(row, s, chunk, best[row.sample * chunks_ + chunk]);
      });
      const RowWorker worker(p_, norms_);
      for (int64_t n = 0; n < p_.samples; ++n) {
        Ranking merged;
        for (int64_t c = 0; c < chunks_; ++c)
          merged.insert(merged.end(), best[n * chunks_ + c].begin(), best[n * chunks_ + c].end());
        if (!merged.empty()) worker.store_selected(s, merged, selected + n * size + first);
      }
      first += partition.k;
    }
  }

  void reduce(const int64_t* selected, float* stats) const {
    const int64_t size = stats_size(p_.objective);
    std::fill_n(stats, p_.samples * size, 0.0f);
    if (!split_) {
      return each_row(selected, [&](RowWorker& worker, const Row& row) {
        if (counts(row)) worker.reduce(row, {stats + row.sample * size, 1});
      });
    }
    std::vector<RowStats> parts(p_.samples * chunks_);
    each_chunk(selected, [&](RowWorker& worker, const Row& row, int64_t chunk) {
      if (counts(row)) worker.reduce_chunk(row, chunk, parts[row.sample * chunks_ + chunk]);
    });
    each_row(selected, [&](RowWorker& worker, const Row& row) {
      RowStats& total = parts[row.sample * chunks_];
      for (int64_t c = 1; c < chunks_; ++c) total.merge_rest(p_.objective, parts[row.sample * chunks_ + c]);
      if (counts(row)) worker.finish_stats(row, total, {stats + row.sample * size, 1});
    });
  }

  void apply(const int64_t* selected, const double* sums) const {
    const std::unique_ptr<NormBackward> flow(sums ? new NormBackward(p_, norms_, sums, 1) : nullptr);
    if (split_) {
      each_chunk(selected, [&](RowWorker& worker, const Row& row, int64_t chunk) {
        apply_one(worker, row, chunk * kChunk, std::min(p_.classes, (chunk + 1) * kChunk));
      });
    } else {
      each_row(selected, [&](RowWorker& worker, const Row& row) { apply_one(worker, row, 0, p_.classes); }, flow.get());
    }
  }

  void class_sums(const int64_t* selected, double* sums) const {
    each_block(sums, [&](RowWorker& worker, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        Row row;
        worker.begin_row(row, n, 0, selected_of(selected, n));
        apply_one(worker, row, 0, p_.classes);
      }
    });
  }

 private:
  bool counts(const Row& row) const { return p_.valid(row.sample); }
  const int64_t* selected_of(const int64_t* selected, int64_t n) const {
    return selected ? selected + n * selected_size(p_.objective) : nullptr;
  }

  void apply_one(RowWorker& worker, const Row& row, int64_t begin, int64_t end) const {
    counts(row) ? worker.apply(row, worker.weighted(row.sample), begin, end) : worker.clear(row, begin, end);
  }

  // The steps one after the other: few long rows.
  void stepwise(const Values& values) const {
    std::vector<int64_t> selected(p_.samples * selected_size(p_.objective));
    std::vector<float> stats(p_.samples * stats_size(p_.objective));
    std::vector<float> coefficients(p_.samples * coefficients_size(p_.objective));
    select(selected.data());
    reduce(selected.data(), stats.data());
    finalize_samples(p_, stats.data(), values, coefficients.data());
    if (!p_.gradient.data) return;
    Problem backward = p_;
    backward.weight = {};  // it is in the coefficients
    backward.coefficients = coefficients.data();
    RowRunner(backward, parallel_).apply(selected.data(), nullptr);
  }

  // Rows block by block, whose sums of columns are added up in order: the same whatever the threads.
  template <class Body>
  void each_block(double* sums, const Body& body) const {
    const SampleBlocks blocks(p_);
    std::vector<double> partial(blocks.count * 2 * p_.classes);
    parallel_.run(0, blocks.count, 1, [&](int64_t first, int64_t last) {
      ColumnSums of_block(p_.classes);
      RowWorker worker(p_, norms_, &of_block);
      for (int64_t b = first; b < last; ++b) {
        of_block.start(partial.data() + b * 2 * p_.classes);
        body(worker, blocks.begin(b), blocks.begin(b + 1));
        of_block.flush();
      }
    });
    add_blocks(partial, blocks.count, sums, parallel_);
  }

  const Problem& p_;
  const Parallel& parallel_;
  const ClassNorms norms_;
  const bool split_;
  const int64_t chunks_;
};

}  // namespace
}  // namespace KDK_NAMESPACE
