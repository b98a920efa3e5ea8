// One launch: what it reads and writes, and how its blocks share it out. Plain data, passed by value; no torch.
#pragma once

#include <cstdint>

#include "../common/matrix.h"
#include "objective.h"

namespace kdk::cuda {

constexpr int kWarp = 32;
constexpr int kMostThreads = 224;  // of a block: two of them leave each thread 144 registers, three 96

// Of kernels that add up over samples, see classes.cuh: threads of a block, at most; samples that it looks up at a
// time; classes of a thread.
constexpr int kClassThreads = 128, kPage = 256, kClassesOfThread = 4;

// What is next to one another in memory, and so in a block: the classes of a sample, or the samples of a class.
enum class Layout : int { rows = 0, pixels = 1 };

// What a kernel is compiled for: any call, or those whose whole samples blocks hold, of logits as they are, with terms
// by rank among them (ranked) or none (simple). These take few registers, so that many of their warps are at work.
enum class Use : int { any = 0, ranked = 1, simple = 2 };

// Of a sample that is a thread's own: its leading classes, and all of them, at most.
constexpr int kMostLaneLeads = 8, kMostLaneClasses = 64;

// How the samples and classes of a call are shared out between blocks and threads.
struct Tiling {
  int samples = 1;     // of a block
  int team = 1;        // threads of a block that share a sample
  int piece = 1;       // classes of a sample that one block holds
  int pieces = 1;      // blocks that share a sample; the last one's piece may be shorter
  int entries = 0;     // classes of a piece that are worked on one by one
  int candidates = 0;  // room for classes of a piece that may be among the best

  KDK_HOST_DEVICE int threads() const { return samples * team; }
};

// What the holder of a piece tells the others about one of its samples.
struct Exchange {
  GroupStats<double> group[kMaxTerms][kMaxGroups];
  SoftmaxStats<double> softmax;
  double target_logit;
  Moments<double> moments[2];
  double product;
};

// Where things are in shared memory, in bytes.
struct Regions {
  int samples, entries, candidates, partials, groups, results, exchange, student, teacher, total;
};

// What a sweep over the classes needs to know: of a term, or of two that differ in their weights alone.
struct Sweep {
  double exponent;
  bool forward, reverse, tilted;
};

// Everything a launch reads and writes. What was not asked for is null.
struct Call {
  Objective objective;
  Sweep sweep[kMaxTerms] = {};
  int sweeps = 0;
  int entries_of_term[kMaxTerms + 1] = {};  // where each one's leading classes begin among the entries; their number
  double far_below = 0;                     // difference of logits that leaves nothing of an exponential
  Tiling tiling;
  Regions regions;
  Matrix student, teacher, gradient;
  int64_t classes = 0;           // that are compared
  int64_t gradient_classes = 0;  // that the gradient has: those beyond `classes` get 0
  int64_t samples = 0;
  int dims = 0;  // of the samples, outermost first
  int64_t sample_size[kMaxDims] = {};
  // Of the samples:
  const int64_t* target = nullptr;
  const double* weight = nullptr;
  const double* divisor = nullptr;  // of the whole result
  int64_t ignore_index = 0;
  double scale = 1;
  // Results: of each sample in the arithmetic's type or, to be added up later, of each block in double precision.
  bool each = false;
  void* losses = nullptr;
  void* part_values = nullptr;
  // What forward keeps of the samples, in the arithmetic's type, and their leading classes by rank.
  void* saved = nullptr;
  int64_t* members = nullptr;
  // From above: the factor of the gradient, one for all or one a sample.
  const double* upstream = nullptr;
  bool upstream_each = false;
  // What standardises each class: see standardize.cuh.
  const void* affines = nullptr;
  // Of split samples: what is known of their pieces, and these pieces' entries.
  Exchange* exchange = nullptr;
  void* entries = nullptr;
  // Of standardised classes: sums of samples over pieces of their classes, in the arithmetic's type, a row for each
  // piece and column; and sums of classes over stretches of pages of samples.
  void* piece_sums = nullptr;
  double* sums = nullptr;
  int64_t stretch = 0;  // its pages or, of samples of a thread each, blocks

  KDK_HOST_DEVICE int64_t inner() const { return dims > 0 ? sample_size[dims - 1] : 1; }
  // Where a term's leading classes are among the entries; the target may be before them.
  KDK_HOST_DEVICE int first_entry(int term) const { return entries_of_term[term]; }
  // Whether the target is worked on by itself.
  KDK_HOST_DEVICE bool target_is_entry() const { return entries_of_term[0] > 0; }
  KDK_HOST_DEVICE int sweep_of(int term) const { return term < sweeps ? term : 0; }
  KDK_HOST_DEVICE bool tilted() const { return sweep[0].tilted || sweep[1].tilted; }

  void set(const Objective& given) {
    objective = given;
    bool target = objective.has_ce();
    for (int t = 0; t < objective.terms; ++t) target = target || objective.term[t].kind == PartitionKind::target;
    entries_of_term[0] = target ? 1 : 0;
    double warmest = 1;
    for (int t = 0; t < objective.terms; ++t) {
      const Term& term = objective.term[t];
      const bool alike = t > 0 && objective.same_groups() && term.temperature == objective.term[0].temperature;
      Sweep& of_term = sweep[alike ? 0 : sweeps++];
      of_term.exponent = term.exponent();
      of_term.forward |= term.wants_forward() || !term.wants_reverse();
      of_term.reverse |= term.wants_reverse();
      of_term.tilted |= term.tilted();
      entries_of_term[t + 1] = entries_of_term[t] + (term.by_rank() ? term.k : 0);
      warmest = term.temperature > warmest ? term.temperature : warmest;
    }
    far_below = 256 * warmest * kLn2;
  }
};

// (z - high) * factor + offset: the mean is `high`, and what that has lost is in the offset.
template <class T>
struct Affine {
  T high, factor, offset;
};

// Rows of the table of what standardises each class, a column a class: an Affine of either side, and what the chain
// rule takes off.
enum AffineRow { kHigh = 0, kFactor = 1, kOffset = 2, kSide = 3, kLevel = 6, kSlope = 7, kAffineRows = 8 };

// What the gradient needs to know of one group of one term.
template <class T>
struct GroupShare {
  T student_origin, teacher_origin;
  T student, tilt, teacher;  // coefficients: see evaluate.h, the teacher's with its sign
};

// What a block knows of one of its samples.
template <class T>
struct Sample {
  double weight;      // of its loss in the result
  int64_t number;     // overall; -1 for none
  int64_t offset[3];  // of its first logit: in the student's, the teacher's and the gradient's matrix
  int target;
  int lead;  // slots before its first class
  bool valid;
  int candidates;  // that were found
  T largest[3];    // of the student's and teacher's logits as the terms see them, and of the student's raw ones
  Affine<T> student, teacher;
  T slope;                           // of the chain rule through standardised samples
  T factor;                          // of the gradient, where samples are standardised
  T softmax_origin, softmax_factor;  // the latter with the weight of the cross entropy
  T entropy_factor;                  // that weight
  GroupShare<T> share[kMaxTerms][kMaxGroups];
};

// A class that is worked on by itself: the target, or one of the teacher's leading classes.
template <class T>
struct Entry {
  T student, teacher;  // as the terms see them
  T raw;               // the student's logit
  int of_class;        // -1 for none
  int rank;
  int16_t group[kMaxTerms];
  int counts;  // 0 where an earlier entry is the same class; no bool, so that nothing is padded
};

// A class as the ranking sees it: by its logit (`value`), the lower index first among equals. NaN is never chosen.
template <class T>
struct Candidate {
  T value;
  int of_class;
};

// Partial sums of a warp (rows) or a thread (pixels): of the softmax, and four of each term.
constexpr int kPartials = 1 + 4 * kMaxTerms;

// Unsigned, so that powers of two divide by a shift.
KDK_HOST_DEVICE int round_up(unsigned number, unsigned step) {
  return static_cast<int>((number + step - 1) / step * step);
}

// Numbers of a TermResult (evaluate.h).
constexpr int kResults = 1 + 1 + kMaxGroups + 3 * kMaxGroups + 3 * kMaxGroups;

// Threads that take all classes of a side.
KDK_HOST_DEVICE int64_t class_units(int64_t classes) { return (classes + kClassesOfThread - 1) / kClassesOfThread; }

// Pieces of a row whose standardised classes are added up: a warp's classes each. Columns of their sums: the softmax's,
// and four of each sweep.
KDK_HOST_DEVICE int64_t row_pieces(const Call& call) { return (class_units(call.classes) + kWarp - 1) / kWarp; }
KDK_HOST_DEVICE int sum_columns(const Call& call) { return 1 + 4 * call.sweeps; }

// Shared memory of a warp whose lanes add up two numbers of each class, in float32; behind these is what standardises
// the classes.
KDK_HOST_DEVICE int lane_sum_bytes(const Call& call) {
  return (2 * kWarp + kAffineRows) * static_cast<int>(call.classes) * static_cast<int>(sizeof(float));
}

// Elements that a thread takes at a time: of a row 16 bytes; of pixels, which are apart, a few.
KDK_HOST_DEVICE constexpr int width(Layout layout, int element_bytes) {
  return layout == Layout::rows ? 16 / element_bytes : 4;
}

// Elements of a sample's piece in shared memory. Rows are where they are in memory, up to whole vectors.
KDK_HOST_DEVICE int slots(Layout layout, int piece, int element_bytes) {
  const int wide = width(layout, element_bytes);
  return round_up(piece + (layout == Layout::rows ? wide - 1 : 0), wide);
}

// Partial results of a sample in a block.
KDK_HOST_DEVICE int partial_count(Layout layout, int team) {
  return layout == Layout::pixels ? team : team > 32 ? team / 32 : 1;
}

template <class T>
KDK_HOST_DEVICE Regions regions_of(Layout layout, const Tiling& tiling, int element_bytes) {
  Regions at;
  int end = 0;
  const auto place = [&end](int bytes) {
    const int begin = end;
    end = round_up(end + bytes, 16);
    return begin;
  };
  at.samples = place(tiling.samples * static_cast<int>(sizeof(Sample<T>)));
  at.entries = place(tiling.samples * tiling.entries * static_cast<int>(sizeof(Entry<T>)));
  at.candidates = place(tiling.samples * tiling.candidates * static_cast<int>(sizeof(Candidate<T>)));
  at.partials =
      place(tiling.samples * partial_count(layout, tiling.team) * kPartials * static_cast<int>(sizeof(double)));
  at.groups = place(tiling.samples * kMaxGroups * static_cast<int>(sizeof(GroupStats<double>)));
  at.results = place(tiling.samples * kResults * static_cast<int>(sizeof(double)));
  at.exchange = place(tiling.pieces > 1 ? tiling.samples * static_cast<int>(sizeof(Exchange)) : 0);
  at.student = place(tiling.samples * slots(layout, tiling.piece, element_bytes) * element_bytes);
  at.teacher = place(tiling.samples * slots(layout, tiling.piece, element_bytes) * element_bytes);
  at.total = end;
  return at;
}

}  // namespace kdk::cuda
