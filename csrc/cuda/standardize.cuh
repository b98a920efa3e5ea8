// Standardised logits, by class over the batch or by sample over its classes, and the chain rule through them.
// Logits of -inf count in no moments and stay -inf: such a class is masked.
#pragma once

#include "block.cuh"

namespace kdk::cuda {

// The multiply-add is explicit: values must come out the same in every kernel, lest the ranking differ.
template <class T>
__device__ __forceinline__ T apply(const Affine<T>& affine, T logit) {
  return fma(logit - affine.high, affine.factor, affine.offset);
}

template <class T>
__device__ __forceinline__ Affine<T> affine_of(double mean, double factor) {
  const T high = static_cast<T>(mean);
  return {high, static_cast<T>(factor), static_cast<T>((static_cast<double>(high) - mean) * factor)};
}

template <class T>
__device__ __forceinline__ T affine_number(const Call& call, int row, int64_t of_class) {
  return static_cast<const T*>(call.affines)[row * call.classes + of_class];
}

// What standardises a class.
template <class T>
__device__ __forceinline__ Affine<T> affine_of_class(const Call& call, int side, int64_t of_class) {
  const int row = side * kSide;
  return {affine_number<T>(call, row + kHigh, of_class), affine_number<T>(call, row + kFactor, of_class),
          affine_number<T>(call, row + kOffset, of_class)};
}

// One logit as the terms see it.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ Real<X> standardized(const Block<X, kLayout, kUse>& block, int side, int of_class,
                                                Real<X> logit) {
  using T = Real<X>;
  const Call& call = block.call;
  if (block.standardization() == Standardize::by_sample)
    return apply(side == kStudent ? block.sample().student : block.sample().teacher, logit);
  if (block.standardization() == Standardize::by_class) return apply(affine_of_class<T>(call, side, of_class), logit);
  return logit;
}

// The class of a vector's element; for pads some class that exists.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ int64_t class_near(const Block<X, kLayout, kUse>& block, int vector, int w) {
  return block.begin + min(max(block.class_of(vector) + w, 0), block.count - 1);
}

// A vector of logits as the terms see it.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void standardize(const Block<X, kLayout, kUse>& block, int side, int vector,
                                            Real<X>* values) {
  if (block.plain()) return;
  if (block.standardization() == Standardize::by_sample) {
    const Affine<Real<X>> affine = side == kStudent ? block.sample().student : block.sample().teacher;
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) values[w] = apply(affine, values[w]);
    return;
  }
#pragma unroll
  for (int w = 0; w < block.kWidth; ++w)
    values[w] = standardized(block, side, static_cast<int>(class_near(block, vector, w)), values[w]);
}

// The slope of the chain rule through a standardised sample, for a sum of gradient times logit of 1.
__device__ __forceinline__ double unit_slope(const Objective& objective, double count, double m2) {
  const double deviation = sqrt(m2 / objective.degrees(count));
  return deviation == 0 ? 0 : 1 / (deviation * objective.factor(count, m2) * objective.degrees(count));
}

// Keeps what standardises a sample, from the moments of both sides.
template <class T>
__device__ void settle_moments(const Objective& objective, const Moments<double>* moments, Sample<T>& sample) {
  sample.student =
      affine_of<T>(moments[kStudent].mean, objective.factor(moments[kStudent].count, moments[kStudent].m2));
  sample.teacher =
      affine_of<T>(moments[kTeacher].mean, objective.factor(moments[kTeacher].count, moments[kTeacher].m2));
  sample.slope = static_cast<T>(unit_slope(objective, moments[kStudent].count, moments[kStudent].m2));
  sample.factor = sample.student.factor;
}

// Merges rows of what the block's threads have, into the first row; ends with a barrier. A row's numbers are
// `column_stride` apart, and rows `row_stride`.
template <class V, class Merge>
__device__ void merge_rows(V* parts, int rows, int row_stride, int columns, int column_stride, Merge merge) {
  __syncthreads();
  for (int half = rows / 2; half > 0; half /= 2) {
    for (int i = threadIdx.x; i < half * columns; i += blockDim.x) {
      const int at = i / columns * row_stride + i % columns * column_stride;
      merge(parts[at], parts[at + half * row_stride]);
    }
    __syncthreads();
  }
}

// The moments of each sample's piece, known to its team, from deviations of type A; ends with a barrier.
template <class A, class X, Layout kLayout, Use kUse>
__device__ void moments_by(const Block<X, kLayout, kUse>& block, Moments<double>* moments) {
  using T = Real<X>;
  A centre[2] = {};
  // The second time from close to the mean, so that nothing cancels in the squares.
  for (int round = 0; round < 2; ++round) {
    for (int side = kStudent; side <= kTeacher; ++side) {
      double count = 0, sum = 0, square = 0;
      for (int v = block.member; v < block.vectors; v += block.team) {
        T values[block.kWidth];
        A of_vector = 0, squares = 0;
        block.load(side, v, values);
#pragma unroll
        for (int w = 0; w < block.kWidth; ++w) {
          const bool masked = values[w] == minus_infinity<T>();
          const A away = masked ? A(0) : values[w] - centre[side];
          count += masked ? 0 : 1;
          of_vector += away;
          squares += away * away;
        }
        sum += of_vector;
        square += squares;
      }
      block.put(3 * side, count);
      block.put(3 * side + 1, sum);
      block.put(3 * side + 2, square);
    }
    __syncthreads();
    for (int side = kStudent; side <= kTeacher; ++side) {
      const double count = block.total(block.own, 3 * side), some = count > 1 ? count : 1;
      const double shift = block.total(block.own, 3 * side + 1) / some;
      const double m2 = block.total(block.own, 3 * side + 2) - shift * shift * count;
      moments[side] = {count, static_cast<double>(centre[side]) + shift, m2 > 0 ? m2 : m2 == m2 ? 0 : m2};
      centre[side] = static_cast<A>(moments[side].mean);
    }
    __syncthreads();
  }
}

// Whether squares of deviations are in the range of float32.
__device__ __forceinline__ bool in_range(const Moments<double>& moments) {
  return moments.count <= 1 || (moments.m2 > 1e-30 && moments.m2 < 1e37);
}

// The moments of each sample's piece, known to its team; ends with a barrier. Logits so large (masks) or small that
// their squares leave the range of float32 are counted anew, in double precision.
template <class X, Layout kLayout, Use kUse>
__device__ void sample_moments(const Block<X, kLayout, kUse>& block, Moments<double>* moments) {
  moments_by<Real<X>>(block, moments);
  if constexpr (sizeof(X) < 8) {
    const bool anew = !in_range(moments[kStudent]) || !in_range(moments[kTeacher]);
    if (!__syncthreads_or(anew)) return;
    Moments<double> exact[2];
    moments_by<double>(block, exact);
    for (int side = kStudent; side <= kTeacher; ++side)
      if (anew) moments[side] = exact[side];
  }
}

}  // namespace kdk::cuda
