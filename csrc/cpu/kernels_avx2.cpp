// The kernels for AVX2.
#include "kernel_includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define KDK_AVX2
#define KDK_VECTOR_BYTES 32

namespace kdk::avx2 {
namespace {
// The order matters: each needs the one before.
// clang-format off
#include "simd.h"
#include "../evaluate.h"
#include "tile_kernels.h"
#include "standardize.h"
#include "row_kernels.h"
#include "pixel_kernels.h"
#include "kernels_of_isa.h"
// clang-format on
}  // namespace
extern const Kernels kernels;
const Kernels kernels = kKernels;
}  // namespace kdk::avx2
#endif
