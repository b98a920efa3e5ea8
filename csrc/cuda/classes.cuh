// Standardisation by class: moments of each class over the samples, and the sums that its gradient needs. A block takes
// a piece of the classes, a thread each, and a stretch of the blocks of samples; stretches are added up in order.
#pragma once

#include "backward.cuh"

namespace kdk::cuda {

// Calls visit(student slot, teacher slot) for every sample of the block, at the thread's own class.
template <class X, Layout kLayout, Use kUse, class Visit>
__device__ void over_samples(const Block<X, kLayout, kUse>& block, Visit visit) {
  const int samples = block.call.tiling.samples;
  for (int i = 0; i < samples; ++i) {
    // Pixels of a class are next to one another: threads take them in turn, each from another memory bank.
    const int sample = block.kRows ? i : (i + block.thread) % samples;
    if (!block.samples[sample].valid) continue;
    const int at = (sample - block.own) * block.pitch + (block.samples[sample].lead + block.thread) * block.stride;
    visit(block.tile[kStudent][at], block.tile[kTeacher][at]);
  }
}

// Deviations are from the first logit of the stretch, and added up in double precision.
template <class X>
struct RunningMoments {
  double origin = 0, count = 0, sum = 0, square = 0;

  __device__ void add(X logit) {
    if (logit == minus_infinity<X>()) return;
    if (count == 0) origin = logit;
    const double away = static_cast<double>(logit) - origin;
    count += 1;
    sum += away;
    square = fma(away, away, square);
  }
  __device__ void write(double* out, int64_t step) const {
    const double some = count > 1 ? count : 1, m2 = square - sum * (sum / some);
    out[0] = count;
    out[step] = origin + sum / some;
    out[2 * step] = m2 > 0 ? m2 : m2 == m2 ? 0 : m2;
  }
};

template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void class_moments(const Call& call) {
  const int pieces = call.tiling.pieces;
  Block<X, kLayout, kUse> block(call, static_cast<int>(blockIdx.x % pieces));
  const int64_t stretch = blockIdx.x / pieces, first = stretch * call.stretch;
  const int64_t last = min(first + call.stretch, blocks_of_samples<kLayout>(call));
  RunningMoments<X> moments[2];
  for (int64_t i = first; i < last; ++i) {
    const Place place = place_of<kLayout>(call, i);
    if (read_samples(block, place, false)) {
      copy_in(block, place);
      if (block.thread < block.count)
        over_samples(block, [&](X& student, X& teacher) {
          moments[kStudent].add(student);
          moments[kTeacher].add(teacher);
        });
    }
    __syncthreads();
  }
  if (block.thread >= block.count) return;
  double* out = call.sums + stretch * 6 * call.classes + block.begin + block.thread;
  moments[kStudent].write(out, call.classes);
  moments[kTeacher].write(out + 3 * call.classes, call.classes);
}

// Puts gradient and gradient times logit, as the terms see it, in the place of the logits.
template <class X, Layout kLayout, Use kUse>
__device__ void gradient_and_product(const Block<X, kLayout, kUse>& block) {
  const GradientNumbers<X> numbers(block.call, block.sample());
  for (int v = block.member; v < block.vectors; v += block.team) {
    X s[block.kWidth], t[block.kWidth], out[block.kWidth];
    block.load(kStudent, v, s);
    block.load(kTeacher, v, t);
    standardize(block, kStudent, v, s);
    standardize(block, kTeacher, v, t);
    vector_gradient<kMaxTerms, true, X, block.kWidth>(numbers, block.call.sweeps, s, t, out);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) {
      const bool masked = s[w] == minus_infinity<X>();  // nothing comes from masked classes
      t[w] = masked ? X(0) : out[w] * s[w];
      out[w] = masked ? X(0) : out[w];
    }
    block.store(kStudent, v, out);
    block.store(kTeacher, v, t);
  }
  __syncthreads();
  for (int e = block.member; e < block.call.tiling.entries; e += block.team) {
    const Entry<X>& entry = block.entries[e];
    if (!entry.counts || entry.student == minus_infinity<X>()) continue;
    const int slot = block.slot_of(entry.of_class - block.begin);
    const X slope = entry_gradient(block.call, block.sample(), entry);
    block.slot(kStudent, slot) = slope;
    block.slot(kTeacher, slot) = slope * entry.student;
  }
  __syncthreads();
}

template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void class_sums(const Call& call) {
  const int pieces = call.tiling.pieces;
  Block<X, kLayout, kUse> block(call, static_cast<int>(blockIdx.x % pieces));
  const int64_t stretch = blockIdx.x / pieces, first = stretch * call.stretch;
  const int64_t last = min(first + call.stretch, blocks_of_samples<kLayout>(call));
  double sum = 0, product = 0;
  for (int64_t i = first; i < last; ++i) {
    if (prepare(block, place_of<kLayout>(call, i))) {
      gradient_and_product(block);
      if (block.thread < block.count)
        over_samples(block, [&](X& slope, X& times_logit) {
          sum += slope;
          product += times_logit;
        });
    }
    __syncthreads();
  }
  if (block.thread >= block.count) return;
  double* out = call.sums + stretch * 2 * call.classes + block.begin + block.thread;
  out[0] = sum;
  out[call.classes] = product;
}

}  // namespace kdk::cuda
