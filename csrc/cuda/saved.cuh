// What forward keeps of a sample so that its gradient can be computed later, in the arithmetic's type: its weight, the
// softmax's origin and inverse sum; where samples are standardised, the student's affine, the slope and the teacher's
// affine; for each group of each term both origins and the three coefficients. settle() writes all but the second part.
#pragma once

#include "samples.cuh"

namespace kdk::cuda {

constexpr int kSavedHeader = 3, kSavedStandardization = 7;

// The coefficients of a group, for a sample's factor of the gradient.
template <class T>
__device__ __forceinline__ GroupShare<T> saved_share(const T* saved, T weight) {
  return {saved[0], saved[1], saved[2] * weight, saved[3] * weight, saved[4] * weight};
}

// The factor of the cross entropy's gradient.
template <class T>
__device__ __forceinline__ T entropy_factor(const Call& call, T weight) {
  return static_cast<T>(call.objective.ce_slope(call.classes)) * weight;
}

template <class X, Layout kLayout, Use kUse>
__device__ void save_standardization(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  const Call& call = block.call;
  const Sample<T>& sample = block.sample();
  if (!call.saved || block.piece != 0 || block.member != 0 || sample.number < 0) return;
  T* saved = static_cast<T*>(call.saved) + sample.number * saved_size(call.objective) + kSavedHeader;
  saved[0] = sample.student.high;
  saved[1] = sample.student.factor;
  saved[2] = sample.student.offset;
  saved[3] = sample.slope;
  saved[4] = sample.teacher.high;
  saved[5] = sample.teacher.factor;
  saved[6] = sample.teacher.offset;
}

template <class T>
__device__ void read_standardization(const T* saved, Sample<T>& sample) {
  sample.student = {saved[0], saved[1], saved[2]};
  sample.slope = saved[3];
  sample.teacher = {saved[4], saved[5], saved[6]};
}

// Reads what the gradient of each of the block's samples takes; ends with a barrier.
template <class X, Layout kLayout, Use kUse>
__device__ void read_saved(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  const Call& call = block.call;
  const Objective& objective = call.objective;
  const bool by_sample = block.standardization() == Standardize::by_sample;
  if (block.thread < call.tiling.samples) {
    Sample<T>& sample = block.samples[block.thread];
    const T weight = static_cast<T>(sample.weight);
    const T* saved = static_cast<const T*>(call.saved) + max(sample.number, int64_t{0}) * saved_size(objective);
    sample.softmax_origin = sample.valid ? saved[1] : T(0);
    sample.entropy_factor = entropy_factor(call, weight);
    sample.softmax_factor = sample.valid ? saved[2] * sample.entropy_factor : T(0);
    saved += kSavedHeader;
    if (by_sample) {
      sample.student = sample.teacher = {T(0), T(1), T(0)};  // leaves its logits -inf
      sample.slope = T(0);
      if (sample.valid) read_standardization(saved, sample);
      sample.factor = sample.student.factor * weight;
      saved += kSavedStandardization;
    }
    for (int t = 0; t < objective.terms; ++t) {
      for (int g = 0; g < objective.term[t].groups(); ++g, saved += 5) {
        GroupShare<T>& share = sample.share[t][g];
        share = {T(0), T(0), T(0), T(0), T(0)};
        if (!sample.valid) continue;
        share = saved_share(saved, by_sample ? T(1) : weight);
      }
    }
  }
  __syncthreads();
}

}  // namespace kdk::cuda
