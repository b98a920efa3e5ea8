// The kernels for one type of logits; each file of them compiles by itself.
#pragma once

#include "backward.cuh"
#include "classes.cuh"
#include "forward.cuh"
#include "scale.cuh"
#include "split.cuh"

namespace kdk::cuda {

// Registers of a thread, at most: two blocks of the longest rows fit a multiprocessor. Double precision takes more.
template <class X>
constexpr int kMostRegisters = sizeof(X) == 8 ? 255 : 144;
// Of kernels that stream: as many threads as have enough under way, and no fewer registers than that takes.
template <class X>
constexpr int kMomentRegisters = 96;
template <class X>
constexpr int kClassSumRegisters = sizeof(X) == 8 ? 255 : 128;

}  // namespace kdk::cuda

#define KDK_KERNEL_OF(registers, step, layout, name, X)                              \
  extern "C" __global__ void __maxnreg__(kdk::cuda::registers<X>)                    \
      kdk_##step##_##layout##_##name(const __grid_constant__ kdk::cuda::Call call) { \
    kdk::cuda::step<X, kdk::cuda::Layout::layout>(call);                             \
  }
#define KDK_KERNEL(step, layout, name, X) KDK_KERNEL_OF(kMostRegisters, step, layout, name, X)
#define KDK_KERNELS(name, X)                                      \
  KDK_KERNEL(forward, rows, name, X)                              \
  KDK_KERNEL(forward, pixels, name, X)                            \
  KDK_KERNEL(backward, rows, name, X)                             \
  KDK_KERNEL(backward, pixels, name, X)                           \
  KDK_KERNEL(scale, rows, name, X)                                \
  KDK_KERNEL(scale, pixels, name, X)                              \
  KDK_KERNEL(part_moments, rows, name, X)                         \
  KDK_KERNEL(part_moments, pixels, name, X)                       \
  KDK_KERNEL(part_statistics, rows, name, X)                      \
  KDK_KERNEL(part_statistics, pixels, name, X)                    \
  KDK_KERNEL(part_products, rows, name, X)                        \
  KDK_KERNEL(part_products, pixels, name, X)                      \
  KDK_KERNEL(merge_parts, rows, name, X)                          \
  KDK_KERNEL(merge_products, rows, name, X)                       \
  KDK_KERNEL_OF(kMomentRegisters, class_moments, rows, name, X)   \
  KDK_KERNEL_OF(kMomentRegisters, class_moments, pixels, name, X) \
  KDK_KERNEL_OF(kClassSumRegisters, class_sums, rows, name, X)    \
  KDK_KERNEL_OF(kClassSumRegisters, class_sums, pixels, name, X)
