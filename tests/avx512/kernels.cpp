// The kernels of csrc/cpu/kernels_avx512.cpp, for CPUs without AVX-512; they also stand for those of the other sets.
#include "includes.h"

#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include "intrinsics.h"
#define KDK_NAMESPACE kdk::avx512
#define KDK_AVX512
#define KDK_VECTOR_BYTES 64
#include "kernels_of_isa.h"

namespace kdk::avx2 {
extern const Kernels kernels;
const Kernels kernels = avx512::kernels;
}  // namespace kdk::avx2

namespace kdk::baseline {
extern const Kernels kernels;
const Kernels kernels = avx512::kernels;
}  // namespace kdk::baseline
