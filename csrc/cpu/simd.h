// Vectors of floats of the instruction set that is being built (KDK_VECTOR_BYTES, KDK_AVX512, KDK_AVX2), and functions
// of them.
//
// Written with the compilers' vector extensions; intrinsics only where an instruction does what C++ cannot say.
// Included once per instruction set, inside that set's namespace: no function here may leave it.
#pragma once

#include "includes.h"

#if !defined(KDK_VECTOR_BYTES)  // 128 bits, which every 64-bit CPU has: SSE2, NEON
#define KDK_VECTOR_BYTES 16
#define KDK_NAMESPACE kdk::baseline
#endif

namespace KDK_NAMESPACE {
namespace {

template <class T, int Lanes>
struct VecOf {
  typedef T type __attribute__((vector_size(Lanes * sizeof(T))));
};

constexpr int kLanes = KDK_VECTOR_BYTES / sizeof(float);
typedef float Vec __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(KDK_VECTOR_BYTES)));

#define KDK_INLINE __attribute__((always_inline))  // of functions and lambdas in loops over classes

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
inline void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }
inline Doubles load(const double* from) {
  Doubles v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
inline void store(double* to, Doubles v) { __builtin_memcpy(to, &v, sizeof v); }

// Past the caches, without reading what was there; `to` must be aligned to a vector. Others see it after a fence.
inline void stream(float* to, Vec v) {
#if defined(KDK_AVX512)
  _mm512_stream_ps(to, v);
#elif defined(KDK_AVX2)
  _mm256_stream_ps(to, v);
#else
  store(to, v);
#endif
}
inline void stream_fence() {
#if defined(KDK_AVX512) || defined(KDK_AVX2)
  _mm_sfence();
#endif
}

template <int... I>
constexpr Ints lane_index(std::integer_sequence<int, I...>) {
  return Ints{I...};
}
constexpr Ints kLaneIndex = lane_index(std::make_integer_sequence<int, kLanes>());

inline Vec broadcast(float value) { return Vec{} + value; }

// The first `count` lanes, `other` in the rest; memory beyond is not touched.
inline Vec load_first(const float* from, int count, float other) {
  if (count >= kLanes) return load(from);
#if defined(KDK_AVX512)
  return _mm512_mask_loadu_ps(broadcast(other), static_cast<__mmask16>((1u << count) - 1), from);
#else
  Vec v = broadcast(other);
  __builtin_memcpy(&v, from, count * sizeof(float));
  return v;
#endif
}
inline void store_first(float* to, Vec v, int count) {
  if (count >= kLanes) return store(to, v);
#if defined(KDK_AVX512)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), v);
#else
  __builtin_memcpy(to, &v, count * sizeof(float));
#endif
}

// The larger, or smaller, of both; `b` where either is NaN. Compilers make two instructions or more of a choice.
#if defined(KDK_AVX512)
inline Vec max(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
#elif defined(KDK_AVX2)
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#elif defined(__x86_64__)
inline Vec max(Vec a, Vec b) { return _mm_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm_min_ps(a, b); }
#else
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

template <class T, int Lanes, int... I>
inline typename VecOf<T, Lanes / 2>::type half(typename VecOf<T, Lanes>::type v, int index,
                                               std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return index == 0 ? __builtin_shufflevector(v, v, I...) : __builtin_shufflevector(v, v, (I + Lanes / 2)...);
#else
  typename VecOf<T, Lanes / 2>::type result{};
  ((result[I] = v[index * Lanes / 2 + I]), ...);
  return result;
#endif
}
// The lower (0) or upper (1) half of a vector.
template <class T, int Lanes>
inline typename VecOf<T, Lanes / 2>::type half(typename VecOf<T, Lanes>::type v, int index) {
  return half<T, Lanes>(v, index, std::make_integer_sequence<int, Lanes / 2>());
}
// Combines the lanes of a vector, half with half.
template <class T, int Lanes, class Combine>
inline T fold(typename VecOf<T, Lanes>::type v, Combine combine) {
  if constexpr (Lanes == 2) {
    return combine(v[0], v[1]);
  } else {
    return fold<T, Lanes / 2>(combine(half<T, Lanes>(v, 0), half<T, Lanes>(v, 1)), combine);
  }
}

// The lower (0) or upper (1) half of a vector, as doubles.
inline Doubles doubles_of(Vec v, int index) {
  const auto floats = half<float, kLanes>(v, index);
#if defined(KDK_AVX512)
  return _mm512_maskz_cvtps_pd(0xff, floats);  // compilers take two steps from the plain conversion
#elif defined(KDK_AVX2)
  return _mm256_cvtps_pd(floats);
#else
  return __builtin_convertvector(floats, Doubles);
#endif
}

inline float horizontal_max(Vec v) {
  return fold<float, kLanes>(v, [](auto a, auto b) { return a > b ? a : b; });
}
inline double horizontal_sum(Vec v) {
  const Doubles sum = doubles_of(v, 0) + doubles_of(v, 1);
  return fold<double, kLanes / 2>(sum, [](auto a, auto b) { return a + b; });
}
inline bool any(Ints v) {
  return fold<int32_t, kLanes>(v, [](auto a, auto b) { return a | b; }) != 0;
}
inline bool all_finite(Vec v) { return !any((v - v) != 0); }
// Adds a vector to as many doubles.
inline void add_widened(double* to, Vec v) {
  store(to, load(to) + doubles_of(v, 0));
  store(to + kLanes / 2, load(to + kLanes / 2) + doubles_of(v, 1));
}

// 2^f for f in [-1/2, 1/2]: minimax in the relative error, 2e-9 before rounding. Degree 5 would do for 8e-8, which
// shows in the losses of single samples.
inline Vec exp2_fraction(Vec f) {
  Vec p = broadcast(1.5345812e-4f);
  p = p * f + 1.3399931e-3f;
  p = p * f + 9.6184890e-3f;
  p = p * f + 5.5503288e-2f;
  p = p * f + 2.4022647e-1f;
  p = p * f + 6.9314721e-1f;
  return p * f + 1.0f;
}

// 2^x: infinite where that is too large, 0 at -inf, NaN at NaN.
#if defined(KDK_AVX512)
// At -inf the fraction is NaN, and scalef(NaN, -inf) is 0 by definition. The masks are full: they spare the compiler
// an undefined operand.
inline Vec exp2(Vec x) {
  const Vec whole = _mm512_maskz_roundscale_ps(0xffff, x, 0);
  return _mm512_maskz_scalef_ps(0xffff, exp2_fraction(x - whole), whole);
}
#else
// From -127 down, where the exponent's bits are all 0, so is the fraction: 0. The least exponentials above are not
// exact: less than the smallest normal number, and off by no more than that.
inline Vec exp2(Vec x) {
  constexpr float shifter = 12582912.0f;                                   // 1.5 * 2^23
  const Vec clamped = min(broadcast(128.0f), max(broadcast(-127.0f), x));  // else the exponent's bits would wrap around
  const Vec shifted = clamped + shifter;  // rounds to an integer, which ends up in the lowest bits
  const Vec power = exp2_fraction(clamped - (shifted - shifter));
  return reinterpret_cast<Vec>(reinterpret_cast<Ints>(power) + (reinterpret_cast<Ints>(shifted) << 23));
}
#endif

// Functions that FINALIZE needs, on a sample a lane.
struct VecMath {
  static Vec exp(Vec x) { return exp2(x * static_cast<float>(kLog2E)); }

  // log(x) for x > 0 and not subnormal; NaN at NaN.
  static Vec log(Vec x) {
    // x = 2^e * m with m in [sqrt(1/2), sqrt(2))
    const Ints offset = reinterpret_cast<Ints>(x) - 0x3f3504f3;
    const Vec e = __builtin_convertvector(offset >> 23, Vec);
    const Vec m = reinterpret_cast<Vec>(reinterpret_cast<Ints>(x) - (offset >> 23 << 23));
    // log(m) = 2 atanh(s), |s| < 0.172
    const Vec s = (m - 1) / (m + 1), s2 = s * s;
    Vec p = broadcast(2.0f / 9);
    p = p * s2 + 2.0f / 7;
    p = p * s2 + 2.0f / 5;
    p = p * s2 + 2.0f / 3;
    const Vec result = e * 0.693147182f + (2 * s + s * s2 * p);
    return x == x ? result : x;
  }
  // log(1 + x) for x >= 0.
  static Vec log1p(Vec x) {
    const Vec sum = 1 + x;
    return log(sum) + (x - (sum - 1)) / sum;  // what the sum lost
  }
};

// Bit i is set where not v[i] < bound: at least the bound, or NaN.
inline uint32_t not_less(Vec v, Vec bound) {
#if defined(KDK_AVX512)
  return _mm512_cmp_ps_mask(v, bound, _CMP_NLT_UQ);
#elif defined(KDK_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps(v, bound, _CMP_NLT_UQ));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(!(v[i] < bound[i])) << i;
  return mask;
#endif
}

// 16-bit floats

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float bit_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return bit_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  // The half's bits read as a float's are its value times 2^-112, subnormals included.
  return bit_float(sign | float_bits(bit_float(magnitude << 13) * 5.192296858534828e33f));
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, BFloat16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
inline void narrow(float x, Half& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const float magnitude = bit_float(bits & 0x7fffffff);
  uint32_t result;
  if (!(magnitude < 65520.0f)) {
    result = magnitude != magnitude ? 0x7e00 : 0x7c00;
  } else if (magnitude < 6.103515625e-05f) {
    result = float_bits(magnitude + 0.5f) - float_bits(0.5f);  // the sum's last bit is a half's smallest subnormal
  } else {
    const uint32_t rebased = (bits & 0x7fffffff) - (112u << 23);
    result = (rebased + 0xfff + (rebased >> 13 & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | result);
}

#if defined(KDK_AVX512) || defined(KDK_AVX2)
// Eight halves at a time; the compiler does as well for bfloat16 from the scalar code.
inline void widen_all(const Half* from, int count, float* to) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; ++i) to[i] = widen(from[i]);
}
inline void narrow_all(const float* from, int count, Half* to) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  for (; i < count; ++i) narrow(from[i], to[i]);
}
#endif
template <class In>
inline void widen_all(const In* from, int count, float* to) {
  for (int i = 0; i < count; ++i) to[i] = widen(from[i]);
}
template <class Out>
inline void narrow_all(const float* from, int count, Out* to) {
  for (int i = 0; i < count; ++i) narrow(from[i], to[i]);
}

}  // namespace
}  // namespace KDK_NAMESPACE
