// Group statistics: all that a loss needs to know of the classes of one group of one sample.
//
// They are origins and sums, so partial ones merge exactly: over SIMD lanes, tiles, threads, blocks and devices.
// Host and device code; no torch, no library beyond <cmath>.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define KDK_HOST_DEVICE __host__ __device__ __forceinline__
// Before a loop whose rounds are not to overlap: a GPU's registers are few.
#define KDK_ONE_BY_ONE _Pragma("unroll 1")
#else
#define KDK_HOST_DEVICE inline
#define KDK_ONE_BY_ONE
#endif

namespace kdk::cuda {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// Exponents are counted from an origin near their maximum; a group without a finite class has none and counts from 0.
template <class R>
KDK_HOST_DEVICE R start(R origin) {
  return origin == -INFINITY ? R{} : origin;
}

// Of the classes i of one group, with k = log2(e) / T:
//   es_i = 2^(k * student_i - student_origin),  et_i = 2^(k * teacher_i - teacher_origin),
//   gap_i = log2(et_i) - log2(es_i)
// Kernels choose the unit of origins, so many log2 each: 1 as written here, k where they are logits. Functions that
// compare origins are told that unit. A difference of logits large against their spread cancels in the origins,
// exactly, before anything is rounded.
// R is a real number, or a SIMD vector with one for each of several samples.
template <class R>
struct GroupStats {
  R student_origin = R{} - INFINITY;
  R teacher_origin = R{} - INFINITY;
  R student_sum{};  // sum of es_i
  R teacher_sum{};  // sum of et_i
  R teacher_gap{};  // sum of et_i * gap_i: the forward KL's share, where it is wanted
  R student_gap{};  // sum of es_i * gap_i: the reverse KL's share, where it is wanted
};

// The sum of a group of one class, from its own exponent: exactly 1, unless the class is masked or no number.
template <class R>
KDK_HOST_DEVICE R single_sum(R origin) {
  return origin - origin == 0 ? R{1} : origin == -INFINITY ? R{} : R{NAN};
}

// The factor of sums that counted from `from` and shall count from `to` >= `from`.
template <class R>
KDK_HOST_DEVICE R rebase_factor(R from, R to, R unit) {
  return from == to || from == -INFINITY ? R(1) : std::exp2(unit * (from - to));
}

// How much the gaps change when both sides move their origin.
template <class R>
KDK_HOST_DEVICE R rebase_gap(R student_from, R student_to, R teacher_from, R teacher_to, R unit) {
  return unit * ((start(teacher_from) - start(teacher_to)) - (start(student_from) - start(student_to)));
}

// The same statistics, counted from origins that are at least as large.
template <class R>
KDK_HOST_DEVICE void rebase(GroupStats<R>& stats, R student_origin, R teacher_origin, R unit) {
  if (stats.student_origin == student_origin && stats.teacher_origin == teacher_origin) return;
  const R student_factor = rebase_factor(stats.student_origin, student_origin, unit);
  const R teacher_factor = rebase_factor(stats.teacher_origin, teacher_origin, unit);
  const R gap = rebase_gap(stats.student_origin, student_origin, stats.teacher_origin, teacher_origin, unit);
  stats.teacher_gap = teacher_factor * (stats.teacher_gap + gap * stats.teacher_sum);
  stats.student_gap = student_factor * (stats.student_gap + gap * stats.student_sum);
  stats.student_sum *= student_factor;
  stats.teacher_sum *= teacher_factor;
  stats.student_origin = student_origin;
  stats.teacher_origin = teacher_origin;
}

template <class R>
KDK_HOST_DEVICE void merge(GroupStats<R>& into, GroupStats<R> other, R unit) {
  const R student_origin = other.student_origin > into.student_origin ? other.student_origin : into.student_origin;
  const R teacher_origin = other.teacher_origin > into.teacher_origin ? other.teacher_origin : into.teacher_origin;
  rebase(into, student_origin, teacher_origin, unit);
  rebase(other, student_origin, teacher_origin, unit);
  into.student_sum += other.student_sum;
  into.teacher_sum += other.teacher_sum;
  into.teacher_gap += other.teacher_gap;
  into.student_gap += other.student_gap;
}

// The student's softmax over all classes at T = 1, for the cross entropy.
template <class R>
struct SoftmaxStats {
  R origin = R{} - INFINITY;
  R sum{};
};

template <class R>
KDK_HOST_DEVICE void rebase(SoftmaxStats<R>& stats, R origin, R unit) {
  stats.sum *= rebase_factor(stats.origin, origin, unit);
  stats.origin = origin;
}

template <class R>
KDK_HOST_DEVICE void merge(SoftmaxStats<R>& into, SoftmaxStats<R> other, R unit) {
  const R origin = other.origin > into.origin ? other.origin : into.origin;
  rebase(into, origin, unit);
  rebase(other, origin, unit);
  into.sum += other.sum;
}

// Count, mean and sum of squared deviations of some numbers.
template <class R>
struct Moments {
  R count{};
  R mean{};
  R m2{};
};

template <class R>
KDK_HOST_DEVICE void merge(Moments<R>& into, const Moments<R>& other) {
  const R count = into.count + other.count;
  const R share = count == 0 ? R{} : other.count / count, difference = other.mean - into.mean;
  into.m2 += other.m2 + difference * difference * into.count * share;
  into.mean += difference * share;
  into.count = count;
}

}  // namespace kdk::cuda
