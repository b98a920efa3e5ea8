// Statistics of a softmax: what REDUCE finds of a group of classes, and how parts of it merge. Host and device code.
//
// Partial statistics merge exactly: over SIMD lanes, tiles, threads, blocks, devices and slices of the classes.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define KDK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KDK_HOST_DEVICE inline
#endif

namespace kdk {

constexpr double kLog2E = 1.4426950408889634074;

// All exponentials of a group are shifted by its maximum, as in a stable softmax. Of a group of -inf alone, 0 is used.
template <class R>
KDK_HOST_DEVICE R finite_shift(R shift) {
  return shift == -INFINITY ? R{} : shift;
}

// Of the classes i of one group of one sample, with logits s_i and t_i and inv_t = log2(e) / T:
//   es_i = 2^((s_i - student_shift) * inv_t),  et_i = 2^((t_i - teacher_shift) * inv_t),
//   gap_i = (t_i - teacher_shift) - (s_i - student_shift)
template <class R>
struct GroupStats {
  R student_shift = R{} - INFINITY;
  R teacher_shift = R{} - INFINITY;
  R student_sum{};    // sum of es_i
  R teacher_sum{};    // sum of et_i
  R teacher_ratio{};  // sum of et_i * gap_i: forward KL
  R student_ratio{};  // sum of es_i * gap_i: reverse KL
  R ce_sum{};         // sum of e^(s_i - student_shift): the cross entropy's softmax at T = 1

  static constexpr int kCount = 7;
};

// The sum of exponentials of a group of one class: exactly 1, unless the class is masked or not a number.
template <class R>
KDK_HOST_DEVICE R single_sum(R logit) {
  return logit - logit == 0 ? R{1} : logit == -INFINITY ? R{} : R{NAN};
}

// The factor of sums that were shifted by `from` and shall be shifted by `to` >= `from`.
template <class R>
KDK_HOST_DEVICE R rebase_factor(R from, R to, R inv_t) {
  return from == to || from == -INFINITY ? R(1) : std::exp2(inv_t * (from - to));
}

// How much gaps change when both shifts move.
template <class R>
KDK_HOST_DEVICE R rebase_gap(const GroupStats<R>& from, R student_shift, R teacher_shift) {
  return (finite_shift(from.teacher_shift) - finite_shift(teacher_shift)) -
         (finite_shift(from.student_shift) - finite_shift(student_shift));
}

// The same statistics for shifts that are at least as large.
template <class R>
KDK_HOST_DEVICE void rebase(GroupStats<R>& stats, R student_shift, R teacher_shift, R inv_t) {
  if (stats.student_shift == student_shift && stats.teacher_shift == teacher_shift) return;
  const R student_factor = rebase_factor(stats.student_shift, student_shift, inv_t);
  const R teacher_factor = rebase_factor(stats.teacher_shift, teacher_shift, inv_t);
  const R gap = rebase_gap(stats, student_shift, teacher_shift);
  stats.teacher_ratio = teacher_factor * (stats.teacher_ratio + gap * stats.teacher_sum);
  stats.student_ratio = student_factor * (stats.student_ratio + gap * stats.student_sum);
  stats.ce_sum *= rebase_factor(stats.student_shift, student_shift, R(kLog2E));
  stats.student_sum *= student_factor;
  stats.teacher_sum *= teacher_factor;
  stats.student_shift = student_shift;
  stats.teacher_shift = teacher_shift;
}

// Adds statistics with the same shifts.
template <class R>
KDK_HOST_DEVICE void add(GroupStats<R>& into, const GroupStats<R>& other) {
  into.student_sum += other.student_sum;
  into.teacher_sum += other.teacher_sum;
  into.teacher_ratio += other.teacher_ratio;
  into.student_ratio += other.student_ratio;
  into.ce_sum += other.ce_sum;
}

template <class R>
KDK_HOST_DEVICE void merge(GroupStats<R>& into, GroupStats<R> other, R inv_t) {
  const R student = other.student_shift > into.student_shift ? other.student_shift : into.student_shift;
  const R teacher = other.teacher_shift > into.teacher_shift ? other.teacher_shift : into.teacher_shift;
  rebase(into, student, teacher, inv_t);
  rebase(other, student, teacher, inv_t);
  add(into, other);
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

}  // namespace kdk
