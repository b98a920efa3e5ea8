// Element types, conversions and elementary functions on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "call.h"

namespace kdk::cuda {

// The type that logits of type X are computed in.
template <class X>
using Real = std::conditional_t<std::is_same_v<X, double>, double, float>;

template <class X>
constexpr DType dtype_of = std::is_same_v<X, float>    ? DType::f32
                           : std::is_same_v<X, double> ? DType::f64
                           : std::is_same_v<X, __half> ? DType::f16
                                                       : DType::bf16;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class X, class T>
__device__ __forceinline__ X narrow(T x) {
  if constexpr (std::is_same_v<X, __half>) return __float2half_rn(x);
  else if constexpr (std::is_same_v<X, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else return static_cast<X>(x);
}

// 16 bytes of elements.
template <class X>
struct alignas(16) Vector {
  X element[16 / sizeof(X)];
};

template <class X, class T>
__device__ __forceinline__ void widen(const Vector<X>& vector, T* out) {
  constexpr int kWidth = 16 / sizeof(X);
  if constexpr (std::is_same_v<X, __nv_bfloat16>) {
    const uint4 bits = reinterpret_cast<const uint4&>(vector);
    const unsigned pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(pairs[i] << 16);
      out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = widen(vector.element[i]);
  }
}

template <class X, class T>
__device__ __forceinline__ void narrow(const T* values, Vector<X>& vector) {
  if constexpr (sizeof(X) == 2) {
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<X, __half>) {
        const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
        pairs[i] = reinterpret_cast<const unsigned&>(pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        pairs[i] = reinterpret_cast<const unsigned&>(pair);
      }
    }
    reinterpret_cast<uint4&>(vector) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 16 / static_cast<int>(sizeof(X)); ++i) vector.element[i] = values[i];
  }
}

// An element of any type in global memory, in the arithmetic's type.
template <class T>
__device__ __forceinline__ T load_as(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32: return static_cast<T>(static_cast<const float*>(data)[at]);
    case DType::f64: return static_cast<T>(static_cast<const double*>(data)[at]);
    case DType::f16: return static_cast<T>(widen(static_cast<const __half*>(data)[at]));
    default: return static_cast<T>(widen(static_cast<const __nv_bfloat16*>(data)[at]));
  }
}

template <class T>
__device__ __forceinline__ void store_as(void* data, DType dtype, int64_t at, T value) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(data)[at] = static_cast<float>(value); break;
    case DType::f64: static_cast<double*>(data)[at] = static_cast<double>(value); break;
    case DType::f16: static_cast<__half*>(data)[at] = __float2half_rn(static_cast<float>(value)); break;
    default: static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(static_cast<float>(value));
  }
}

__device__ __forceinline__ int bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// 2^x: the hardware's own approximation where arithmetic is in float32.
__device__ __forceinline__ float power(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ double power(double x) { return exp2(x); }

template <class T>
__device__ __forceinline__ T minus_infinity() {
  return static_cast<T>(-INFINITY);
}

// The maximum; a NaN is passed over, and shows in the sums.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// Step 2, in double precision.
template <class R>
using Number = R;
using ::exp;
using ::log;
using ::log1p;
__device__ __forceinline__ double inverse(double x) { return 1 / x; }
#include "../evaluate.h"

}  // namespace kdk::cuda
