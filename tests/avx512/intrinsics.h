// The AVX-512 instructions that the CPU kernels name, for CPUs without them: lane by lane, by their definitions. Of
// masked lanes no memory is touched.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace emulated {

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
constexpr int kLanes = 16;

// of(i) in the lanes of the mask, 0 in the others.
template <class Of>
inline Floats masked(uint32_t mask, const Of& of) {
  Floats v{};
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) v[i] = of(i);
  return v;
}

inline Floats load(Floats otherwise, uint32_t mask, const float* from) {
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) otherwise[i] = from[i];
  return otherwise;
}

inline void store(float* to, uint32_t mask, Floats v) {
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) to[i] = v[i];
}

// x * 2^e, with e rounded down.
inline float scaled(float x, float e) {
  if (std::isnan(e)) return e;
  if (std::isnan(x)) return e == -INFINITY ? 0 : e == INFINITY ? INFINITY : x;
  if (e == -INFINITY) return std::isinf(x) ? NAN : x * 0;
  if (e == INFINITY) return x == 0 ? NAN : x * INFINITY;
  return std::scalbn(x, static_cast<int>(std::clamp(std::floor(e), -10000.0f, 10000.0f)));
}
inline Floats scaled(uint32_t mask, Floats x, Floats e) {
  return masked(mask, [&](int i) { return scaled(x[i], e[i]); });
}

inline bool compared(float a, float b, int predicate) { return predicate == _CMP_NLT_UQ ? !(a < b) : throw predicate; }
inline uint32_t comparison(Floats a, Floats b, int predicate) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(compared(a[i], b[i], predicate)) << i;
  return mask;
}

inline Floats maximum(uint32_t mask, Floats a, Floats b) {
  return masked(mask, [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline Floats rounded(uint32_t mask, Floats x) {
  return masked(mask, [&](int i) { return std::nearbyint(x[i]); });
}
template <class Half>
inline Doubles widened(uint32_t mask, Half floats) {
  Doubles v{};
  for (int i = 0; i < 8; ++i)
    if (mask >> i & 1) v[i] = floats[i];
  return v;
}

}  // namespace emulated

#define _mm512_mask_loadu_ps emulated::load
#define _mm512_mask_storeu_ps emulated::store
#define _mm512_stream_ps(to, v) emulated::store(to, 0xffff, v)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::comparison
#define _mm512_maskz_max_ps emulated::maximum
#undef _mm512_maskz_roundscale_ps
#define _mm512_maskz_roundscale_ps(mask, x, places) emulated::rounded(mask, x)
#define _mm512_maskz_scalef_ps emulated::scaled
#define _mm512_maskz_cvtps_pd emulated::widened
