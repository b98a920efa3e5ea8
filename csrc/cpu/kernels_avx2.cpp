// The kernels for AVX2.
#include "kernel_includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define KDK_AVX2
#define KDK_VECTOR_BYTES 32

namespace kdk::avx2 {
namespace {
#include "kernels_of_isa.h"
}  // namespace
extern const Kernels kernels;
const Kernels kernels = kKernels;
}  // namespace kdk::avx2
#endif
