// Gradients of standardised classes for samples of few classes that are side by side in memory, from what forward kept:
// a thread each. class_gradients.cuh has the same for all others.
#pragma once

#include "class_gradients.cuh"
#include "lanes.cuh"

namespace kdk::cuda {

// A thread's sample.
template <class X>
struct LaneGradients {
  using T = Real<X>;

  const Call& call;
  const ClassRow<T>* rows;
  int64_t number;
  const X *student, *teacher;
  T weight;
  GroupShare<T> rest[kMaxTerms];
  uint64_t alone = 0;  // classes that are in other groups, a bit each

  __device__ LaneGradients(const Call& call_, const ClassRow<T>* rows_, int64_t number_, const X* student_,
                           const X* teacher_)
      : call(call_), rows(rows_), number(number_), student(student_), teacher(teacher_) {
    weight = weight_of<T>(call, number);
    read_rest(call, number, weight, rest);
    over_alone(call, number, [&](int of_class) { alone |= uint64_t{1} << of_class; });
  }

  // visit(class, the student's logit, as the terms see it, the gradient in that): first of all classes as if they were
  // in the last group, then of those that are not.
  template <class Visit, class Lone>
  __device__ void over_slopes(Visit visit, Lone lone) const {
    in_groups<4>(0, static_cast<int>(call.classes), 1, [&](int first, auto count) {
      T raw[count.value], t[count.value];
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
        raw[i] = widen(__ldg(student + (first + i) * call.student.class_stride));
        t[i] = widen(__ldg(teacher + (first + i) * call.teacher.class_stride));
      }
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
        const auto& row = rows[first + i];
        const T s = apply(row.affine[kStudent], raw[i]), seen = apply(row.affine[kTeacher], t[i]);
        T slope = 0;
#pragma unroll
        for (int k = 0; k < kMaxTerms; ++k) {
          if (k >= call.sweeps) break;
          const Sweep& sweep = call.sweep[k];
          slope += slope_at(rest[k], static_cast<T>(sweep.exponent), is_tilted(sweep, rest[k]), s, seen);
        }
        visit(first + i, raw[i], s, slope);
      }
    });
    for (uint64_t left = alone; left != 0; left &= left - 1) {
      const int c = __ffsll(left) - 1;
      const T raw = widen(__ldg(student + c * call.student.class_stride));
      const T s = apply(rows[c].affine[kStudent], raw);
      const T t = apply(rows[c].affine[kTeacher], widen(__ldg(teacher + c * call.teacher.class_stride)));
      lone(c, raw, s, slope_alone(call, number, weight, c, s, t));
    }
  }
};

// Sums over the samples of the gradient, and of the gradient times the logit, as the terms see it. Each lane adds up
// what it sees of each class in shared memory, and a few samples of it only: see lane_stretch_of() of plan.h.
template <class X, Layout kLayout>
__device__ __forceinline__ void lane_sums(const Call& call) {
  using T = Real<X>;
  const int classes = static_cast<int>(call.classes), own = threadIdx.x;
  T* const sums = reinterpret_cast<T*>(shared_memory);
  // Launches that take shared memory may take all of it, so that the kernel has none of its own.
  auto* const rows = reinterpret_cast<ClassRow<T>*>(sums + 2 * kWarp * classes);
  read_classes(call, kLevel, rows);
  const auto gradient_of = [&](int c) -> T& { return sums[2 * c * kWarp + own]; };
  const auto product_of = [&](int c) -> T& { return sums[(2 * c + 1) * kWarp + own]; };
  for (int c = 0; c < classes; ++c) gradient_of(c) = product_of(c) = 0;
  const int64_t blocks = blocks_of_samples<kLayout>(call);
  const int64_t end = min((blockIdx.x + 1) * call.stretch, blocks);
  for (int64_t block = blockIdx.x * call.stretch; block < end; ++block) {
    over_samples<X>(call, block, [&](int64_t number, const X* student, const X* teacher, X*) {
      if (saved_of<T>(call, number)[0] == 0) return;
      const LaneGradients<X> lane(call, rows, number, student, teacher);
      // Nothing comes from masked classes.
      const auto add = [&](int c, T s, T slope, bool counts) {
        const T value = counts && s != minus_infinity<T>() ? slope : T(0);
        gradient_of(c) += value;
        product_of(c) += value != 0 ? value * s : T(0);
      };
      lane.over_slopes([&](int c, T, T s, T slope) { add(c, s, slope, !(lane.alone >> c & 1)); },
                       [&](int c, T, T s, T slope) { add(c, s, slope, true); });
    });
  }
  __syncwarp();
  for (int i = own; i < 2 * classes; i += kWarp) {
    double sum = 0;
    for (int lane = 0; lane < kWarp; ++lane) sum += sums[i * kWarp + (lane + own) % kWarp];  // in different banks
    call.sums[(blockIdx.x * 2 + i % 2) * call.classes + i / 2] = sum;
  }
}

// The gradient in the student's logits.
template <class X, Layout kLayout>
__device__ __forceinline__ void lane_gradient(const Call& call) {
  using T = Real<X>;
  __shared__ ClassRow<T> rows[kMostLaneClasses];
  read_classes(call, kAffineRows, rows);
  const bool entropy = call.objective.has_ce();
  over_samples<X>(call, blockIdx.x, [&](int64_t number, const X* student, const X* teacher, X* gradient) {
    const auto put = [&](int c, T value) { gradient[c * call.gradient.class_stride] = narrow<X>(value); };
    const T* saved = saved_of<T>(call, number);
    const bool valid = saved[0] != 0;
    if (valid) {
      const LaneGradients<X> lane(call, rows, number, student, teacher);
      const T of_target = entropy ? entropy_factor(call, lane.weight) : T(0), origin = saved[1];
      const T factor = saved[2] * of_target;
      const auto chained = [&](int c, T raw, T s, T slope) {
        const auto& row = rows[c];
        const T value = chain(slope, s, row.level, row.slope, row.affine[kStudent].factor);
        return entropy ? value + softmax_gradient(origin, factor, raw) : value;
      };
      lane.over_slopes([&](int c, T raw, T s, T slope) { put(c, chained(c, raw, s, slope)); },
                       [&](int c, T raw, T s, T slope) {
                         const bool target = entropy && call.target[number] == c;
                         put(c, chained(c, raw, s, slope) - (target ? of_target : T(0)));
                       });
    }
    for (int c = valid ? static_cast<int>(call.classes) : 0; c < call.gradient_classes; ++c) put(c, T(0));
  });
}

}  // namespace kdk::cuda
