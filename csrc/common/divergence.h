// Divergences D(p || q) = sum of phi(p_i, q_i) of two distributions, by two functions of one class: phi, and
// psi = q dphi/dq, of which the gradient in a logit of q is psi_i - q_i * (sum of psi). Host and device code; no torch.
//
// The KLs also follow from sums that REDUCE finds in one pass: of one group, those of GroupStats.
#pragma once

#include "softmax_stats.h"

namespace kdk {

struct ForwardKl {  // KL(p || q)
  template <class R>
  static KDK_HOST_DEVICE R phi(R p, R, R log_ratio) {  // log(p / q)
    return p == 0 ? R{} : p * log_ratio;
  }
  template <class R>
  static KDK_HOST_DEVICE R psi(R p, R, R) {
    return -p;
  }
};

struct ReverseKl {  // KL(q || p)
  template <class R>
  static KDK_HOST_DEVICE R phi(R, R q, R log_ratio) {
    return q == 0 ? R{} : -q * log_ratio;
  }
  // Without q, which adds up to nothing in the gradient.
  template <class R>
  static KDK_HOST_DEVICE R psi(R, R q, R log_ratio) {
    return q == 0 ? R{} : -q * log_ratio;
  }
};

// Both KLs inside a group, and what their gradients take.
template <class R>
struct GroupKl {
  R forward, reverse;
  R log_student_sum, log_teacher_sum;
  R inv_student_sum, inv_teacher_sum;
  R mean_gap;      // of the student's distribution
  R forward_pull;  // 1, or 0 where the teacher masks the whole group: then the forward KL is 0
};

// Of a group of one class, inside which there is no divergence: its sums are 1, or 0 where it is masked.
template <class R>
KDK_HOST_DEVICE GroupKl<R> single_kl(const GroupStats<R>& s) {
  const R zero{}, nan_or_zero = s.student_sum - s.student_sum + s.teacher_sum - s.teacher_sum;
  return {zero, zero, nan_or_zero, nan_or_zero, s.student_sum, s.teacher_sum, zero, zero + 1};
}

// `M` has the functions of R: log.
template <class M, class R>
KDK_HOST_DEVICE GroupKl<R> group_kl(const GroupStats<R>& s, float inv_temperature) {
  const R one = R{} + 1, infinite = R{} + INFINITY;
  const R student = s.student_sum == 0 ? one : s.student_sum, teacher = s.teacher_sum == 0 ? one : s.teacher_sum;
  GroupKl<R> kl;
  kl.log_student_sum = M::log(student);
  kl.log_teacher_sum = M::log(teacher);
  const R inv_student = 1 / student;
  kl.inv_student_sum = s.student_sum == 0 ? R{} : inv_student;
  kl.inv_teacher_sum = s.teacher_sum == 0 ? R{} : 1 / teacher;
  kl.mean_gap = s.student_ratio * kl.inv_student_sum;
  const R log_ratio = M::log(teacher * inv_student);  // of one ratio: nothing cancels where the sums are close
  kl.forward = s.student_sum == 0 ? infinite : s.teacher_ratio * kl.inv_teacher_sum * inv_temperature - log_ratio;
  kl.forward = s.teacher_sum == 0 ? R{} : kl.forward;
  kl.reverse = s.teacher_sum == 0 ? infinite : log_ratio - kl.mean_gap * inv_temperature;
  kl.reverse = s.student_sum == 0 ? R{} : kl.reverse;
  kl.forward_pull = s.teacher_sum == 0 ? R{} : one;
  return kl;
}

}  // namespace kdk
