// The row kernels for AVX2.
#include "row_includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define KDK_AVX2
#define KDK_VECTOR_BYTES 32

namespace kdk::avx2 {
namespace {
#include "simd.h"
#include "row_kernels.h"
}  // namespace
extern const RowKernels kernels;
const RowKernels kernels = kRowKernels;
}  // namespace kdk::avx2
#endif
