// Sweeps over the classes of a block's samples: statistics (step 1) and gradient (step 3). Losses and partitions do not
// appear here: what is not in a term's last group has been masked before, and is worked on one by one (entries.cuh).
// Exponents count from origins in the exponents' own unit, log2 (see stats.h): one multiply-add each, whose rounding is
// that of its result.
#pragma once

#include "standardize.cuh"

namespace kdk::cuda {

// Numbers that are added up in the arithmetic's type before the sum goes on in double precision: so few that little is
// rounded off.
constexpr int kSummed = 8;

template <class T>
__device__ __forceinline__ T origin_of(T largest, T exponent) {
  return start(largest * exponent);
}

// Of a group of one class: what it adds up to, counted from its exponent as it is and not, as in a sweep, rounded.
template <class T>
__device__ __forceinline__ void count_exactly(GroupStats<double>& stats, T student, T teacher, T exponent) {
  stats.student_origin = static_cast<double>(student) * exponent;
  stats.teacher_origin = static_cast<double>(teacher) * exponent;
  stats.student_sum = stats.student_sum > 0 ? 1 : stats.student_sum;  // 0 or NaN otherwise
  stats.teacher_sum = stats.teacher_sum > 0 ? 1 : stats.teacher_sum;
}

// The factor of what was counted from an origin if, as in the gradient's sweep, it counts from the origin rounded.
template <class T>
__device__ __forceinline__ T from_rounded(double origin) {
  const double exact = start(origin);
  return power(static_cast<T>(static_cast<T>(exact) - exact));
}

// The largest logits of both sides that the warp, or the thread of pixels, looks at.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void lane_maxima(const Block<X, kLayout, kUse>& block, Real<X>* largest) {
  using T = Real<X>;
  if constexpr (block.kRows && sizeof(X) == 2) {
    // Two at a time, as they are.
    using Pair = std::conditional_t<std::is_same_v<X, __half>, __half2, __nv_bfloat162>;
    const X none = narrow<X>(minus_infinity<T>());
    Pair pairs[2] = {{none, none}, {none, none}};
    in_turn<4>(block.member, block.vectors, block.team, [&](int v) {
#pragma unroll
      for (int side = kStudent; side <= kTeacher; ++side) {
        const Vector vector = reinterpret_cast<const Vector*>(block.tile[side])[v];
        const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[side] = __hmax2(pairs[side], reinterpret_cast<const Pair&>(words[i]));
      }
    });
    const Pair low{pairs[kStudent].x, pairs[kTeacher].x}, high{pairs[kStudent].y, pairs[kTeacher].y};
    const Pair sides = block.over_lanes(__hmax2(low, high), [](Pair a, Pair b) { return __hmax2(a, b); });
    largest[kStudent] = widen(sides.x);
    largest[kTeacher] = widen(sides.y);
  } else {
    largest[kStudent] = largest[kTeacher] = minus_infinity<T>();
    in_turn<4>(block.member, block.vectors, block.team, [&](int v) {
#pragma unroll
      for (int side = kStudent; side <= kTeacher; ++side) {
        T values[block.kWidth];
        block.load(side, v, values);
#pragma unroll
        for (int w = 0; w < block.kWidth; ++w) largest[side] = larger(largest[side], values[w]);
      }
    });
#pragma unroll
    for (int side = kStudent; side <= kTeacher; ++side) largest[side] = block.over_lanes(largest[side], Larger{});
  }
}

// Puts what is masked as far below the largest logit as leaves nothing of an exponential, where the type has room for
// that: a finite gap needs no care.
template <class X, Layout kLayout, Use kUse>
__device__ void lower_masks(const Block<X, kLayout, kUse>& block, const Real<X>* largest) {
  using T = Real<X>;
  const Call& call = block.call;
  X masks[2];
#pragma unroll
  for (int side = kStudent; side <= kTeacher; ++side)
    masks[side] = narrow<X>(largest[side] - larger(fabs(largest[side]), static_cast<T>(call.far_below)));
  for (int e = block.member; e < call.tiling.entries; e += block.team) {
    if (!block.entries[e].counts) continue;
    const int slot = block.slot_of(block.entries[e].of_class - block.begin);
    for (int side = kStudent; side <= kTeacher; ++side) block.slot(side, slot) = masks[side];
  }
  const int lead = block.lead, pads = block.vectors * block.kWidth - block.count;
  for (int i = block.member; i < pads; i += block.team)
    for (int side = kStudent; side <= kTeacher; ++side) block.slot(side, i < lead ? i : block.count + i) = masks[side];
}

// Maxima of what a block's samples have left: see Sample::largest. Ends with a barrier.
template <class X, Layout kLayout, Use kUse>
__device__ void maxima(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  T largest[3] = {minus_infinity<T>(), minus_infinity<T>(), minus_infinity<T>()};
  if (block.plain()) {
    lane_maxima(block, largest);
    block.template maximum_of_warps<2>(largest);
    largest[2] = largest[kStudent];
    lower_masks(block, largest);
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
    block.template maximum<3>(largest);
  }
  if (block.member == 0)
    for (int i = 0; i < 3; ++i) block.sample().largest[i] = largest[i];
  __syncthreads();
}

// Adds up what the thread has of a term's last group. A class without probability adds nothing, however infinite its
// gap: where that has to be looked at, or logits are standardised, it takes longer than if `kFast`.
template <bool kForward, bool kReverse, bool kFast, class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void add_up_own(const Block<X, kLayout, kUse>& block, Real<X> exponent, double* total) {
  using T = Real<X>;
  constexpr int kVectors = kFast ? kSummed / Block<X, kLayout, kUse>::kWidth : 1;
  const T student_origin = origin_of(block.sample().largest[kStudent], exponent);
  const T teacher_origin = origin_of(block.sample().largest[kTeacher], exponent);
#pragma unroll
  for (int i = 0; i < 4; ++i) total[i] = 0;
  in_groups<kVectors>(block.member, block.vectors, block.team, [&](int v, auto count) {
    T sum[2][4];
#pragma unroll
    for (int i = 0; i < count.value; ++i, v += block.team) {
      T s[block.kWidth], t[block.kWidth];
      block.load(kStudent, v, s);
      block.load(kTeacher, v, t);
      if constexpr (!kFast) {
        standardize(block, kStudent, v, s);
        standardize(block, kTeacher, v, t);
      }
#pragma unroll
      for (int w = 0; w < block.kWidth; ++w) {
        T(&to)[4] = sum[w % 2];
        const bool first = i == 0 && w < 2;
        const T a = fma(s[w], exponent, -student_origin), b = fma(t[w], exponent, -teacher_origin);
        const T es = power(a), et = power(b), gap = b - a;
        to[0] = first ? es : to[0] + es;
        to[1] = first ? et : to[1] + et;
        if constexpr (kForward) {
          const T forward = kFast || et > 0 ? gap : T(0);
          to[2] = first ? et * forward : fma(et, forward, to[2]);
        }
        if constexpr (kReverse) {
          const T reverse = kFast || es > 0 ? gap : T(0);
          to[3] = first ? es * reverse : fma(es, reverse, to[3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < 2 || (i == 2 ? kForward : kReverse)) total[i] += sum[0][i] + sum[1][i];
  });
}

// The four sums of a term's last group, in the partial results from `column` on.
template <bool kForward, bool kReverse, class X, Layout kLayout, Use kUse>
__device__ void add_up(const Block<X, kLayout, kUse>& block, Real<X> exponent, int column) {
  double total[4] = {};
  const bool fast = block.plain();
  if (fast) add_up_own<kForward, kReverse, true>(block, exponent, total);
  // Infinite gaps have made NaN.
  const double gaps = kForward && kReverse ? total[2] + total[3] : total[kForward ? 2 : 3];
  if (!fast || gaps != gaps) add_up_own<kForward, kReverse, false>(block, exponent, total);
  block.put_four(column, total);
}

// An exponential of the student's softmax. It counts from a logit: the cross entropy takes the target's logit off that,
// and nothing large may have been rounded before.
template <class T>
__device__ __forceinline__ T softmax_power(T logit, T origin) {
  return power((logit - origin) * static_cast<T>(kLog2E));
}

// The sum of the student's softmax, in the first partial result.
template <class X, Layout kLayout, Use kUse>
__device__ void add_up_softmax(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  const T origin = start(block.sample().largest[2]);
  double total = 0;
  for (int v = block.member; v < block.vectors; v += block.team) {
    T s[block.kWidth], sum = 0;
    block.load(kStudent, v, s);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) sum += softmax_power(s[w], origin);
    total += sum;
  }
  block.put(0, total);
}

// Partial results of everything that has a sum. To be read after a barrier.
template <class X, Layout kLayout, Use kUse>
__device__ void statistics(const Block<X, kLayout, kUse>& block) {
  const Objective& objective = block.call.objective;
  if (objective.has_ce()) add_up_softmax(block);
  for (int t = 0; t < block.call.sweeps; ++t) {
    const Sweep& sweep = block.call.sweep[t];
    const auto exponent = static_cast<Real<X>>(sweep.exponent);
    if (sweep.forward && sweep.reverse) add_up<true, true>(block, exponent, 1 + 4 * t);
    else if (sweep.reverse) add_up<false, true>(block, exponent, 1 + 4 * t);
    else add_up<true, false>(block, exponent, 1 + 4 * t);
  }
}

// Whether a group's gradient depends on its classes' gaps: where it does not, an infinite one must take no part.
template <class T>
__device__ __forceinline__ bool is_tilted(const Sweep& sweep, const GroupShare<T>& share) {
  return sweep.tilted && share.tilt != 0;
}

// The gradient of a group's class in the logit that the term sees; `tilted` is is_tilted() of the group.
template <class T>
__device__ __forceinline__ T slope_at(const GroupShare<T>& share, T exponent, bool tilted, T student, T teacher) {
  const T a = fma(student, exponent, -share.student_origin), b = fma(teacher, exponent, -share.teacher_origin);
  const T es = power(a), push = power(b) * share.teacher;
  if (!tilted) return fma(es, share.student, push);
  return (es > 0 ? es * fma(b - a, share.tilt, share.student) : es) + push;
}

// The same where classes of several groups take turns: `tilted` is the sweep's, and each class's group is asked.
template <class T>
__device__ __forceinline__ T slope_of_any(const GroupShare<T>& share, T exponent, bool tilted, T student, T teacher) {
  const T a = fma(student, exponent, -share.student_origin), b = fma(teacher, exponent, -share.teacher_origin);
  const T es = power(a), push = power(b) * share.teacher;
  if (!tilted) return fma(es, share.student, push);
  const T slope = share.tilt == 0 ? share.student : fma(b - a, share.tilt, share.student);
  return (es > 0 ? es * slope : es) + push;
}

// Adds the coefficients in a term's last group to those of its sweep.
template <class T>
__device__ __forceinline__ void add_rest(const Call& call, int t, const GroupShare<T>& share,
                                         GroupShare<T> (&rest)[kMaxTerms]) {
  if (t < call.sweeps) {
    rest[t] = share;
  } else {
    rest[0].student += share.student;
    rest[0].tilt += share.tilt;
    rest[0].teacher += share.teacher;
  }
}

// What the gradient sweep knows of its sample, in registers.
template <class T>
struct GradientNumbers {
  T exponent[kMaxTerms];
  bool tilted[kMaxTerms];
  GroupShare<T> rest[kMaxTerms];

  __device__ GradientNumbers(const Call& call, const Sample<T>& sample) {
#pragma unroll
    for (int t = 0; t < kMaxTerms; ++t) {
      if (t >= call.objective.terms) break;
      add_rest(call, t, sample.share[t][call.objective.term[t].groups() - 1], rest);
      if (t >= call.sweeps) continue;
      exponent[t] = static_cast<T>(call.sweep[t].exponent);
    }
#pragma unroll
    for (int t = 0; t < kMaxTerms; ++t) tilted[t] = t < call.sweeps && is_tilted(call.sweep[t], rest[t]);
  }
};

// The gradient of a vector of classes in the logits that the terms see: of at most `kSweeps` sweeps, none of them
// tilted unless `kTilted`.
template <int kSweeps, bool kTilted, class T, int kWidth>
__device__ __forceinline__ void vector_gradient(const GradientNumbers<T>& numbers, int sweeps, const T* s, const T* t,
                                                T* out) {
#pragma unroll
  for (int i = 0; i < kSweeps; ++i) {
    if (i > 0 && i >= sweeps) break;
    const auto add = [&](bool tilted) {
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        const T slope = slope_at(numbers.rest[i], numbers.exponent[i], tilted, s[w], t[w]);
        out[w] = i == 0 ? slope : out[w] + slope;
      }
    };
    if (kTilted && numbers.tilted[i]) add(true);
    else add(false);
  }
}

// The chain rule through a standardised logit. Nothing flows to masked classes.
template <class T>
__device__ __forceinline__ T chain(T gradient, T h, T level, T slope, T factor) {
  return h == minus_infinity<T>() ? T(0) : (gradient - level - h * slope) * factor;
}

// The same through a standardised sample; standardised classes have kernels of their own.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ Real<X> chained(const Block<X, kLayout, kUse>& block, Real<X> h, Real<X> gradient) {
  const Sample<Real<X>>& sample = block.sample();
  if (block.standardization() != Standardize::by_sample) return gradient;
  return chain(gradient, h, Real<X>(0), sample.slope, sample.factor);
}

// The gradient of the cross entropy but for its target.
template <class T>
__device__ __forceinline__ T softmax_gradient(T origin, T factor, T logit) {
  return softmax_power(logit, origin) * factor;
}
template <class T>
__device__ __forceinline__ T softmax_gradient(const Sample<T>& sample, T logit) {
  return softmax_gradient(sample.softmax_origin, sample.softmax_factor, logit);
}

// The sum over the piece, without entries, of gradient times standardised logit.
template <class X, Layout kLayout, Use kUse>
__device__ double product_sum(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  const int sweeps = block.call.sweeps;
  const GradientNumbers<T> numbers(block.call, block.sample());
  double total = 0;
  for (int v = block.member; v < block.vectors; v += block.team) {
    T s[block.kWidth], t[block.kWidth], out[block.kWidth], sum = 0;
    block.load(kStudent, v, s);
    block.load(kTeacher, v, t);
    standardize(block, kStudent, v, s);
    standardize(block, kTeacher, v, t);
    vector_gradient<kMaxTerms, true, T, block.kWidth>(numbers, sweeps, s, t, out);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) sum += s[w] == minus_infinity<T>() ? T(0) : out[w] * s[w];
    total += sum;
  }
  return total;
}

// The gradient, in the student's place, of at most `kSweeps` sweeps: of logits as they are if `kPlain`, and without
// tilt unless `kTilted`.
template <bool kPlain, int kSweeps, bool kTilted, class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void sweep_gradient(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  const Call& call = block.call;
  const Sample<T>& sample = block.sample();
  const int sweeps = call.sweeps;
  const bool entropy = call.objective.has_ce();
  const GradientNumbers<T> numbers(call, sample);
  in_turn<1>(block.member, block.vectors, block.team, [&](int v) {
    T raw[block.kWidth], t[block.kWidth], out[block.kWidth];
    block.load(kStudent, v, raw);
    block.load(kTeacher, v, t);
    if constexpr (kPlain) {
      vector_gradient<kSweeps, kTilted, T, block.kWidth>(numbers, sweeps, raw, t, out);
    } else {
      T s[block.kWidth];
#pragma unroll
      for (int w = 0; w < block.kWidth; ++w) s[w] = raw[w];
      standardize(block, kStudent, v, s);
      standardize(block, kTeacher, v, t);
      vector_gradient<kSweeps, kTilted, T, block.kWidth>(numbers, sweeps, s, t, out);
#pragma unroll
      for (int w = 0; w < block.kWidth; ++w) out[w] = chained(block, s[w], out[w]);
    }
    if (entropy) {
#pragma unroll
      for (int w = 0; w < block.kWidth; ++w) out[w] += softmax_gradient(sample, raw[w]);
    }
    block.store(kStudent, v, out);
  });
}

// Puts the gradient in the student's place; that of entries comes after.
template <class X, Layout kLayout, Use kUse>
__device__ void gradient(const Block<X, kLayout, kUse>& block) {
  if (!block.plain()) sweep_gradient<false, kMaxTerms, true>(block);
  else if (block.call.tilted() || block.call.sweeps > 1) sweep_gradient<true, kMaxTerms, true>(block);
  else sweep_gradient<true, 1, false>(block);
}

}  // namespace kdk::cuda
