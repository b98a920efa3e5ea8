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

// 16 bytes of elements: moved as they are, in one access.
using Vector = uint4;

template <class X, class T>
__device__ __forceinline__ void widen(const Vector& vector, T* out) {
  if constexpr (std::is_same_v<X, double>) {
    out[0] = __hiloint2double(vector.y, vector.x);
    out[1] = __hiloint2double(vector.w, vector.z);
  } else {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<X, float>) {
        out[i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same_v<X, __nv_bfloat16>) {
        // What __uint_as_float() would say with a move more each.
        asm("shl.b32 %0, %1, 16;" : "=f"(out[2 * i]) : "r"(words[i]));
        asm("and.b32 %0, %1, 0xffff0000;" : "=f"(out[2 * i + 1]) : "r"(words[i]));
      } else {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    }
  }
}

template <class X, class T>
__device__ __forceinline__ Vector narrow_all(const T* values) {
  unsigned words[4];
  if constexpr (std::is_same_v<X, double>) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[2 * i] = __double2loint(values[i]);
      words[2 * i + 1] = __double2hiint(values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<X, float>) {
        words[i] = __float_as_uint(values[i]);
      } else if constexpr (std::is_same_v<X, __half>) {
        const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
        words[i] = reinterpret_cast<const unsigned&>(pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        words[i] = reinterpret_cast<const unsigned&>(pair);
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
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
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double smaller(double a, double b) { return fmin(a, b); }

struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return larger(a, b);
  }
};

// Step 2 is in double precision. Its functions are for what it asks of them, sums and masses: that takes half the
// instructions and registers that it takes to be right for every number.
template <class R>
using Number = R;

// Of finite numbers that are not 0: the hardware's 20 bits, doubled twice.
__device__ __forceinline__ double inverse(double x) {
  double near;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(near) : "d"(x));
#pragma unroll
  for (int i = 0; i < 2; ++i) near = fma(near, fma(-x, near, 1.0), near);
  return near;
}

// Of positive numbers; NaN stays.
__device__ __forceinline__ double log(double x) {
  const int high = __double2hiint(x), exponent = (high - 0x3fe6a09e) >> 20;  // counted from sqrt(1/2)
  const double mantissa = __hiloint2double(high - (exponent << 20), __double2loint(x));
  const double s = (mantissa - 1) * inverse(mantissa + 1), z = s * s;  // log(mantissa) = 2 atanh(s)
  // Two halves of a series of ten: what waits for one another is half as long.
  const double z2 = z * z;
  double even = 1.0 / 17, odd = 1.0 / 19;
#pragma unroll
  for (int i = 13; i > 0; i -= 4) {
    even = fma(even, z2, 1.0 / i);
    odd = fma(odd, z2, 1.0 / (i + 2));
  }
  const double result = fma(static_cast<double>(exponent), kLn2, 2 * s * fma(odd, z, even));
  return x == x ? result : x;
}

// log(1 + x) of x >= 0.
__device__ __forceinline__ double log1p(double x) {
  const double sum = 1 + x;
  return log(sum) + (x - (sum - 1)) * inverse(sum);  // what the sum has lost
}

// Of numbers that are not positive; NaN stays.
__device__ __forceinline__ double exp(double x) {
  constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  const double whole = rint(x * kLog2E), rest = fma(-whole, kLn2Low, fma(-whole, kLn2High, x));
  const double square = rest * rest;
  double even = 1.0 / 479001600, odd = 1.0 / 6227020800, factorial = 479001600;  // 12!, 13!
#pragma unroll
  for (int i = 12; i > 0; i -= 2) {
    odd = fma(odd, square, i / factorial);
    factorial /= i * (i - 1);
    even = fma(even, square, 1 / factorial);
  }
  const double series = fma(odd, rest, even);
  const double result =
      __hiloint2double(__double2hiint(series) + (static_cast<int>(whole) << 20), __double2loint(series));
  return x > -700 ? result : x == x ? 0 : x;
}

#include "evaluate.h"

}  // namespace kdk::cuda
