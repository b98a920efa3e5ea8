// The kernels for one type of logits; each file of them compiles by itself.
#pragma once

#include "backward.cuh"
#include "classes.cuh"
#include "forward.cuh"
#include "lanes.cuh"
#include "scale.cuh"
#include "split.cuh"

namespace kdk::cuda {

// Registers of a thread, at most: the fewer, the more warps hide each other's waiting. Double precision takes more.
template <class X, Layout kLayout, Use kUse>
constexpr int kMostRegisters = sizeof(X) == 8              ? 255
                               : kUse == Use::any          ? 128
                               : kUse == Use::ranked       ? 104
                               : kLayout == Layout::pixels ? 96
                                                           : 88;

}  // namespace kdk::cuda

#define KDK_KERNEL_FOR(use, suffix, step, layout, name, X)                                   \
  extern "C" __global__ void __maxnreg__(                                                    \
      (kdk::cuda::kMostRegisters<X, kdk::cuda::Layout::layout, kdk::cuda::Use::use>))        \
      kdk_##step##suffix##_##layout##_##name(const __grid_constant__ kdk::cuda::Call call) { \
    kdk::cuda::step<X, kdk::cuda::Layout::layout, kdk::cuda::Use::use>(call);                \
  }
#define KDK_KERNEL(step, layout, name, X) KDK_KERNEL_FOR(any, , step, layout, name, X)
#define KDK_KERNELS_OF_USE(name, X)                         \
  KDK_KERNEL_FOR(ranked, _ranked, forward, rows, name, X)   \
  KDK_KERNEL_FOR(ranked, _ranked, forward, pixels, name, X) \
  KDK_KERNEL_FOR(simple, _simple, forward, rows, name, X)   \
  KDK_KERNEL_FOR(simple, _simple, forward, pixels, name, X) \
  KDK_KERNEL_FOR(simple, , lanes, pixels, name, X)
#define KDK_KERNELS(name, X)                   \
  KDK_KERNEL(forward, rows, name, X)           \
  KDK_KERNEL(forward, pixels, name, X)         \
  KDK_KERNEL(backward, rows, name, X)          \
  KDK_KERNEL(backward, pixels, name, X)        \
  KDK_KERNEL(scale, rows, name, X)             \
  KDK_KERNEL(scale, pixels, name, X)           \
  KDK_KERNEL(part_moments, rows, name, X)      \
  KDK_KERNEL(part_moments, pixels, name, X)    \
  KDK_KERNEL(part_statistics, rows, name, X)   \
  KDK_KERNEL(part_statistics, pixels, name, X) \
  KDK_KERNEL(part_products, rows, name, X)     \
  KDK_KERNEL(part_products, pixels, name, X)   \
  KDK_KERNEL(merge_parts, rows, name, X)       \
  KDK_KERNEL(merge_products, rows, name, X)
#define KDK_CLASS_KERNELS(name, X)           \
  KDK_KERNEL(class_moments, rows, name, X)   \
  KDK_KERNEL(class_moments, pixels, name, X) \
  KDK_KERNEL(class_sums, rows, name, X)      \
  KDK_KERNEL(class_sums, pixels, name, X)
