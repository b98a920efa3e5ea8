// The kernels for AVX2.
#include "includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define KDK_NAMESPACE kdk::avx2
#define KDK_AVX2
#define KDK_VECTOR_BYTES 32
#include "kernels_of_isa.h"
#endif
