// Sweeps over the classes of a block's samples: statistics (step 1) and gradient (step 3). Losses and partitions do not
// appear here: what is not in a term's last group has been masked before, and is worked on one by one (entries.cuh).
// Exponents count from origins in the exponents' own unit, log2 (see stats.h): one multiply-add each, whose rounding is
// that of its result.
#pragma once

#include "standardize.cuh"

namespace kdk::cuda {

template <class T>
__device__ __forceinline__ T origin_of(T largest, T exponent) {
  return start(largest * exponent);
}

// The largest logit of a side that the thread looks at.
template <class X, Layout kLayout>
__device__ Real<X> own_maximum(const Block<X, kLayout>& block, int side) {
  using T = Real<X>;
  if constexpr (block.kRows && sizeof(X) == 2) {
    // Two at a time, as they are.
    using Pair = std::conditional_t<std::is_same_v<X, __half>, __half2, __nv_bfloat162>;
    const X none = narrow<X>(minus_infinity<T>());
    Pair largest{none, none};
    for (int v = block.member; v < block.vectors; v += block.team) {
      const Vector vector = reinterpret_cast<const Vector*>(block.tile[side])[v];
      const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = __hmax2(largest, reinterpret_cast<const Pair&>(words[i]));
    }
    return larger(widen(largest.x), widen(largest.y));
  } else {
    T largest = minus_infinity<T>();
    for (int v = block.member; v < block.vectors; v += block.team) {
      T values[block.kWidth];
      block.load(side, v, values);
#pragma unroll
      for (int w = 0; w < block.kWidth; ++w) largest = larger(largest, values[w]);
    }
    return largest;
  }
}

// Maxima of what a block's samples have left: see Sample::largest. Ends with a barrier.
template <class X, Layout kLayout>
__device__ void maxima(const Block<X, kLayout>& block) {
  using T = Real<X>;
  const bool standardize_first = block.call.objective.standardize != Standardize::none;
  T largest[3] = {minus_infinity<T>(), minus_infinity<T>(), minus_infinity<T>()};
  if (!standardize_first) {
    for (int side = kStudent; side <= kTeacher; ++side) largest[side] = own_maximum(block, side);
  } else {
    for (int v = block.member; v < block.vectors; v += block.team) {
      T s[block.kWidth], t[block.kWidth];
      block.load(kStudent, v, s);
      block.load(kTeacher, v, t);
#pragma unroll
      for (int w = 0; w < block.kWidth; ++w) largest[2] = larger(largest[2], s[w]);
      standardize(block, kStudent, v, s);
      standardize(block, kTeacher, v, t);
#pragma unroll
      for (int w = 0; w < block.kWidth; ++w) {
        largest[kStudent] = larger(largest[kStudent], s[w]);
        largest[kTeacher] = larger(largest[kTeacher], t[w]);
      }
    }
  }
  block.template maximum<3>(largest);
  if (!standardize_first) largest[2] = largest[kStudent];
  if (block.member == 0)
    for (int i = 0; i < 3; ++i) block.sample().largest[i] = largest[i];
  __syncthreads();
}

// The four sums of a term's last group, in the partial results from `column` on.
template <bool kForward, bool kReverse, class X, Layout kLayout>
__device__ void add_up(const Block<X, kLayout>& block, Real<X> exponent, int column) {
  using T = Real<X>;
  const T student_origin = origin_of(block.sample().largest[kStudent], exponent);
  const T teacher_origin = origin_of(block.sample().largest[kTeacher], exponent);
  double total[4] = {};  // a vector is added up in the arithmetic's type: few numbers, so that little is rounded off
  for (int v = block.member; v < block.vectors; v += block.team) {
    T s[block.kWidth], t[block.kWidth], sum[4] = {};
    block.load(kStudent, v, s);
    block.load(kTeacher, v, t);
    standardize(block, kStudent, v, s);
    standardize(block, kTeacher, v, t);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) {
      const T a = fma(s[w], exponent, -student_origin), b = fma(t[w], exponent, -teacher_origin);
      const T es = power(a), et = power(b), gap = b - a;
      sum[0] += es;
      sum[1] += et;
      // A class without probability adds nothing, however infinite its gap.
      if constexpr (kForward) sum[2] = et > 0 ? fma(et, gap, sum[2]) : sum[2];
      if constexpr (kReverse) sum[3] = es > 0 ? fma(es, gap, sum[3]) : sum[3];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += sum[i];
  }
  block.put(column, total[0]);
  block.put(column + 1, total[1]);
  if constexpr (kForward) block.put(column + 2, total[2]);
  if constexpr (kReverse) block.put(column + 3, total[3]);
}

// The sum of the student's softmax, in the first partial result.
template <class X, Layout kLayout>
__device__ void add_up_softmax(const Block<X, kLayout>& block) {
  using T = Real<X>;
  const T exponent = static_cast<T>(kLog2E), origin = origin_of(block.sample().largest[2], exponent);
  double total = 0;
  for (int v = block.member; v < block.vectors; v += block.team) {
    T s[block.kWidth], sum = 0;
    block.load(kStudent, v, s);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) sum += power(fma(s[w], exponent, -origin));
    total += sum;
  }
  block.put(0, total);
}

// Partial results of everything that has a sum. To be read after a barrier.
template <class X, Layout kLayout>
__device__ void statistics(const Block<X, kLayout>& block) {
  const Objective& objective = block.call.objective;
  if (objective.has_ce()) add_up_softmax(block);
  for (int t = 0; t < objective.terms; ++t) {
    const Term& term = objective.term[t];
    const auto exponent = static_cast<Real<X>>(term.exponent());
    const bool forward = term.wants_forward(), reverse = term.wants_reverse();
    if (forward && reverse) add_up<true, true>(block, exponent, 1 + 4 * t);
    else if (reverse) add_up<false, true>(block, exponent, 1 + 4 * t);
    else add_up<true, false>(block, exponent, 1 + 4 * t);
  }
}

// The gradient of a group's class in the logit that the term sees.
template <class T>
__device__ __forceinline__ T slope_at(const GroupShare<T>& share, T exponent, bool tilted, T student, T teacher) {
  const T a = fma(student, exponent, -share.student_origin), b = fma(teacher, exponent, -share.teacher_origin);
  const T es = power(a), push = power(b) * -share.teacher;
  if (!tilted) return fma(es, share.student, push);
  return (es > 0 ? es * fma(b - a, share.tilt, share.student) : es) + push;
}

// What the gradient sweep knows of its sample, in registers.
template <class T>
struct GradientNumbers {
  T exponent[kMaxTerms];
  bool tilted[kMaxTerms];
  GroupShare<T> rest[kMaxTerms];

  __device__ GradientNumbers(const Objective& objective, const Sample<T>& sample) {
#pragma unroll
    for (int t = 0; t < kMaxTerms; ++t) {
      if (t >= objective.terms) break;
      const Term& term = objective.term[t];
      exponent[t] = static_cast<T>(term.exponent());
      tilted[t] = term.tilted();
      rest[t] = sample.share[t][term.groups() - 1];
    }
  }
};

// The gradient of a vector of classes in the logits that the terms see.
template <class T, int kWidth>
__device__ __forceinline__ void vector_gradient(const GradientNumbers<T>& numbers, int terms, const T* s, const T* t,
                                                T* out) {
#pragma unroll
  for (int i = 0; i < kMaxTerms; ++i) {
    if (i >= terms) break;
    if (numbers.tilted[i]) {
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        const T slope = slope_at(numbers.rest[i], numbers.exponent[i], true, s[w], t[w]);
        out[w] = i == 0 ? slope : out[w] + slope;
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        const T slope = slope_at(numbers.rest[i], numbers.exponent[i], false, s[w], t[w]);
        out[w] = i == 0 ? slope : out[w] + slope;
      }
    }
  }
}

// The chain rule through a standardised logit. Nothing flows to masked classes.
template <class T>
__device__ __forceinline__ T chain(T gradient, T h, T level, T slope, T factor) {
  return h == minus_infinity<T>() ? T(0) : (gradient - level - h * slope) * factor;
}

template <class X, Layout kLayout>
__device__ __forceinline__ Real<X> chained(const Block<X, kLayout>& block, int64_t of_class, Real<X> h,
                                           Real<X> gradient) {
  using T = Real<X>;
  const Call& call = block.call;
  const Sample<T>& sample = block.sample();
  if (call.objective.standardize == Standardize::by_sample)
    return chain(gradient, h, T(0), sample.slope, sample.factor);
  if (call.objective.standardize == Standardize::by_class)
    return chain(gradient, h, affine_number<T>(call, kLevel, of_class), affine_number<T>(call, kSlope, of_class),
                 affine_number<T>(call, kFactor, of_class));
  return gradient;
}

// The gradient of the cross entropy but for its target.
template <class T>
__device__ __forceinline__ T softmax_gradient(const Sample<T>& sample, T logit) {
  return power(fma(logit, static_cast<T>(kLog2E), -sample.softmax_origin)) * sample.softmax_factor;
}

// The sum over the piece, without entries, of gradient times standardised logit.
template <class X, Layout kLayout>
__device__ double product_sum(const Block<X, kLayout>& block) {
  using T = Real<X>;
  const Objective& objective = block.call.objective;
  const GradientNumbers<T> numbers(objective, block.sample());
  double total = 0;
  for (int v = block.member; v < block.vectors; v += block.team) {
    T s[block.kWidth], t[block.kWidth], out[block.kWidth], sum = 0;
    block.load(kStudent, v, s);
    block.load(kTeacher, v, t);
    standardize(block, kStudent, v, s);
    standardize(block, kTeacher, v, t);
    vector_gradient<T, block.kWidth>(numbers, objective.terms, s, t, out);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) sum += s[w] == minus_infinity<T>() ? T(0) : out[w] * s[w];
    total += sum;
  }
  return total;
}

// Puts the gradient in the student's place; that of entries comes after.
template <class X, Layout kLayout>
__device__ void gradient(const Block<X, kLayout>& block) {
  using T = Real<X>;
  const Objective& objective = block.call.objective;
  const Sample<T>& sample = block.sample();
  const bool plain = objective.standardize == Standardize::none, entropy = objective.has_ce();
  const GradientNumbers<T> numbers(objective, sample);
  for (int v = block.member; v < block.vectors; v += block.team) {
    T raw[block.kWidth], s[block.kWidth], t[block.kWidth], out[block.kWidth];
    block.load(kStudent, v, raw);
    block.load(kTeacher, v, t);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) s[w] = raw[w];
    standardize(block, kStudent, v, s);
    standardize(block, kTeacher, v, t);
    vector_gradient<T, block.kWidth>(numbers, objective.terms, s, t, out);
    if (!plain) {
#pragma unroll
      for (int w = 0; w < block.kWidth; ++w) out[w] = chained(block, class_near(block, v, w), s[w], out[w]);
    }
    if (entropy) {
#pragma unroll
      for (int w = 0; w < block.kWidth; ++w) out[w] += softmax_gradient(sample, raw[w]);
    }
    block.store(kStudent, v, out);
  }
}

}  // namespace kdk::cuda
