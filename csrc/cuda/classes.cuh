// Standardisation by class: how logits stream, and the moments of each class over the samples. A thread has a few
// classes, and goes through the samples of its block's stretch, several at a time, in registers. What it adds up is
// merged over the block, and then over the stretches, always in the same order.
#pragma once

#include "samples.cuh"
#include "sweeps.cuh"

namespace kdk::cuda {

// Samples of a thread at a time: of pixels 16 bytes of each class.
template <class X>
constexpr int kAtOnce = 16 / sizeof(X);

// A thread's logits of one side, as they are in memory, where rows have the classes of a sample next to one another and
// pixels the samples of a class.
template <class X, Layout kLayout>
struct Logits {
  static constexpr int kCount = kAtOnce<X>, kWords = 4 * kClassesOfThread;
  unsigned words[kWords];

  __device__ static constexpr int index(int i, int w) {
    return kLayout == Layout::rows ? i * kClassesOfThread + w : w * kCount + i;
  }
  __device__ Real<X> get(int i, int w) const {
    const int at = index(i, w);
    if constexpr (sizeof(X) == 8) return __hiloint2double(words[2 * at + 1], words[2 * at]);
    else if constexpr (sizeof(X) == 4) return __uint_as_float(words[at]);
    else if constexpr (std::is_same_v<X, __half>)
      return widen(__ushort_as_half(static_cast<unsigned short>(words[at / 2] >> 16 * (at % 2))));
    else return __uint_as_float(at % 2 ? words[at / 2] & 0xffff0000u : words[at / 2] << 16);
  }
  __device__ void set(int i, int w, X value) {
    const int at = index(i, w);
    if constexpr (sizeof(X) == 8) {
      words[2 * at] = __double2loint(value);
      words[2 * at + 1] = __double2hiint(value);
    } else if constexpr (sizeof(X) == 4) {
      words[at] = __float_as_uint(value);
    } else {
      const unsigned bits = reinterpret_cast<const unsigned short&>(value);
      words[at / 2] = at % 2 ? words[at / 2] | bits << 16 : bits;
    }
  }
  // Makes it 0.
  __device__ void clear(int i, int w) {
    const int at = index(i, w);
    if constexpr (sizeof(X) == 8) words[2 * at] = words[2 * at + 1] = 0;
    else if constexpr (sizeof(X) == 4) words[at] = 0;
    else words[at / 2] &= at % 2 ? 0xffffu : 0xffff0000u;
  }
  // Reads some bytes, and writes them: `which` of so many.
  template <class V>
  __device__ void read(int which, const X* from) {
    const V vector = __ldg(reinterpret_cast<const V*>(from));
    constexpr int kOf = sizeof(V) / sizeof(unsigned);
    words[which * kOf] = vector.x;
    words[which * kOf + 1] = vector.y;
    if constexpr (kOf == 4) {
      words[which * kOf + 2] = vector.z;
      words[which * kOf + 3] = vector.w;
    }
  }
  template <class V>
  __device__ void write(int which, X* to) const {
    constexpr int kOf = sizeof(V) / sizeof(unsigned);
    V vector;
    vector.x = words[which * kOf];
    vector.y = words[which * kOf + 1];
    if constexpr (kOf == 4) {
      vector.z = words[which * kOf + 2];
      vector.w = words[which * kOf + 3];
    }
    *reinterpret_cast<V*>(to) = vector;
  }
};

// What a block looks up of kPage samples at a time. Bits are of samples, 32 a word.
struct Page {
  int64_t offset[3][kPage];  // of the first logits of both sides, and of the gradient where there is one
  unsigned valid[kPage / 32];
  unsigned skipped[kPage / 32];           // there, but not valid
  unsigned follows[kPage / 32];           // next to its predecessor in memory; for pixels
  alignas(8) unsigned char order[kPage];  // places, of each 32 the valid ones first and those that are skipped last
};

// The thread's place: `column`, of the classes that its block has, and `row`, of the samples. Columns are next to one
// another in a warp where classes are in memory; where samples are, these are next to one another.
template <Layout kLayout>
struct ClassThread {
  static constexpr bool kRows = kLayout == Layout::rows;
  int columns, rows, column, row;
  int unit;  // of kClassesOfThread classes, overall

  __device__ explicit ClassThread(const Call& call) {
    const int thread = threadIdx.x;
    columns = call.tiling.team;
    rows = call.tiling.samples;
    column = kRows ? thread % columns : thread / rows;
    row = kRows ? thread / columns : thread % rows;
    unit = first_unit(call) + column;
  }

  // The unit of the block's first column.
  __device__ int first_unit(const Call& call) const {
    return static_cast<int>(blockIdx.x % call.tiling.pieces) * columns;
  }
  // Where a thread's part of a result is, for its class `w`: in other banks than its neighbours'.
  __device__ int part(int w) const { return w * blockDim.x + threadIdx.x; }
  // Merges the parts over the block's rows, and visits what becomes of them, a class of a unit each: visit(the unit,
  // which of its classes, the result).
  template <class V, class Merge, class Visit>
  __device__ void over_merged(const Call& call, V* parts, Merge merge, Visit visit) const {
    const int row_stride = kRows ? columns : 1, column_stride = kRows ? 1 : rows;
    for (int w = 0; w < kClassesOfThread; ++w)
      merge_rows(parts + w * blockDim.x, rows, row_stride, columns, column_stride, merge);
    for (int i = threadIdx.x; i < columns * kClassesOfThread; i += blockDim.x) {
      const int of_column = i % columns, w = i / columns;
      visit(first_unit(call) + of_column, w, parts[w * blockDim.x + of_column * column_stride]);
    }
  }
};

// Looks up the samples from `first` on; barriers must come before and after. counts(a sample's number, its place)
template <class Counts>
__device__ void look_up(const Call& call, int64_t first, Page& page, Counts counts) {
  for (int i = threadIdx.x; i < kPage; i += blockDim.x) {
    const int64_t number = first + i;
    const bool there = number < call.samples;
    int64_t offset[3] = {0, 0, 0}, left = there ? number : 0, inner = 0;
#pragma unroll 1
    for (int d = call.dims - 1; d >= 0; --d) {
      const int64_t next = d > 0 ? left / call.sample_size[d] : 0, at = left - next * call.sample_size[d];
      offset[kStudent] += at * call.student.sample_stride[d];
      offset[kTeacher] += at * call.teacher.sample_stride[d];
      if (call.gradient.data) offset[kGradient] += at * call.gradient.sample_stride[d];
      if (d == call.dims - 1) inner = at;
      left = next;
    }
    page.offset[kStudent][i] = offset[kStudent];
    page.offset[kTeacher][i] = offset[kTeacher];
    if (call.gradient.data) page.offset[kGradient][i] = offset[kGradient];
    const unsigned valid = __ballot_sync(kAllLanes, counts(there ? number : -1, i));
    const unsigned follows = __ballot_sync(kAllLanes, there && inner != 0);
    const unsigned skipped = __ballot_sync(kAllLanes, there) & ~valid, lower = (1u << i % 32) - 1;
    const int rank = valid >> i % 32 & 1     ? __popc(valid & lower)
                     : skipped >> i % 32 & 1 ? 31 - __popc(skipped & lower)
                                             : __popc(valid) + __popc(~valid & ~skipped & lower);
    page.order[i / 32 * 32 + rank] = static_cast<unsigned char>(i);
    if (i % 32 == 0) {
      page.valid[i / 32] = valid;
      page.skipped[i / 32] = skipped;
      page.follows[i / 32] = follows;
    }
  }
}

// Looks up one page after the other of the block's stretch, and visits it: look_up(first sample), visit(first sample).
template <class LookUp, class Visit>
__device__ __forceinline__ void over_pages(const Call& call, LookUp look_up, Visit visit) {
  const int64_t size = call.stretch * kPage, begin = blockIdx.x / call.tiling.pieces * size;
  const int64_t end = min(begin + size, call.samples);
  for (int64_t from = begin; from < end; from += kPage) {
    __syncthreads();
    look_up(from);
    __syncthreads();
    visit(from);
  }
}

// Visits the thread's share of a page's samples, of the valid ones or of those that are skipped, some at a time:
// visit(their places, which of them are there as bits).
template <class X, bool kSkipped = false, Layout kLayout, class Visit>
__device__ __forceinline__ void over_page(const ClassThread<kLayout>& own, const Page& page, Visit visit) {
  constexpr int kCount = kAtOnce<X>;
  const unsigned* chosen = kSkipped ? page.skipped : page.valid;
  int samples[kCount];
  if constexpr (kLayout == Layout::rows) {
    // A warp takes 32 samples; of its rows of threads each takes every so many.
    using Places = std::conditional_t<kCount == 8, uint64_t, std::conditional_t<kCount == 4, uint32_t, uint16_t>>;
    const int rows = 32 / own.columns;
#pragma unroll 1
    for (int first = threadIdx.x / 32 * 32; first < kPage; first += kClassThreads) {
      const int count = __popc(chosen[first / 32]);
#pragma unroll 1
      for (int done = own.row % rows * kCount; done < count; done += rows * kCount) {
        const int at = first + (kSkipped ? 32 - kCount - done : done);
        const Places places = *reinterpret_cast<const Places*>(page.order + at);
#pragma unroll
        for (int i = 0; i < kCount; ++i) samples[i] = places >> 8 * (kSkipped ? kCount - 1 - i : i) & 0xff;
        visit(samples, (1u << min(count - done, kCount)) - 1);
      }
    }
  } else {
#pragma unroll 1
    for (int first = own.row * kCount; first < kPage; first += 32 * kCount) {
      const unsigned there = chosen[first / 32] >> first % 32 & ((1u << kCount) - 1);
#pragma unroll
      for (int i = 0; i < kCount; ++i) samples[i] = first + i;
      if (there != 0) visit(samples, there);
    }
  }
}

// What of a sample's row is moved at once.
template <class X>
using RowVector = std::conditional_t<sizeof(X) == 2, uint2, uint4>;

// Whether some samples, of which `samples` has the places, are next to one another in memory.
template <int kCount>
__device__ __forceinline__ bool in_a_run(const unsigned* follows, const int* samples) {
  const unsigned others = ((1u << kCount) - 2) << samples[0] % 32;
  return (follows[samples[0] / 32] & others) == others;
}

// Whether all rows of a matrix are moved that way.
template <class X>
__device__ __forceinline__ bool in_row_vectors(const Call& call, const Matrix& matrix) {
  uintptr_t addresses = reinterpret_cast<uintptr_t>(matrix.data);
  for (int d = 0; d < call.dims; ++d) addresses |= matrix.sample_stride[d] * sizeof(X);
  return matrix.dtype == dtype_of<X> && matrix.class_stride == 1 && addresses % sizeof(RowVector<X>) == 0;
}

// Reads logits of some samples and of `count` classes from `first` on. What is beyond these classes is some logit.
// `in_vectors`: in_row_vectors() of the matrix.
template <class X, Layout kLayout>
__device__ __forceinline__ void fetch(const Matrix& matrix, bool in_vectors, const int64_t* offset,
                                      const unsigned* follows, const int* samples, int64_t first, int count,
                                      Logits<X, kLayout>& logits) {
  constexpr int kCount = kAtOnce<X>;
  const X* from = static_cast<const X*>(matrix.data) + first * matrix.class_stride;
  const bool same = matrix.dtype == dtype_of<X>;
  if constexpr (kLayout == Layout::rows) {
    if (in_vectors && count == kClassesOfThread) {
      using V = RowVector<X>;
      constexpr int kVectors = kClassesOfThread * sizeof(X) / sizeof(V);  // of a sample
#pragma unroll
      for (int i = 0; i < kCount * kVectors; ++i)
        logits.template read<V>(i, from + offset[samples[i / kVectors]] + i % kVectors * (sizeof(V) / sizeof(X)));
      return;
    }
  } else {
    // All of them in one run, where every class begins at a multiple of 16 bytes.
    from += offset[samples[0]];
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(from) | matrix.class_stride * sizeof(X);
    if (same && addresses % sizeof(uint4) == 0 && in_a_run<kCount>(follows, samples)) {
#pragma unroll
      for (int w = 0; w < kClassesOfThread; ++w)
        logits.template read<uint4>(w, from + min(w, count - 1) * matrix.class_stride);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    int64_t at = first * matrix.class_stride + offset[samples[i]];
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w, at += w < count ? matrix.class_stride : 0) {
      // Both sides have half precision or none: of different types, they are here in the arithmetic's.
      if (sizeof(X) == 2 || same) logits.set(i, w, static_cast<const X*>(matrix.data)[at]);
      else logits.set(i, w, narrow<X>(load_as<Real<X>>(matrix.data, matrix.dtype, at)));
    }
  }
}

__device__ __forceinline__ float ratio(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double ratio(double a, double b) { return a / b; }

// Samples that a thread adds up in the arithmetic's type before the sum goes on in double precision.
constexpr int kFew = 32;

// Moments of a class's last few logits: deviations from a shift, added up in the arithmetic's type. They are settled in
// double precision, and the shift moves on to the mean of all, so that the first logit may be far away from it.
template <class T>
struct FewMoments {
  T shift, sum, square;
  int count;

  // Before any logit has been seen the shift is -inf.
  __device__ void start(T from) {
    shift = from;
    sum = square = 0;
    count = 0;
  }
  __device__ void add(T of_sum, T of_square, int of_count) {
    sum += of_sum;
    square += of_square;
    count += of_count;
  }
  __device__ void add(T logit) {
    const bool masked = logit == minus_infinity<T>();
    const T away = masked ? T(0) : logit - shift;
    count += masked ? 0 : 1;
    sum += away;
    square = fma(away, away, square);
  }
  __device__ void settle(Moments<double>& all) {
    if (count == 0) return;
    // Of a mean that is rounded the squares are right all the same.
    const double few = count, moved = ratio(sum, static_cast<T>(count));
    const double m2 = fma(moved, fma(moved, few, -2.0 * sum), static_cast<double>(square));
    const double difference = (shift + moved) - all.mean, before = all.count;
    const double share = ratio(static_cast<T>(few), static_cast<T>(few + before));
    all.count = few + before;
    all.mean = fma(difference, share, all.mean);
    all.m2 += fma(difference * difference, before * share, m2);
    shift = static_cast<T>(all.mean);
  }
};

template <class X, Layout kLayout>
__device__ __forceinline__ void class_moments(const Call& call) {
  using T = Real<X>;
  constexpr int kCount = kAtOnce<X>;
  constexpr unsigned kAll = (1u << kCount) - 1;
  __shared__ Page page;
  __shared__ Moments<double> parts[kClassThreads * kClassesOfThread];
  __shared__ FewMoments<T> few[kClassThreads * kClassesOfThread];
  const ClassThread<kLayout> own(call);
  const int units = static_cast<int>(class_units(call.classes));
  const int64_t stretch = blockIdx.x / call.tiling.pieces;
  // Units of the student come first, then as many of the teacher.
  const auto side_of = [&](int unit) { return unit < units ? kStudent : kTeacher; };
  const int side = side_of(own.unit);
  const int first = (own.unit - side * units) * kClassesOfThread;
  const int count = min(static_cast<int>(call.classes) - first, kClassesOfThread);  // 0 or less: idle
  const Matrix matrix = side == kStudent ? call.student : call.teacher;
  const bool in_vectors = in_row_vectors<X>(call, call.student) && in_row_vectors<X>(call, call.teacher);
  FewMoments<T> moments[kClassesOfThread];
#pragma unroll
  for (int w = 0; w < kClassesOfThread; ++w) {
    parts[own.part(w)] = {};
    moments[w].start(minus_infinity<T>());
  }
  // By way of shared memory one class at a time, which takes few registers.
  const auto settle = [&] {
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w) few[own.part(w)] = moments[w];
#pragma unroll 1
    for (int w = 0; w < kClassesOfThread; ++w) few[own.part(w)].settle(parts[own.part(w)]);
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w) moments[w].start(few[own.part(w)].shift);
  };
  int room = 0;  // for samples until the next time; the first time is soon
  const auto counts = [&](int64_t number, int) {
    int64_t target;
    return number >= 0 && given_weight(call, number, target) != 0;
  };
  over_pages(
      call, [&](int64_t from) { look_up(call, from, page, counts); },
      [&](int64_t) {
        if (count <= 0) return;
        over_page<X>(own, page, [&](const int* samples, unsigned there) {
          Logits<X, kLayout> logits;
          fetch(matrix, in_vectors, page.offset[side], page.follows, samples, first, count, logits);
          const auto logit_at = [&](int i, int w) { return there >> i & 1 ? logits.get(i, w) : minus_infinity<T>(); };
#pragma unroll
          for (int w = 0; w < kClassesOfThread; ++w) {
            FewMoments<T>& of_class = moments[w];
            if (of_class.shift == minus_infinity<T>()) {
#pragma unroll
              for (int i = kCount - 1; i >= 0; --i)
                if (logit_at(i, w) != minus_infinity<T>()) of_class.shift = logit_at(i, w);
            }
            T sum = 0, square = 0;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              const T away = logits.get(i, w) - of_class.shift;
              sum += away;
              square = fma(away, away, square);
            }
            if (there == kAll && sum - sum == 0) {
              of_class.add(sum, square, kCount);
            } else {  // with care for what does not count
#pragma unroll
              for (int i = 0; i < kCount; ++i) of_class.add(logit_at(i, w));
            }
          }
          room -= kCount;
          if (room > 0) return;
          settle();
          room = kFew;
        });
      });
  settle();
  own.over_merged(
      call, parts, [](Moments<double>& into, const Moments<double>& other) { merge(into, other); },
      [&](int unit, int w, const Moments<double>& result) {
        const int of_class = (unit - side_of(unit) * units) * kClassesOfThread + w;
        if (of_class >= call.classes) return;
        double* out = call.sums + (stretch * 2 + side_of(unit)) * 3 * call.classes + of_class;
        out[0] = result.count;
        out[call.classes] = result.mean;
        out[2 * call.classes] = result.m2;
      });
}

}  // namespace kdk::cuda
