// What is known of the samples besides their logits, and their results.
#pragma once

#include "block.cuh"

namespace kdk::cuda {

// What the weighted sum of the losses is multiplied by; 0 where there is nothing to divide by.
__device__ __forceinline__ double result_factor(const Call& call) {
  if (!call.divisor) return call.scale;
  return *call.divisor == 0 ? 0 : call.scale / *call.divisor;
}

// The weight of a sample in the result, 0 if it does not count, and its target. One out of range makes the weight NaN,
// and so the loss, where the objective takes one; no access follows it.
__device__ __forceinline__ double given_weight(const Call& call, int64_t number, int64_t& target) {
  double weight = call.weight ? call.weight[number] : 1;
  target = call.target ? call.target[number] : 0;
  if (call.target && target == call.ignore_index) weight = 0;
  if (target >= 0 && target < call.classes) return weight;
  target = 0;
  return weight == 0 || !call.target_is_entry() ? weight : NAN;
}

// The factor that comes from above.
__device__ __forceinline__ double upstream(const Call& call, int64_t number) {
  return call.upstream ? call.upstream[call.upstream_each ? number : 0] : 1;
}

// Reads what is known of the block's samples, a thread each: their weights as given or, if `again`, as forward has
// saved them. True for the whole block if any of its samples counts.
template <class X, Layout kLayout, Use kUse>
__device__ bool read_samples(Block<X, kLayout, kUse>& block, const Place& place, bool again) {
  using T = Real<X>;
  const Call& call = block.call;
  bool any = false;
  if (block.thread < call.tiling.samples) {
    Sample<T>& sample = block.samples[block.thread];
    const bool there = block.thread < place.count;
    const int64_t number = place.first + block.thread;
    int64_t target = 0;
    double weight = 0;
    if (there) {
      weight = given_weight(call, number, target);
      if (again) weight = static_cast<const T*>(call.saved)[number * saved_size(call.objective)];
    }
    sample.number = there ? number : -1;
    sample.valid = weight != 0;
    sample.weight = sample.valid ? weight * (again ? upstream(call, number) : result_factor(call)) : 0;
    sample.target = static_cast<int>(target);
    for (int side = 0; side < 3; ++side)
      sample.offset[side] = there && block.matrix(side).data ? offset_of(call, block.matrix(side), number) : 0;
    sample.lead = 0;
    if constexpr (kLayout == Layout::rows) {
      // Rows are laid out as the first matrix is that can be copied in whole vectors.
      for (int side = kTeacher; side >= kStudent; --side) {
        const Matrix& matrix = block.matrix(side);
        if (matrix.class_stride != 1 || matrix.dtype != dtype_of<X>) continue;
        const X* from = static_cast<const X*>(matrix.data) + sample.offset[side] + block.begin;
        sample.lead = static_cast<int>(reinterpret_cast<uintptr_t>(from) / sizeof(X) % block.kWidth);
      }
    }
    any = sample.valid;
  }
  any = __syncthreads_or(any);
  block.lead = block.sample().lead;
  const unsigned end = block.lead + block.count;
  block.vectors = static_cast<int>((end + block.kWidth - 1) / block.kWidth);
  block.whole = static_cast<int>(end / block.kWidth);
  return any;
}

// Writes one value of each of the block's samples or, to be added up later, their sum. By the first warp.
template <class X, Layout kLayout, Use kUse>
__device__ void write_result(const Block<X, kLayout, kUse>& block, int64_t number, void* out, int columns, int column,
                             double value) {
  if (block.call.each) {
    if (number >= 0) static_cast<Real<X>*>(out)[number * columns + column] = static_cast<Real<X>>(value);
    return;
  }
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  if (block.thread == 0) {
    const int64_t row = block.split() ? blockIdx.x : blockIdx.x / block.pieces();
    static_cast<double*>(out)[row * columns + column] = value;
  }
}

}  // namespace kdk::cuda
