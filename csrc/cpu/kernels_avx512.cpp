// The kernels for AVX512.
#include "kernel_includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c,bmi,bmi2")
#define KDK_AVX512
#define KDK_VECTOR_BYTES 64

namespace kdk::avx512 {
namespace {
#include "kernels_of_isa.h"
}  // namespace
extern const Kernels kernels;
const Kernels kernels = kKernels;
}  // namespace kdk::avx512
#endif
