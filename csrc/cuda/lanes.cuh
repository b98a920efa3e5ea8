// Steps 1 to 3 of samples of few classes that are side by side in memory: a thread each, in registers. Each sweep reads
// the logits again, which the L1 cache has since the first.
#pragma once

#include "samples.cuh"
#include "sweeps.cuh"

namespace kdk::cuda {

// A thread's sample: its logits and what step 2 knows of it.
template <class X>
struct Lane {
  using T = Real<X>;

  const Call& call;
  const X *student, *teacher;
  X* gradient;
  double weight;
  int target;
  int apart;  // the class that is a group of its own; -1 for none

  __device__ T student_at(int c) const { return widen(__ldg(student + c * call.student.class_stride)); }
  __device__ T teacher_at(int c) const { return widen(__ldg(teacher + c * call.teacher.class_stride)); }
  __device__ void put(int c, T value) const { gradient[c * call.gradient.class_stride] = narrow<X>(value); }

  __device__ void put_zeros(int first, int end) const {
    for (int c = first; c < end; ++c) put(c, T(0));
  }

  // visit(first class, how many as a constant, the student's logits, the teacher's), which are read at once.
  template <class Visit>
  __device__ void over_groups(Visit visit) const {
    in_groups<kSummed>(0, static_cast<int>(call.classes), 1, [&](int first, auto count) {
      T s[count.value], t[count.value];
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
        s[i] = student_at(first + i);
        t[i] = teacher_at(first + i);
      }
      visit(first, count, s, t);
    });
  }

  // visit(class, student's logit, teacher's)
  template <class Visit>
  __device__ void over_classes(Visit visit) const {
    over_groups([&](int first, auto count, const T* s, const T* t) {
#pragma unroll
      for (int i = 0; i < count.value; ++i) visit(first + i, s[i], t[i]);
    });
  }

  // Statistics of the last group, origins in log2.
  __device__ GroupStats<double> rest(T exponent, const T* largest) const {
    const T student_origin = origin_of(largest[kStudent], exponent),
            teacher_origin = origin_of(largest[kTeacher], exponent);
    GroupStats<double> stats;
    stats.student_origin = largest[kStudent] * exponent;
    stats.teacher_origin = largest[kTeacher] * exponent;
    over_groups([&](int first, auto count, const T* s, const T* t) {
      T student_sum = 0, teacher_sum = 0, teacher_gap = 0, student_gap = 0;
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
        const T a = fma(s[i], exponent, -student_origin), b = fma(t[i], exponent, -teacher_origin), gap = b - a;
        const bool counts = first + i != apart;
        const T es = counts ? power(a) : T(0), et = counts ? power(b) : T(0);
        student_sum += es;
        teacher_sum += et;
        teacher_gap += et > 0 ? et * gap : T(0);
        if (call.sweep[0].reverse) student_gap += es > 0 ? es * gap : T(0);
      }
      stats.student_sum += student_sum;
      stats.teacher_sum += teacher_sum;
      stats.teacher_gap += teacher_gap;
      stats.student_gap += student_gap;
    });
    return stats;
  }

  __device__ GroupShare<T> share(const GroupStats<double>& stats, const GroupCoefficients<double>& by) const {
    return {static_cast<T>(start(stats.student_origin)), static_cast<T>(start(stats.teacher_origin)),
            static_cast<T>(by.student * weight) * from_rounded<T>(stats.student_origin),
            static_cast<T>(by.tilt * weight), static_cast<T>(-by.teacher * weight)};
  }

  // The sample's loss; writes its gradient, if one is asked for.
  __device__ double step() const {
    const Objective& objective = call.objective;
    const Term& term = objective.term[0];
    const T exponent = static_cast<T>(call.sweep[0].exponent), student_target = student_at(target);
    T largest[2] = {minus_infinity<T>(), minus_infinity<T>()};
    over_classes([&](int c, T s, T t) {
      largest[kStudent] = c == apart ? largest[kStudent] : larger(largest[kStudent], s);
      largest[kTeacher] = c == apart ? largest[kTeacher] : larger(largest[kTeacher], t);
    });
    GroupStats<double> of_rest = rest(exponent, largest);
    if (call.classes == (apart < 0 ? 1 : 2)) count_exactly(of_rest, largest[kStudent], largest[kTeacher], exponent);
    GroupStats<double> of_target;
    TermResult<double> result;
    result.loss = 0;
    if (apart < 0) {
      evaluate_group(term, 0, of_rest, call.classes, 1.0, result);
      result.group[1] = result.group[0];
    } else {
      of_target.student_origin = static_cast<double>(student_target) * exponent;
      of_target.teacher_origin = static_cast<double>(teacher_at(target)) * exponent;
      of_target.student_sum = single_sum(of_target.student_origin);
      of_target.teacher_sum = single_sum(of_target.teacher_origin);
      evaluate_group(term, 0, of_target, call.classes, 1.0, result);
      evaluate_group(term, 1, of_rest, call.classes, 1.0, result);
      add_masses<2>(term, result);
    }
    double loss = result.loss * term.scale;
    Sample<T> softmax;
    if (objective.has_ce()) {
      const T most = larger(largest[kStudent], student_target), one = static_cast<T>(kLog2E);
      const double origin = most * one;
      softmax.softmax_origin = static_cast<T>(start(origin));
      double sum = 0;
      over_classes([&](int, T s, T) { sum += power(fma(s, one, -softmax.softmax_origin)); });
      if (call.classes > 1) loss += objective.ce_weight * (log(sum) + (kLn2 * start(origin) - student_target));
      softmax.entropy_factor = static_cast<T>(objective.ce_slope(call.classes) * weight);
      softmax.softmax_factor = softmax.entropy_factor * static_cast<T>(inverse(sum));
    }
    if (call.gradient.data) {
      const bool tilted = call.sweep[0].tilted;
      const GroupShare<T> others = share(of_rest, result.group[1]);
      T of_apart = 0;
      if (apart >= 0)
        of_apart = slope_at(share(of_target, result.group[0]), exponent, tilted, student_target, teacher_at(target));
      over_classes([&](int c, T s, T t) {
        T slope = c == apart ? of_apart : slope_at(others, exponent, tilted, s, t);
        if (objective.has_ce()) {
          slope += softmax_gradient(softmax, s);
          if (c == target) slope -= softmax.entropy_factor;
        }
        put(c, slope);
      });
      put_zeros(static_cast<int>(call.classes), static_cast<int>(call.gradient_classes));
    }
    return loss * weight;
  }
};

// A block is a warp, which takes some samples a lane.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void lanes(const Call& call) {
  const Place place = place_of<kLayout>(call, blockIdx.x);
  const int own = threadIdx.x;
  const Matrix& matrix = own == kTeacher ? call.teacher : own == kGradient ? call.gradient : call.student;
  const int64_t offset = own <= kGradient && matrix.data ? offset_of(call, matrix, place.first) : 0;
  const X* student = static_cast<const X*>(call.student.data) + __shfl_sync(kAllLanes, offset, kStudent);
  const X* teacher = static_cast<const X*>(call.teacher.data) + __shfl_sync(kAllLanes, offset, kTeacher);
  X* gradient = static_cast<X*>(call.gradient.data) + __shfl_sync(kAllLanes, offset, kGradient);
  const int64_t step = call.gradient.sample_stride[call.dims - 1];
  const bool has_apart = call.objective.term[0].kind == PartitionKind::target;
  const double factor = result_factor(call);
  double losses = 0;
#pragma unroll 1
  for (int at = own; at < place.count; at += 32) {
    int64_t target = 0;
    const double weight = given_weight(call, place.first + at, target);
    const int of_target = static_cast<int>(target);
    const Lane<X> lane{
        call, student + at, teacher + at, gradient + at * step, weight * factor, of_target, has_apart ? of_target : -1};
    double loss = 0;
    if (weight != 0) loss = lane.step();
    else if (call.gradient.data) lane.put_zeros(0, static_cast<int>(call.gradient_classes));
    if (call.each) static_cast<Real<X>*>(call.losses)[place.first + at] = static_cast<Real<X>>(loss);
    losses += loss;
  }
  if (call.each) return;
  for (int distance = 16; distance > 0; distance /= 2) losses += __shfl_xor_sync(kAllLanes, losses, distance);
  if (own == 0) static_cast<double*>(call.losses)[blockIdx.x] = losses;
}

}  // namespace kdk::cuda
