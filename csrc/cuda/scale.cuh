// Multiplies a gradient in place.
#pragma once

#include "samples.cuh"

namespace kdk::cuda {

// A factor of 1 for all touches no memory. The gradient stands where the student does.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void scale(const Call& call) {
  using T = Real<X>;
  if (!call.upstream_each && *call.upstream == 1) return;
  const int pieces = call.tiling.pieces;
  Block<X, kLayout, kUse> block(call, static_cast<int>(blockIdx.x % pieces));
  const Place place = place_of<kLayout>(call, blockIdx.x / pieces);
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
      for (int w = 0; w < kWide; ++w) values[w] *= factor;
      *at = narrow_all<X>(values);
    }
  }
  for (int c = block.member; c < block.count - (end - begin); c += block.team) {
    X& value = data[(c < begin ? c : c + end - begin) * call.student.class_stride];
    value = narrow<X>(widen(value) * factor);
  }
}

}  // namespace kdk::cuda
