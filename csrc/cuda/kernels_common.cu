// Kernels that see no matrices.
#include "objective.h"
#include "small.h"
#include "standardize.cuh"

namespace kdk::cuda {

// The block's sum, known to its first thread; always in the same order.
__device__ double block_sum(double value) {
  __shared__ double sums[kSumThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += sums[i];
  return sum;
}

extern "C" __global__ void __launch_bounds__(kSumThreads) kdk_row_sum(const __grid_constant__ RowSum call) {
  const int64_t column = blockIdx.x;
  double sum = 0;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < call.rows; row += blockDim.x) sum += call.values[row * call.columns + column];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (call.to_float) static_cast<float*>(call.out)[column] = static_cast<float>(sum);
  else static_cast<double*>(call.out)[column] = sum;
}

extern "C" __global__ void __launch_bounds__(kSumThreads) kdk_weight_sum(const __grid_constant__ WeightSum call) {
  const int64_t begin = blockIdx.x * int64_t{kWeightsOfBlock}, end = min(begin + kWeightsOfBlock, call.samples);
  double sum = 0;
  for (int64_t n = begin + threadIdx.x; n < end; n += blockDim.x) {
    const double weight = call.weight ? call.weight[n] : 1;
    sum += call.target && call.target[n] == call.ignore_index ? 0 : weight;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) call.out[blockIdx.x] = sum;
}

template <class T>
__device__ void write_affines(const Affines& call, int64_t of_class) {
  Objective objective;
  objective.standardize = Standardize::by_class;
  objective.correction = call.correction;
  objective.eps = call.eps;
  T* table = static_cast<T*>(call.table) + of_class;
  for (int side = kStudent; side <= kTeacher; ++side) {
    const double* moments = call.moments + side * 3 * call.classes + of_class;
    const double count = moments[0], mean = moments[call.classes], m2 = moments[2 * call.classes];
    const Affine<T> affine = affine_of<T>(mean, objective.factor(count, m2));
    table[(side * kSide + kHigh) * call.classes] = affine.high;
    table[(side * kSide + kFactor) * call.classes] = affine.factor;
    table[(side * kSide + kOffset) * call.classes] = affine.offset;
    if (side == kStudent && call.sums) {
      table[kLevel * call.classes] = static_cast<T>(call.sums[of_class] / (count > 1 ? count : 1));
      table[kSlope * call.classes] = static_cast<T>(call.sums[call.classes + of_class] / objective.degrees(count));
    }
  }
}

extern "C" __global__ void __launch_bounds__(kSumThreads) kdk_affines(const __grid_constant__ Affines call) {
  const int64_t of_class = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  if (of_class >= call.classes) return;
  if (call.to_float) write_affines<float>(call, of_class);
  else write_affines<double>(call, of_class);
}

// Merges what the stretches have for a column, by all threads of it: known to the first of them.
template <class V, class Read, class Merge>
__device__ __forceinline__ V over_stretches(const StretchMerge& call, bool there, Read read, Merge merge) {
  const int columns = call.columns_of_block, threads = kSumThreads / columns;
  __shared__ V parts[kSumThreads];
  V& all = parts[threadIdx.x];
  all = V{};
  if (there) {
#pragma unroll 4
    for (int64_t i = threadIdx.x / columns; i < call.stretches; i += threads) merge(all, read(i));
  }
  merge_rows(parts, threads, columns, columns, 1, merge);
  return all;
}

// `columns` classes of a side: stretches of count, mean and sum of squared deviations.
extern "C" __global__ void __launch_bounds__(kSumThreads) kdk_merge_moments(const __grid_constant__ StretchMerge call) {
  const int64_t column = blockIdx.x * int64_t{call.columns_of_block} + threadIdx.x % call.columns_of_block;
  const bool there = column < 2 * call.columns;
  const int64_t at = column / call.columns * 3 * call.columns + column % call.columns;
  const auto all = over_stretches<Moments<double>>(
      call, there,
      [&](int64_t i) {
        const double* from = call.partial + i * 6 * call.columns + at;
        return Moments<double>{from[0], from[call.columns], from[2 * call.columns]};
      },
      [](Moments<double>& into, const Moments<double>& other) { merge(into, other); });
  if (!there || threadIdx.x >= call.columns_of_block) return;
  call.out[at] = all.count;
  call.out[at + call.columns] = all.mean;
  call.out[at + 2 * call.columns] = all.m2;
}

extern "C" __global__ void __launch_bounds__(kSumThreads) kdk_add_stretches(const __grid_constant__ StretchMerge call) {
  const int64_t column = blockIdx.x * int64_t{call.columns_of_block} + threadIdx.x % call.columns_of_block;
  const bool there = column < call.columns;
  const auto sum = over_stretches<double>(
      call, there, [&](int64_t i) { return call.partial[i * call.columns + column]; },
      [](double& into, double other) { into += other; });
  if (there && threadIdx.x < call.columns_of_block) call.out[column] = sum;
}

}  // namespace kdk::cuda
