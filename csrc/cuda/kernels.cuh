// The kernels for one type of logits; each file of them compiles by itself.
#pragma once

#include "backward.cuh"
#include "classes.cuh"
#include "forward.cuh"
#include "scale.cuh"

namespace kdk::cuda {

// Threads of a block, at most: arithmetic in double precision needs twice the registers.
template <class X>
constexpr int kMostThreads = sizeof(X) == 8 ? 256 : 512;

}  // namespace kdk::cuda

#define KDK_KERNEL(step, layout, name, X)                                                                    \
  extern "C" __global__ void __launch_bounds__(kdk::cuda::kMostThreads<X>)                                   \
      kdk_##step##_##layout##_##name(const __grid_constant__ kdk::cuda::Call call) {                         \
    kdk::cuda::step<X, kdk::cuda::Layout::layout>(call);                                                     \
  }
#define KDK_KERNELS(name, X)             \
  KDK_KERNEL(forward, rows, name, X)     \
  KDK_KERNEL(forward, pixels, name, X)   \
  KDK_KERNEL(backward, rows, name, X)    \
  KDK_KERNEL(backward, pixels, name, X)  \
  KDK_KERNEL(scale, rows, name, X)       \
  KDK_KERNEL(scale, pixels, name, X)
#define KDK_CLASS_KERNELS(name, X)            \
  KDK_KERNEL(class_moments, rows, name, X)    \
  KDK_KERNEL(class_moments, pixels, name, X)  \
  KDK_KERNEL(class_sums, rows, name, X)       \
  KDK_KERNEL(class_sums, pixels, name, X)
