// Vectors of the instruction set that is being built (KDK_ISA, KDK_VECTOR_BYTES), and base-2 exponentials on them.
//
// Written with the compilers' vector extensions; intrinsics only where an instruction does what C++ cannot say.
// Included once per instruction set, inside that set's namespace: no function here may leave it.

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(KDK_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(KDK_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(KDK_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(KDK_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
using Doubles = Vec<double>;
template <class R>
using Number = double;  // of step 2, which is in double precision whatever the logits
template <class T>
constexpr int kLanes = KDK_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
inline void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}
// Past the caches, without reading what was there; `to` must be aligned to a vector. Others see it after a fence.
inline void stream(float* to, Vec<float> v) {
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

template <class T>
inline Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

// Which lanes of a vector are there: all, or those whose bit is set. Of seen lanes, memory is there for all.
struct AllLanes {};
using Lanes = uint32_t;
struct SeenLanes {
  Lanes bits;
};
#if defined(KDK_AVX512)
constexpr bool kHasLaneMasks = true;  // else some lanes are loaded one by one
#else
constexpr bool kHasLaneMasks = false;
#endif

template <class T>
inline Vec<T> load(const T* from, AllLanes) {
  return load(from);
}
#if defined(KDK_AVX2)
// All bits of the lanes that are there.
template <class T>
inline __m256i mask_of(Lanes lanes) {
  using Bits = typename VecOf<T>::bits;
  Bits bit;
  for (int i = 0; i < kLanes<T>; ++i) bit[i] = 1 << i;
  return reinterpret_cast<__m256i>(((Bits{} + lanes) & bit) == bit);
}
#endif
// Memory under lanes that are not there is not touched; they are -inf.
template <class T>
inline Vec<T> load(const T* from, Lanes lanes) {
  const Vec<T> nothing = broadcast(T(-INFINITY));
#if defined(KDK_AVX512)
  if constexpr (sizeof(T) == 4) return _mm512_mask_loadu_ps(nothing, lanes, from);
  if constexpr (sizeof(T) == 8) return _mm512_mask_loadu_pd(nothing, lanes, from);
#elif defined(KDK_AVX2)
  const __m256i mask = mask_of<T>(lanes);
  if constexpr (sizeof(T) == 4)
    return _mm256_blendv_ps(nothing, _mm256_maskload_ps(from, mask), reinterpret_cast<Vec<float>>(mask));
  if constexpr (sizeof(T) == 8)
    return _mm256_blendv_pd(nothing, _mm256_maskload_pd(from, mask), reinterpret_cast<Vec<double>>(mask));
#else
  Vec<T> v = nothing;
  for (int i = 0; i < kLanes<T>; ++i)
    if (lanes >> i & 1) v[i] = from[i];
  return v;
#endif
}
template <class T>
inline Vec<T> load(const T* from, SeenLanes lanes) {
  return load(from, lanes.bits);
}
// The same with whatever is in memory under lanes that are not there, if it is there.
template <class T, class Which>
inline Vec<T> load_seen(const T* from, Which lanes) {
  if constexpr (std::is_same_v<Which, Lanes>) return load(from, lanes);
  return load(from);
}
// The first `count` lanes.
template <class T>
inline void store(T* to, Vec<T> v, int count) {
#if defined(KDK_AVX512)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, (1u << count) - 1, v);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(to, (1u << count) - 1, v);
#elif defined(KDK_AVX2)
  const __m256i mask = mask_of<T>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(to, mask, v);
  if constexpr (sizeof(T) == 8) _mm256_maskstore_pd(to, mask, v);
#else
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

// The larger, or smaller, of both; `b` where either is NaN. Compilers make two instructions or more of a choice.
#if defined(KDK_AVX512)
inline Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return _mm512_maskz_max_pd(0xff, a, b); }
#elif defined(KDK_AVX2)
inline Vec<float> max(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
inline Vec<float> min(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
inline Vec<double> min(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a, b); }
#elif defined(__x86_64__)
inline Vec<float> max(Vec<float> a, Vec<float> b) { return _mm_max_ps(a, b); }
inline Vec<float> min(Vec<float> a, Vec<float> b) { return _mm_min_ps(a, b); }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return _mm_max_pd(a, b); }
inline Vec<double> min(Vec<double> a, Vec<double> b) { return _mm_min_pd(a, b); }
#else
template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V min(V a, V b) {
  return a < b ? a : b;
}
#endif

template <class T, int Lanes>
struct VecOfLanes {
  typedef T type __attribute__((vector_size(Lanes * sizeof(T))));
};

template <class T, int Lanes, int... I>
inline typename VecOfLanes<T, Lanes / 2>::type half(typename VecOfLanes<T, Lanes>::type v, int index,
                                                    std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return index == 0 ? __builtin_shufflevector(v, v, I...) : __builtin_shufflevector(v, v, (I + Lanes / 2)...);
#else
  typename VecOfLanes<T, Lanes / 2>::type result{};
  ((result[I] = v[index * Lanes / 2 + I]), ...);
  return result;
#endif
}

// The lower (0) or upper (1) half of a vector.
template <class T, int Lanes>
inline typename VecOfLanes<T, Lanes / 2>::type half(typename VecOfLanes<T, Lanes>::type v, int index) {
  return half<T, Lanes>(v, index, std::make_integer_sequence<int, Lanes / 2>());
}

// Combines the lanes of a vector, half with half.
template <class T, int Lanes, class Combine>
inline T fold(typename VecOfLanes<T, Lanes>::type v, Combine combine) {
  if constexpr (Lanes == 2) {
    return combine(v[0], v[1]);
  } else {
    return fold<T, Lanes / 2>(combine(half<T, Lanes>(v, 0), half<T, Lanes>(v, 1)), combine);
  }
}

// The lower (0) or upper (1) half of a vector of floats, as doubles.
inline Vec<double> doubles_of(Vec<float> v, int index) {
  const auto floats = half<float, kLanes<float>>(v, index);
#if defined(KDK_AVX512)
  return _mm512_maskz_cvtps_pd(0xff, floats);  // compilers take two steps from the plain conversion
#elif defined(KDK_AVX2)
  return _mm256_cvtps_pd(floats);
#else
  return __builtin_convertvector(floats, Vec<double>);
#endif
}

template <class T>
inline T horizontal_max(Vec<T> v) {
  return fold<T, kLanes<T>>(v, [](auto a, auto b) { return a > b ? a : b; });
}
inline double horizontal_sum(Vec<double> v) {
  return fold<double, kLanes<double>>(v, [](auto a, auto b) { return a + b; });
}
inline double horizontal_sum(Vec<float> v) { return horizontal_sum(doubles_of(v, 0) + doubles_of(v, 1)); }

// 2^f for f in [-1/2, 1/2]: minimax in the relative error, 2e-9 (float) and 4e-18 (double) before rounding. A float's
// degree 5 would do for 8e-8, which shows in the losses of single samples.
inline Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = broadcast(1.5345812e-4f);
  p = p * f + 1.3399931e-3f;
  p = p * f + 9.6184890e-3f;
  p = p * f + 5.5503288e-2f;
  p = p * f + 2.4022647e-1f;
  p = p * f + 6.9314721e-1f;
  return p * f + 1.0f;
}
// Doubles take the odd and the even powers side by side: half as long a chain of operations that wait for one another.
inline Vec<double> exp2_fraction(Vec<double> f) {
  const Vec<double> f2 = f * f;
  Vec<double> odd = broadcast(4.4352827069572771511e-10), even = broadcast(7.0741056135081427963e-9);
  odd = odd * f2 + 1.0178198021671930844e-7;
  even = even * f2 + 1.321543308967639918e-6;
  odd = odd * f2 + 1.5252733489988525649e-5;
  even = even * f2 + 1.5403530462513532204e-4;
  odd = odd * f2 + 1.3333558146789921722e-3;
  even = even * f2 + 9.6181291075883352443e-3;
  odd = odd * f2 + 5.5504108664819921605e-2;
  even = even * f2 + 2.4022650695910156204e-1;
  odd = odd * f2 + 6.9314718055994533046e-1;
  return odd * f + (even * f2 + 1.0);
}

// 2^x: infinite where that is too large, 0 at -inf, NaN at NaN.
#if defined(KDK_AVX512)
// At -inf the fraction is NaN, and scalef(NaN, -inf) is 0 by definition. The masks are full: they spare the compiler
// an undefined operand.
inline Vec<float> exp2(Vec<float> x) {
  const Vec<float> whole = _mm512_maskz_roundscale_ps(0xffff, x, 0);
  return _mm512_maskz_scalef_ps(0xffff, exp2_fraction(x - whole), whole);
}
inline Vec<double> exp2(Vec<double> x) {
  const Vec<double> whole = _mm512_maskz_roundscale_pd(0xff, x, 0);
  return _mm512_maskz_scalef_pd(0xff, exp2_fraction(x - whole), whole);
}
// 0 in lanes that are not there.
inline Vec<float> exp2(Vec<float> x, SeenLanes lanes) {
  const Vec<float> whole = _mm512_maskz_roundscale_ps(0xffff, x, 0);
  return _mm512_maskz_scalef_ps(lanes.bits, exp2_fraction(x - whole), whole);
}
inline Vec<double> exp2(Vec<double> x, SeenLanes lanes) {
  const Vec<double> whole = _mm512_maskz_roundscale_pd(0xff, x, 0);
  return _mm512_maskz_scalef_pd(lanes.bits, exp2_fraction(x - whole), whole);
}
#else
// From `lowest` down, where the exponent's bits are all 0, so is the fraction: 0. The least exponentials above are not
// exact: less than the smallest normal number, and off by no more than that.
template <class V, class Bits, class T>
inline V exp2_by_bits(V x, T shifter, T lowest, T highest, int mantissa) {
  const V clamped = min(V{} + highest, max(V{} + lowest, x));  // else the exponent's bits would wrap around
  const V shifted = clamped + shifter;                         // rounds to an integer, which ends up in the lowest bits
  const V power = exp2_fraction(clamped - (shifted - shifter));
  return reinterpret_cast<V>(reinterpret_cast<Bits>(power) + (reinterpret_cast<Bits>(shifted) << mantissa));
}
inline Vec<float> exp2(Vec<float> x) {
  return exp2_by_bits<Vec<float>, VecOf<float>::bits>(x, 12582912.0f, -127.0f, 128.0f, 23);  // 1.5 * 2^23
}
inline Vec<double> exp2(Vec<double> x) {
  return exp2_by_bits<Vec<double>, VecOf<double>::bits>(x, 6755399441055744.0, -1023.0, 1024.0, 52);  // 1.5 * 2^52
}
#endif

// Of loaded lanes: those that are not there are 0, as they are -inf or masked.
template <class V, class Which>
inline V exp2(V x, Which) {
  return exp2(x);
}

// Natural logarithms and exponentials of doubles, for step 2 on several samples at a time.

inline Vec<double> exp(Vec<double> x) { return exp2(x * kLog2E); }

// 1 / x to within two units in the last place, for finite x other than 0.
inline Vec<double> inverse(Vec<double> x) {
#if defined(KDK_AVX512)
  Vec<double> r = _mm512_maskz_rcp14_pd(0xff, x);  // two of Newton's steps are several times faster than a division
  r += r * (1 - x * r);
  return r + r * (1 - x * r);
#else
  return 1 / x;
#endif
}

// log(x) for x > 0 and not subnormal; NaN at NaN.
inline Vec<double> log(Vec<double> x) {
  using Bits = VecOf<double>::bits;
  // x = 2^e * m with m in [sqrt(1/2), sqrt(2))
  const Bits offset = reinterpret_cast<Bits>(x) - 0x3fe6a09e667f3bcdLL;
  const Vec<double> e = __builtin_convertvector(offset >> 52, Vec<double>);
  const Vec<double> m = reinterpret_cast<Vec<double>>(reinterpret_cast<Bits>(x) - (offset >> 52 << 52));
  // log(m) = 2 atanh(s), |s| < 0.172
  const Vec<double> s = (m - 1) * inverse(m + 1), s2 = s * s, s4 = s2 * s2;
  Vec<double> p = broadcast(1.0 / 19), q = broadcast(1.0 / 21);  // side by side, as in exp2_fraction
  for (const double i : {15.0, 11.0, 7.0, 3.0}) p = p * s4 + 1 / i;
  for (const double i : {17.0, 13.0, 9.0, 5.0}) q = q * s4 + 1 / i;
  const Vec<double> result = e * kLn2 + (2 * s + 2 * s * s2 * (q * s2 + p));
  return x == x ? result : x;
}

// log(1 + x) for x >= 0.
inline Vec<double> log1p(Vec<double> x) {
  const Vec<double> sum = 1 + x;
  return log(sum) + (x - (sum - 1)) * inverse(sum);  // what the sum lost
}

// Bit i is set where not v[i] < bound: at least the bound, or NaN.
template <class T>
inline uint32_t not_less(Vec<T> v, Vec<T> bound) {
#if defined(KDK_AVX512)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(v, bound, _CMP_NLT_UQ);
  if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask(v, bound, _CMP_NLT_UQ);
#elif defined(KDK_AVX2)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(_mm256_cmp_ps(v, bound, _CMP_NLT_UQ));
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd(_mm256_cmp_pd(v, bound, _CMP_NLT_UQ));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<T>; ++i) mask |= static_cast<uint32_t>(!(v[i] < bound[i])) << i;
  return mask;
#endif
}

// Bit i is set where v[i] == w[i].
template <class T>
inline Lanes equal(Vec<T> v, Vec<T> w) {
#if defined(KDK_AVX512)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(v, w, _CMP_EQ_OQ);
  if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask(v, w, _CMP_EQ_OQ);
#elif defined(KDK_AVX2)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(_mm256_cmp_ps(v, w, _CMP_EQ_OQ));
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd(_mm256_cmp_pd(v, w, _CMP_EQ_OQ));
#else
  Lanes mask = 0;
  for (int i = 0; i < kLanes<T>; ++i) mask |= static_cast<Lanes>(v[i] == w[i]) << i;
  return mask;
#endif
}

// 16-bit floats ----------------------------------------------------------------------------------------------------

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
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bit_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  // The half's bits read as a float's are its value times 2^-112, subnormals included.
  return bit_float(sign | float_bits(bit_float(magnitude << 13) * 5.192296858534828e33f));
}

inline void narrow(double x, double& out) { out = x; }
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
template <class Out>
inline void narrow(double x, Out& out) {
  narrow(static_cast<float>(x), out);
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
template <class In, class T>
inline void widen_all(const In* from, int count, T* to) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i]));
}
template <class T, class Out>
inline void narrow_all(const T* from, int count, Out* to) {
  for (int i = 0; i < count; ++i) narrow(from[i], to[i]);
}
