// Group statistics: all that a loss needs to know of the classes of one group of one sample.
//
// They are maxima and sums, so partial ones merge exactly: over SIMD lanes, tiles, threads, blocks and devices.
// Host and device code; no torch, no library beyond <cmath>.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define KDK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KDK_HOST_DEVICE inline
#endif

namespace kdk {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// The exponent of a class is counted from its group's maximum; a group without a finite class counts from 0.
template <class R>
KDK_HOST_DEVICE R origin(R maximum) {
  return maximum == -INFINITY ? R{} : maximum;
}

// Of the classes i of one group, with k = log2(e) / T:
//   es_i = 2^(k * (student_i - student_max)),  et_i = 2^(k * (teacher_i - teacher_max)),
//   gap_i = log2(et_i) - log2(es_i)
// Kernels choose the unit in which they keep the maxima, so many log2 each: k where they are logits, 1 where they are
// exponents k * logit. Functions that compare maxima are told that unit.
// A difference of logits large against their spread cancels in the maxima, exactly, before anything is rounded.
// R is a real number, or a SIMD vector with one for each of several samples.
template <class R>
struct GroupStats {
  R student_max = R{} - INFINITY;
  R teacher_max = R{} - INFINITY;
  R student_sum{};  // sum of es_i
  R teacher_sum{};  // sum of et_i
  R teacher_gap{};  // sum of et_i * gap_i: the forward KL's share, where it is wanted
  R student_gap{};  // sum of es_i * gap_i: the reverse KL's share, where it is wanted
};

// The factor of sums that counted from `from` and shall count from `to` >= `from`.
template <class R>
KDK_HOST_DEVICE R rebase_factor(R from, R to, R unit) {
  return from == to || from == -INFINITY ? R(1) : std::exp2(unit * (from - to));
}

// How much the gaps change when both sides move their origin.
template <class R>
KDK_HOST_DEVICE R rebase_gap(R student_from, R student_to, R teacher_from, R teacher_to, R unit) {
  return unit * ((origin(teacher_from) - origin(teacher_to)) - (origin(student_from) - origin(student_to)));
}

// The same statistics, counted from maxima that are at least as large.
template <class R>
KDK_HOST_DEVICE void rebase(GroupStats<R>& stats, R student_max, R teacher_max, R unit) {
  if (stats.student_max == student_max && stats.teacher_max == teacher_max) return;
  const R student_factor = rebase_factor(stats.student_max, student_max, unit);
  const R teacher_factor = rebase_factor(stats.teacher_max, teacher_max, unit);
  const R gap = rebase_gap(stats.student_max, student_max, stats.teacher_max, teacher_max, unit);
  stats.teacher_gap = teacher_factor * (stats.teacher_gap + gap * stats.teacher_sum);
  stats.student_gap = student_factor * (stats.student_gap + gap * stats.student_sum);
  stats.student_sum *= student_factor;
  stats.teacher_sum *= teacher_factor;
  stats.student_max = student_max;
  stats.teacher_max = teacher_max;
}

template <class R>
KDK_HOST_DEVICE void merge(GroupStats<R>& into, GroupStats<R> other, R unit) {
  const R student_max = other.student_max > into.student_max ? other.student_max : into.student_max;
  const R teacher_max = other.teacher_max > into.teacher_max ? other.teacher_max : into.teacher_max;
  rebase(into, student_max, teacher_max, unit);
  rebase(other, student_max, teacher_max, unit);
  into.student_sum += other.student_sum;
  into.teacher_sum += other.teacher_sum;
  into.teacher_gap += other.teacher_gap;
  into.student_gap += other.student_gap;
}

// The student's softmax over all classes at T = 1, for the cross entropy.
template <class R>
struct SoftmaxStats {
  R max = R{} - INFINITY;
  R sum{};
};

template <class R>
KDK_HOST_DEVICE void rebase(SoftmaxStats<R>& stats, R max, R unit) {
  stats.sum *= rebase_factor(stats.max, max, unit);
  stats.max = max;
}

template <class R>
KDK_HOST_DEVICE void merge(SoftmaxStats<R>& into, SoftmaxStats<R> other, R unit) {
  const R max = other.max > into.max ? other.max : into.max;
  rebase(into, max, unit);
  rebase(other, max, unit);
  into.sum += other.sum;
}

}  // namespace kdk
