// REDUCE: softmax statistics of the classes of a tile. One pass; two exponentials a class, three with a cross entropy.
#pragma once

#include "tile.h"

namespace KDK_NAMESPACE {
namespace {

// The exponentials of a tile, kept for its gradient.
struct Exps {
  float* student = nullptr;
  float* teacher = nullptr;
  float* gap = nullptr;  // where reverse KL is wanted
  float* ce = nullptr;   // where a cross entropy is: those at T = 1

  Exps from(int64_t i) const { return {student + i, teacher + i, gap ? gap + i : nullptr, ce ? ce + i : nullptr}; }
};

// Memory that the next tile will come from, and that the gradient will soon go to: fetched while the arithmetic on this
// tile leaves the load ports idle.
struct Prefetch {
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

// A sum of vectors in two chains, which are cut after kRun vectors: the roundings of longer ones would show.
constexpr int kRun = 32;
struct BlockSum {
  Vec chain[2]{}, blocks{};

  void flush() {
    blocks += chain[0] + chain[1];
    chain[0] = chain[1] = Vec{};
  }
  double total() const { return horizontal_sum(blocks); }
};

// The shifts and inv_t of a group, in all lanes or, of channels, of a sample a lane.
struct Shifts {
  Vec student, teacher;
  float inv_t;
};

// Exponentials and sums of one vector of classes. `Careful` is right whatever the logits are: a class without
// probability adds nothing, however large its gap, unless only the other side masks it; then the KL is infinite.
// Without, sums that are finite are right.
template <bool Reverse, bool Ce, bool Careful>
struct Sums {
  BlockSum student, teacher, teacher_ratio, student_ratio, ce;

  KDK_INLINE void add(Vec s, Vec t, const Shifts& by, int chain, const Exps& exps, int i) {
    const Vec xs = s - by.student, xt = t - by.teacher;
    const Vec es = exp2(xs * by.inv_t), et = exp2(xt * by.inv_t), gap = xt - xs;
    student.chain[chain] += es;
    teacher.chain[chain] += et;
    teacher_ratio.chain[chain] += product(et, gap, t, s);
    store(exps.student + i, es);
    store(exps.teacher + i, et);
    if constexpr (Reverse) {
      student_ratio.chain[chain] += product(es, gap, s, t);
      if (exps.gap) store(exps.gap + i, gap);
    }
    if constexpr (Ce) {
      const Vec e = exp2(xs * static_cast<float>(kLog2E));
      ce.chain[chain] += e;
      store(exps.ce + i, e);
    }
  }
  KDK_INLINE void flush() {
    student.flush();
    teacher.flush();
    teacher_ratio.flush();
    if constexpr (Reverse) student_ratio.flush();
    if constexpr (Ce) ce.flush();
  }
  KDK_INLINE bool finite() const {
    return all_finite(student.blocks + teacher.blocks + (teacher_ratio.blocks + student_ratio.blocks));
  }

 private:
  static KDK_INLINE Vec product(Vec e, Vec gap, Vec own, Vec other) {
    if constexpr (!Careful) return e * gap;
    const Vec infinite = gap > 0 ? broadcast(INFINITY) : broadcast(-INFINITY);
    const auto masked = (own > -INFINITY) & (other == -INFINITY);
    return masked ? infinite : e == 0 ? Vec{} : e * gap;
  }
};

// Adds a tile to statistics that have its shifts already; false, and nothing added, if it takes more care.
//
// It works on copies of its arguments, as what it writes might alias them; they are no parameters by value, as such a
// one, set in parts and loaded as a whole, would wait for all stores before it, the last gradient among them.
template <bool Reverse, bool Ce, bool Careful>
bool add_tile(const Tile& from, float inv_t, GroupStats<double>& stats, const Exps& to, const Prefetch& ahead) {
  const Tile tile = from;
  const Exps exps = to;
  const Prefetch next = ahead;
  const Shifts by{broadcast(static_cast<float>(finite_shift(stats.student_shift))),
                  broadcast(static_cast<float>(finite_shift(stats.teacher_shift))), inv_t};
  Sums<Reverse, Ce, Careful> sums;
  const int patches = tile.patches ? tile.patches->count : 0;
  int i = 0, run_end = 2 * kRun * kLanes;
  const auto add = [&](int at, int chain) KDK_INLINE {
    next.fetch(at, chain);
    sums.add(load(tile.student + at), load(tile.teacher + at), by, chain, exps, at);
  };
  for (int p = 0; p <= patches; ++p) {  // classes that are where they are, then a patch
    const int end = p < patches ? tile.patches->at[p] : tile.count;
    while (i + 2 * kLanes <= end) {
      for (const int until = std::min(end, run_end); i + 2 * kLanes <= until; i += 2 * kLanes) {
        add(i, 0);
        add(i + kLanes, 1);
      }
      if (i + 2 * kLanes <= end) {
        sums.flush();
        run_end = i + 2 * kRun * kLanes;
      }
    }
    if (i < end) {
      add(i, 0);
      i += kLanes;
    }
    if (p == patches) break;
    next.fetch(i, 0);
    sums.add(load(tile.patches->student + p * kLanes), load(tile.patches->teacher + p * kLanes), by, 1, exps, i);
    i += kLanes;
  }
  sums.flush();
  if (!Careful && !sums.finite()) return false;
  stats.student_sum += sums.student.total();
  stats.teacher_sum += sums.teacher.total();
  stats.teacher_ratio += sums.teacher_ratio.total();
  if constexpr (Reverse) stats.student_ratio += sums.student_ratio.total();
  if constexpr (Ce) stats.ce_sum += sums.ce.total();
  return true;
}

using AddTile = bool (*)(const Tile&, float, GroupStats<double>&, const Exps&, const Prefetch&);
inline AddTile choose_add_tile(bool reverse, bool ce, bool careful) {
  static constexpr AddTile kChoices[] = {
      add_tile<false, false, false>, add_tile<false, false, true>, add_tile<false, true, false>,
      add_tile<false, true, true>,   add_tile<true, false, false>, add_tile<true, false, true>,
      add_tile<true, true, false>,   add_tile<true, true, true>,
  };
  return kChoices[4 * reverse + 2 * ce + careful];
}

// What is to be found of a group's classes.
struct Reduction {
  float inv_t;
  bool reverse, ce;
};

// Adds the classes that `load(absent, tile)` loads and gives the maxima of.
template <class Load>
inline void reduce_tile(const Reduction& reduction, const Load& load, const Exps& exps, const Prefetch& next,
                        GroupStats<double>& stats) {
  Tile tile;
  Maxima top = load(kAbsent, tile);
  const bool deep = top.deep();
  if (deep) top = load(-INFINITY, tile);
  rebase(stats, std::max<double>(stats.student_shift, top.student), std::max<double>(stats.teacher_shift, top.teacher),
         static_cast<double>(reduction.inv_t));
  const auto add = [&](bool careful) {
    return choose_add_tile(reduction.reverse, reduction.ce, careful)(tile, reduction.inv_t, stats, exps, next);
  };
  if (deep || !add(false)) add(true);
}

// The exponentials of one vector alone, for shifts that are known.
template <bool Gap, bool Ce>
struct VectorExps {
  Vec student, teacher, gap{}, ce{};

  KDK_INLINE VectorExps(Vec s, Vec t, const Shifts& by) {
    const Vec xs = s - by.student, xt = t - by.teacher;
    student = exp2(xs * by.inv_t);
    teacher = exp2(xt * by.inv_t);
    if constexpr (Gap) gap = xt - xs;
    if constexpr (Ce) ce = exp2(xs * static_cast<float>(kLog2E));
  }
};

}  // namespace
}  // namespace KDK_NAMESPACE
