// Multiplies a gradient in place. A gradient of 0 stays 0 whatever the factor, NaN and infinity included: that of
// samples that do not count and of classes that are not compared.
#pragma once

#include "samples.cuh"

namespace kdk::cuda {

template <class T>
__device__ __forceinline__ T scaled(T gradient, T factor) {
  return gradient == 0 ? gradient : gradient * factor;
}

// Multiplies what a block of samples has.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void scale_block(const Call& call, int64_t which) {
  using T = Real<X>;
  const int pieces = call.tiling.pieces;
  Block<X, kLayout, kUse> block(call, static_cast<int>(which % pieces));
  const Place place = place_of<kLayout>(call, which / pieces);
  if (block.own >= place.count) return;
  const int64_t number = place.first + block.own;
  const T factor = static_cast<T>(upstream(call, number));
  X* data = static_cast<X*>(call.student.data) + offset_of(call, call.student, number) +
            block.begin * call.student.class_stride;
  int begin = 0, end = 0;  // the classes in whole vectors
  if (kLayout == Layout::rows && call.student.class_stride == 1) {
    constexpr int kWide = 16 / sizeof(X);
    begin = min(static_cast<int>((kWide - reinterpret_cast<uintptr_t>(data) / sizeof(X) % kWide) % kWide), block.count);
    end = begin + (block.count - begin) / kWide * kWide;
    for (int c = begin + block.member * kWide; c < end; c += block.team * kWide) {
      auto* at = reinterpret_cast<Vector*>(data + c);
      const Vector vector = *at;
      T values[kWide];
      widen<X>(vector, values);
#pragma unroll
      for (int w = 0; w < kWide; ++w) values[w] = scaled(values[w], factor);
      *at = narrow_all<X>(values);
    }
  }
  for (int c = block.member; c < block.count - (end - begin); c += block.team) {
    X& value = data[(c < begin ? c : c + end - begin) * call.student.class_stride];
    value = narrow<X>(scaled(widen(value), factor));
  }
}

// A factor of 1 for all touches no memory; most are, so that there are but as many blocks as a GPU holds. The gradient
// stands where the student does.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void scale(const Call& call) {
  if (!call.upstream_each && *call.upstream == 1) return;
  const int64_t blocks = blocks_of_samples<kLayout>(call) * call.tiling.pieces;
  for (int64_t which = blockIdx.x; which < blocks; which += gridDim.x) scale_block<X, kLayout, kUse>(call, which);
}

}  // namespace kdk::cuda
