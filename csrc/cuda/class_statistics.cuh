// Statistics of samples of standardised classes, and what becomes of them: for long enough rows, without ranks. Threads
// keep what standardises their classes while samples stream by; what a warp's classes add up to is kept in global
// memory, and merged.
//
// Standardised logits are small numbers: exponents count from 0, not from a maximum that would have to be found first,
// and those of the cross entropy from the target's. Where sums show that this will not do, or hold something that is no
// number, the sample is counted anew.
#pragma once

#include "classes.cuh"
#include "settle.cuh"

namespace kdk::cuda {

// Whether a column is in use.
__device__ __forceinline__ bool is_summed(const Call& call, int column) {
  if (column == 0) return call.objective.has_ce();
  const Sweep& sweep = call.sweep[(column - 1) / 4];
  const int of_sweep = (column - 1) % 4;
  return of_sweep < 2 || (of_sweep == 2 ? sweep.forward : sweep.reverse);
}

// The sums over a warp's lanes of some samples' numbers, which two halves of it share already: a lane gets
// that of sample lane * kCount / 32. Each step halves the numbers that a lane adds up.
template <int kCount, class T>
__device__ __forceinline__ T sum_over_lanes(T (&numbers)[kCount / 2]) {
  int distance = kWarp / 4;
#pragma unroll
  for (int left = kCount / 4; left > 0; left /= 2, distance /= 2) {
#pragma unroll
    for (int i = 0; i < left; ++i) numbers[i] = shared_sum(numbers[i], numbers[i + left], distance);
  }
#pragma unroll
  for (; distance > 0; distance /= 2) numbers[0] += __shfl_xor_sync(kAllLanes, numbers[0], distance);
  return numbers[0];
}

// Sums of each sample over the block's classes, a warp wide, but for its target.
template <class X, Layout kLayout>
__device__ __forceinline__ void class_statistics(const Call& call) {
  using T = Real<X>;
  constexpr int kCount = kAtOnce<X>;
  constexpr T kFarBelow = -1e30;  // leaves nothing of an exponential
  __shared__ Page page;
  __shared__ int targets[kPage];
  __shared__ T softmax_origin[kPage];
  const ClassThread<kLayout> own(call);
  const int first = own.unit * kClassesOfThread;
  const int count = min(static_cast<int>(call.classes) - first, kClassesOfThread);  // 0 or less: nothing but pads
  const bool entropy = call.objective.has_ce();
  const bool in_vectors = in_row_vectors<X>(call, call.student) && in_row_vectors<X>(call, call.teacher);
  Affine<T> affine[2][kClassesOfThread];
#pragma unroll
  for (int w = 0; w < kClassesOfThread; ++w) {
    for (int side = kStudent; side <= kTeacher; ++side) {
      affine[side][w] = {0, 0, kFarBelow};
      if (w < count) affine[side][w] = affine_of_class<T>(call, side, first + w);
    }
  }
  const auto look_up_page = [&](int64_t from) {
    look_up(call, from, page, [&](int64_t number, int i) {
      int64_t target = 0;
      const bool valid = number >= 0 && given_weight(call, number, target) != 0;
      targets[i] = valid && call.target_is_entry() ? static_cast<int>(target) : -1;
      if (entropy) {
        const int64_t at = page.offset[kStudent][i] + target * call.student.class_stride;
        const T logit = valid ? load_as<T>(call.student.data, call.student.dtype, at) : T(0);
        softmax_origin[i] = start(logit);
      }
      return valid;
    });
  };
  over_pages(call, look_up_page, [&](int64_t from) {
    over_page<X>(own, page, [&](const int* samples, unsigned there) {
      Logits<X, kLayout> student, teacher;
      // Pads read what is in the last classes, which may be masked, and shall hold a number.
      const int begin = min(first, static_cast<int>(call.classes) - 1), some = max(count, 1);
      fetch(call.student, in_vectors, page.offset[kStudent], page.follows, samples, begin, some, student);
      fetch(call.teacher, in_vectors, page.offset[kTeacher], page.follows, samples, begin, some, teacher);
      if (count < kClassesOfThread) {
#pragma unroll
        for (int w = 0; w < kClassesOfThread; ++w) {
          if (w < count) continue;
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            student.clear(i, w);
            teacher.clear(i, w);
          }
        }
      }
      // The sample whose sums the lane gets, if there is one.
      const int which = threadIdx.x % kWarp * kCount / kWarp;
      int own_sample = -1;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i == which && (there >> i & 1)) own_sample = samples[i];
      const bool writes = own_sample >= 0 && threadIdx.x % (kWarp / kCount) == 0;
      const auto write = [&](int column, T(&sums)[kCount / 2]) {
        const T sum = sum_over_lanes<kCount>(sums);
        const int64_t row = blockIdx.x % call.tiling.pieces * sum_columns(call) + column;
        if (writes) static_cast<T*>(call.piece_sums)[row * call.samples + from + own_sample] = sum;
      };
      // One direction at a time: registers are few.
#pragma unroll 1
      for (int direction = 0; direction < 2 * call.sweeps; ++direction) {
        const Sweep& sweep = call.sweep[direction / 2];
        const bool reverse = direction % 2;
        if (!(reverse ? sweep.reverse : sweep.forward)) continue;
        const T exponent = static_cast<T>(sweep.exponent);
        T sums[3][kCount / 2];
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
          T of_two[3][2] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = i + half * kCount / 2, hidden = targets[samples[at]] - first;
#pragma unroll
            for (int w = 0; w < kClassesOfThread; ++w) {
              const T a = apply(affine[kStudent][w], student.get(at, w)) * exponent;
              const T b = apply(affine[kTeacher][w], teacher.get(at, w)) * exponent;
              const T es = w == hidden ? T(0) : power(a), et = w == hidden ? T(0) : power(b);
              of_two[0][half] += es;
              of_two[1][half] += et;
              of_two[2][half] = fma(reverse ? es : et, b - a, of_two[2][half]);
            }
          }
#pragma unroll
          for (int column = 0; column < 3; ++column)
            sums[column][i] = shared_sum(of_two[column][0], of_two[column][1], kWarp / 2);
        }
        const int column = 1 + 4 * (direction / 2);
        write(column, sums[0]);
        write(column + 1, sums[1]);
        write(column + 2 + reverse, sums[2]);
      }
      if (!entropy) return;
      T sums[kCount / 2];
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        T of_two[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = i + half * kCount / 2, hidden = targets[samples[at]] - first;
          const T origin = softmax_origin[samples[at]];
#pragma unroll
          for (int w = 0; w < kClassesOfThread; ++w)
            of_two[half] += w == hidden || w >= count ? T(0) : softmax_power(student.get(at, w), origin);
        }
        sums[i] = shared_sum(of_two[0], of_two[1], kWarp / 2);
      }
      write(0, sums);
    });
  });
}

// Adds up a sample anew, by its team: from its maxima, and with care for classes without probability.
template <class X, Use kUse>
__device__ void count_anew(const Block<X, Layout::rows, kUse>& block, bool wanted, double* total) {
  using T = Real<X>;
  const Call& call = block.call;
  Sample<T>& sample = block.sample();
  const int classes = wanted ? static_cast<int>(call.classes) : 0;
  const auto over_classes = [&](auto visit) {
    for (int c = block.member; c < classes; c += block.team) {
      if (call.target_is_entry() && c == sample.target) continue;
      const auto logit_of = [&](int side) {
        const Matrix& matrix = block.matrix(side);
        return load_as<T>(matrix.data, matrix.dtype, sample.offset[side] + c * matrix.class_stride);
      };
      const T raw = logit_of(kStudent);
      visit(raw, standardized(block, kStudent, c, raw), standardized(block, kTeacher, c, logit_of(kTeacher)));
    }
  };
  T largest[3] = {minus_infinity<T>(), minus_infinity<T>(), minus_infinity<T>()};
  over_classes([&](T raw, T s, T t) {
    largest[kStudent] = larger(largest[kStudent], s);
    largest[kTeacher] = larger(largest[kTeacher], t);
    largest[2] = larger(largest[2], raw);
  });
  __syncthreads();
  block.template maximum<3>(largest);
  if (!wanted) return;
  if (block.member == 0)
    for (int i = 0; i < 3; ++i) sample.largest[i] = largest[i];
#pragma unroll
  for (int column = 0; column < kPartials; ++column) total[column] = 0;
  over_classes([&](T raw, T s, T t) {
    total[0] += softmax_power(raw, start(largest[2]));
#pragma unroll
    for (int k = 0; k < kMaxTerms; ++k) {
      if (k >= call.sweeps) break;
      const T exponent = static_cast<T>(call.sweep[k].exponent);
      const T a = fma(s, exponent, -origin_of(largest[kStudent], exponent));
      const T b = fma(t, exponent, -origin_of(largest[kTeacher], exponent));
      const T es = power(a), et = power(b), gap = b - a;
      double* sums = total + 1 + 4 * k;
      sums[0] += es;
      sums[1] += et;
      sums[2] += et > 0 ? et * gap : T(0);
      sums[3] += es > 0 ? es * gap : T(0);
    }
  });
}

// Whether a sum of exponentials can stand: NaN cannot.
__device__ __forceinline__ bool stands(double sum, double least, double most) { return sum >= least && sum <= most; }

// Merges the pieces of some samples, and settles them.
template <class X, Layout kLayout>
__device__ __forceinline__ void class_settle(const Call& call) {
  using T = Real<X>;
  Block<X, kLayout, Use::any> block(call, 0);
  if (!read_samples(block, place_of<kLayout>(call, blockIdx.x), false)) {
    if (block.thread < kWarp) settle_nothing(block);
    return;
  }
  Sample<T>& sample = block.sample();
  const int pieces = static_cast<int>(row_pieces(call)), columns = sum_columns(call);
  T target_logit = 0;
  if (call.tiling.entries > 0 && block.member == 0) {
    Entry<T>& entry = block.entries[0];
    entry = {};
    entry.of_class = -1;
    if (sample.valid) {
      const auto logit_of = [&](int side) {
        const Matrix& matrix = block.matrix(side);
        return load_as<T>(matrix.data, matrix.dtype, sample.offset[side] + sample.target * matrix.class_stride);
      };
      entry.of_class = sample.target;
      entry.raw = logit_of(kStudent);
      entry.student = standardized(block, kStudent, sample.target, entry.raw);
      entry.teacher = standardized(block, kTeacher, sample.target, logit_of(kTeacher));
    }
    resolve(call, block.entries, 0, sample.target, entry);
    target_logit = entry.raw;
  }
  double total[kPartials] = {};
  if (sample.valid) {
    const T* sums = static_cast<const T*>(call.piece_sums) + sample.number;
#pragma unroll 4
    for (int piece = block.member; piece < pieces; piece += block.team) {
#pragma unroll
      for (int column = 0; column < kPartials; ++column)
        if (column < columns && is_summed(call, column))
          total[column] += sums[(int64_t{piece} * columns + column) * call.samples];
    }
  }
  const auto put = [&] {
#pragma unroll
    for (int column = 0; column < kPartials; ++column)
      if (column < columns) block.put(column, total[column]);
    __syncthreads();
  };
  put();
  // Exponents up to about 20 are as good from 0 as from the largest.
  bool good = true;
  for (int k = 0; k < call.sweeps; ++k) {
    const double least = 1e-6, most = 4096.0 * static_cast<double>(call.classes);
    const auto of_sweep = [&](int column) { return block.total(block.own, 1 + 4 * k + column); };
    const double gaps = of_sweep(2) + of_sweep(3);
    good = good && stands(of_sweep(0), least, most) && stands(of_sweep(1), least, most) && gaps - gaps == 0;
  }
  if (call.objective.has_ce()) good = good && stands(block.total(block.own, 0), 0, 1e30);
  if (block.member == 0) {
    sample.largest[kStudent] = sample.largest[kTeacher] = 0;
    sample.largest[2] = target_logit;
  }
  const bool anew = sample.valid && !good;
  if (__syncthreads_or(anew)) {
    count_anew(block, anew, total);
    put();
  }
  if (block.thread < kWarp) settle(block);
}

}  // namespace kdk::cuda
