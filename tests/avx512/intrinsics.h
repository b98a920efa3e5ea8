// The AVX-512 instructions that the CPU kernels name, for CPUs without them: lane by lane, by their definitions. Of
// masked lanes no memory is touched.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace emulated {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(64)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = 64 / sizeof(T);

// of(i) in the lanes of the mask, 0 in the others.
template <class T, class Of>
inline Vector<T> masked(uint32_t mask, const Of& of) {
  Vector<T> v{};
  for (int i = 0; i < kLanes<T>; ++i)
    if (mask >> i & 1) v[i] = of(i);
  return v;
}

template <class T>
inline Vector<T> load(Vector<T> otherwise, uint32_t mask, const T* from) {
  for (int i = 0; i < kLanes<T>; ++i)
    if (mask >> i & 1) otherwise[i] = from[i];
  return otherwise;
}

template <class T>
inline void store(T* to, uint32_t mask, Vector<T> v) {
  for (int i = 0; i < kLanes<T>; ++i)
    if (mask >> i & 1) to[i] = v[i];
}

// x * 2^e, with e rounded down.
template <class T>
inline T scaled(T x, T e) {
  if (std::isnan(e)) return e;
  if (std::isnan(x)) return e == -INFINITY ? 0 : e == INFINITY ? INFINITY : x;
  if (e == -INFINITY) return std::isinf(x) ? NAN : x * 0;
  if (e == INFINITY) return x == 0 ? NAN : x * INFINITY;
  return std::scalbn(x, static_cast<int>(std::clamp<T>(std::floor(e), -10000, 10000)));
}

// An inverse as coarse as the instruction's may be: to 14 bits.
inline double coarse_inverse(double x) {
  const double exact = 1 / x;
  return std::isfinite(exact) ? exact * (1 + 0x1p-14 * 0.99) : exact;
}

template <class T>
inline bool compared(T a, T b, int predicate) {
  return predicate == _CMP_EQ_OQ ? a == b : predicate == _CMP_NLT_UQ ? !(a < b) : throw predicate;
}
template <class T>
inline uint32_t comparison(Vector<T> a, Vector<T> b, int predicate) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<T>; ++i) mask |= static_cast<uint32_t>(compared<T>(a[i], b[i], predicate)) << i;
  return mask;
}

template <class T>
inline Vector<T> maximum(uint32_t mask, Vector<T> a, Vector<T> b) {
  return masked<T>(mask, [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
template <class T>
inline Vector<T> rounded(uint32_t mask, Vector<T> x) {
  return masked<T>(mask, [&](int i) { return std::nearbyint(x[i]); });
}
template <class T>
inline Vector<T> scaled(uint32_t mask, Vector<T> x, Vector<T> e) {
  return masked<T>(mask, [&](int i) { return scaled<T>(x[i], e[i]); });
}
template <class Half>
inline Vector<double> widened(uint32_t mask, Half floats) {
  return masked<double>(mask, [&](int i) { return static_cast<double>(floats[i]); });
}
inline Vector<double> inverses(uint32_t mask, Vector<double> x) {
  return masked<double>(mask, [&](int i) { return coarse_inverse(x[i]); });
}

}  // namespace emulated

#define _mm512_mask_loadu_ps emulated::load<float>
#define _mm512_mask_loadu_pd emulated::load<double>
#define _mm512_mask_storeu_ps emulated::store<float>
#define _mm512_mask_storeu_pd emulated::store<double>
#define _mm512_stream_ps(to, v) emulated::store<float>(to, 0xffff, v)
#undef _mm512_cmp_ps_mask
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_ps_mask emulated::comparison<float>
#define _mm512_cmp_pd_mask emulated::comparison<double>
#define _mm512_maskz_max_ps emulated::maximum<float>
#define _mm512_maskz_max_pd emulated::maximum<double>
#undef _mm512_maskz_roundscale_ps
#undef _mm512_maskz_roundscale_pd
#define _mm512_maskz_roundscale_ps(mask, x, places) emulated::rounded<float>(mask, x)
#define _mm512_maskz_roundscale_pd(mask, x, places) emulated::rounded<double>(mask, x)
#define _mm512_maskz_scalef_ps emulated::scaled<float>
#define _mm512_maskz_scalef_pd emulated::scaled<double>
#define _mm512_maskz_cvtps_pd emulated::widened
#define _mm512_maskz_rcp14_pd emulated::inverses
