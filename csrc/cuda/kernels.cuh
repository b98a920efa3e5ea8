// The kernels for one type of logits; each file of them compiles by itself.
#pragma once

#include "backward.cuh"
#include "class_gradients.cuh"
#include "class_lanes.cuh"
#include "class_statistics.cuh"
#include "forward.cuh"
#include "lanes.cuh"
#include "scale.cuh"
#include "split.cuh"

namespace kdk::cuda {

// Registers of a thread, at most: the fewer, the more warps hide each other's waiting. Double precision takes more, and
// so does code for other generations.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 != 9
constexpr int kMoreRegisters = 24;
#else
constexpr int kMoreRegisters = 0;
#endif
template <class X, Layout kLayout, Use kUse>
constexpr int kMostRegisters = sizeof(X) == 8                                     ? 255
                               : kUse == Use::any                                 ? 128
                               : kUse == Use::ranked || kLayout == Layout::pixels ? 104 + kMoreRegisters
                               : sizeof(X) == 4                                   ? 96 + kMoreRegisters
                                                                                  : 72 + kMoreRegisters;
// Three groups' statistics, and those that lead, a thread each.
constexpr int kRankedLaneRegisters = 128 + kMoreRegisters;
constexpr int kLaneGradientRegisters = 80 + kMoreRegisters;
// Of kernels that stream: as many threads as have enough under way, and no fewer registers than that takes.
constexpr int kMomentRegisters = 96;
template <class X>
constexpr int kClassSumRegisters = sizeof(X) == 8 ? 255 : 128;
template <class X>
constexpr int kClassStreamRegisters = sizeof(X) == 8 ? 255 : 168;

}  // namespace kdk::cuda

#define KDK_KERNEL_OF(registers, kernel, ...)                                                                      \
  extern "C" __global__ void __maxnreg__((registers)) kdk_##kernel(const __grid_constant__ kdk::cuda::Call call) { \
    kdk::cuda::__VA_ARGS__(call);                                                                                  \
  }
#define KDK_KERNEL_FOR(use, suffix, step, layout, name, X)                                      \
  KDK_KERNEL_OF((kdk::cuda::kMostRegisters<X, kdk::cuda::Layout::layout, kdk::cuda::Use::use>), \
                step##suffix##_##layout##_##name, step<X, kdk::cuda::Layout::layout, kdk::cuda::Use::use>)
#define KDK_CLASS_KERNEL(registers, step, layout, name, X) \
  KDK_KERNEL_OF((kdk::cuda::registers), step##_##layout##_##name, step<X, kdk::cuda::Layout::layout>)
#define KDK_KERNEL(step, layout, name, X) KDK_KERNEL_FOR(any, , step, layout, name, X)
#define KDK_KERNELS_OF_USE(name, X)                                            \
  KDK_KERNEL_FOR(ranked, _ranked, forward, rows, name, X)                      \
  KDK_KERNEL_FOR(ranked, _ranked, forward, pixels, name, X)                    \
  KDK_KERNEL_FOR(simple, _simple, forward, rows, name, X)                      \
  KDK_KERNEL_FOR(simple, _simple, forward, pixels, name, X)                    \
  KDK_KERNEL_OF((kdk::cuda::kRankedLaneRegisters), lanes_ranked_pixels_##name, \
                lanes<X, kdk::cuda::Layout::pixels, kdk::cuda::Use::ranked>)   \
  KDK_KERNEL_FOR(simple, _simple, lanes, pixels, name, X)                      \
  KDK_KERNEL_FOR(any, , lanes, pixels, name, X)                                \
  KDK_CLASS_KERNEL(kLaneGradientRegisters, lane_sums, pixels, name, X)         \
  KDK_CLASS_KERNEL(kLaneGradientRegisters, lane_gradient, pixels, name, X)
#define KDK_KERNELS(name, X)                                                  \
  KDK_KERNEL(forward, rows, name, X)                                          \
  KDK_KERNEL(forward, pixels, name, X)                                        \
  KDK_KERNEL(backward, rows, name, X)                                         \
  KDK_KERNEL(backward, pixels, name, X)                                       \
  KDK_KERNEL(scale, rows, name, X)                                            \
  KDK_KERNEL(scale, pixels, name, X)                                          \
  KDK_KERNEL(part_moments, rows, name, X)                                     \
  KDK_KERNEL(part_moments, pixels, name, X)                                   \
  KDK_KERNEL(part_statistics, rows, name, X)                                  \
  KDK_KERNEL(part_statistics, pixels, name, X)                                \
  KDK_KERNEL(part_products, rows, name, X)                                    \
  KDK_KERNEL(part_products, pixels, name, X)                                  \
  KDK_KERNEL(merge_parts, rows, name, X)                                      \
  KDK_KERNEL(merge_products, rows, name, X)                                   \
  KDK_CLASS_KERNEL(kMomentRegisters, class_moments, rows, name, X)            \
  KDK_CLASS_KERNEL(kMomentRegisters, class_moments, pixels, name, X)          \
  KDK_CLASS_KERNEL(kClassSumRegisters<X>, class_sums, rows, name, X)          \
  KDK_CLASS_KERNEL(kClassSumRegisters<X>, class_sums, pixels, name, X)        \
  KDK_CLASS_KERNEL(kClassStreamRegisters<X>, class_gradient, rows, name, X)   \
  KDK_CLASS_KERNEL(kClassStreamRegisters<X>, class_gradient, pixels, name, X) \
  KDK_CLASS_KERNEL(kClassStreamRegisters<X>, class_statistics, rows, name, X) \
  KDK_CLASS_KERNEL(kClassSumRegisters<X>, class_settle, rows, name, X)
