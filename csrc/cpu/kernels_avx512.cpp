// The kernels for AVX-512.
#include "includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c,bmi,bmi2")
#define KDK_NAMESPACE kdk::avx512
#define KDK_AVX512
#define KDK_VECTOR_BYTES 64
#include "kernels_of_isa.h"
#endif
