// Standardisation by class: moments of each class over the samples, and the sums that its gradient needs. Logits stream
// through registers: a thread has a few classes, and goes through the samples of its block's stretch, several at a
// time. What it adds up is merged over the block, and then over the stretches, always in the same order.
#pragma once

#include "samples.cuh"
#include "saved.cuh"
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
  // Reads some bytes: `which` of so many.
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
};

// What a block looks up of kPage samples at a time. Bits are of samples, 32 a word.
struct Page {
  int64_t offset[2][kPage];  // of the first logits of both sides
  unsigned valid[kPage / 32];
  unsigned follows[kPage / 32];  // next to its predecessor in memory; for pixels
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
    unit = static_cast<int>(blockIdx.x % call.tiling.pieces) * columns + column;
  }
};

// Looks up the samples from `first` on; barriers must come before and after. counts(a sample's number, its place)
template <Layout kLayout, class Counts>
__device__ void look_up(const Call& call, int64_t first, Page& page, Counts counts) {
  for (int i = threadIdx.x; i < kPage; i += blockDim.x) {
    const int64_t number = first + i;
    const bool there = number < call.samples;
    int64_t offset[2] = {0, 0}, left = there ? number : 0, inner = 0;
#pragma unroll 1
    for (int d = call.dims - 1; d >= 0; --d) {
      const int64_t next = d > 0 ? left / call.sample_size[d] : 0, at = left - next * call.sample_size[d];
      offset[kStudent] += at * call.student.sample_stride[d];
      offset[kTeacher] += at * call.teacher.sample_stride[d];
      if (d == call.dims - 1) inner = at;
      left = next;
    }
    page.offset[kStudent][i] = offset[kStudent];
    page.offset[kTeacher][i] = offset[kTeacher];
    const unsigned valid = __ballot_sync(kAllLanes, counts(there ? number : -1, i));
    const unsigned follows = __ballot_sync(kAllLanes, there && inner != 0);
    if (i % 32 == 0) {
      page.valid[i / 32] = valid;
      page.follows[i / 32] = follows;
    }
  }
}

// Visits the page's samples that count, of the thread's, some at a time: visit(their places, which of them are there as
// bits).
template <class X, Layout kLayout, class Visit>
__device__ __forceinline__ void over_page(const ClassThread<kLayout>& own, const Page& page, Visit visit) {
  constexpr int kCount = kAtOnce<X>;
  int samples[kCount];
  if constexpr (kLayout == Layout::rows) {
    // A warp takes 32 samples; of its rows of threads each takes every so many.
    const int rows = 32 / own.columns;
    const unsigned of_row = 0xffffffffu / ((2u << (rows - 1)) - 1) << own.row % rows;
#pragma unroll 1
    for (int first = threadIdx.x / 32 * 32; first < kPage; first += kClassThreads) {
      unsigned left = page.valid[first / 32] & of_row;
      while (left != 0) {
        const unsigned there = (1u << min(__popc(left), kCount)) - 1;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          samples[i] = first + max(__ffs(left) - 1, 0);
          left &= left - 1;
        }
        visit(samples, there);
      }
    }
  } else {
#pragma unroll 1
    for (int first = own.row * kCount; first < kPage; first += 32 * kCount) {
      const unsigned there = page.valid[first / 32] >> first % 32 & ((1u << kCount) - 1);
#pragma unroll
      for (int i = 0; i < kCount; ++i) samples[i] = first + i;
      if (there != 0) visit(samples, there);
    }
  }
}

// Reads logits of some samples and of `count` classes from `first` on. What is beyond these classes is some logit.
template <class X, Layout kLayout>
__device__ __forceinline__ void fetch(const Matrix& matrix, const int64_t* offset, const unsigned* follows,
                                      const int* samples, int64_t first, int count, Logits<X, kLayout>& logits) {
  constexpr int kCount = kAtOnce<X>;
  const X* from = static_cast<const X*>(matrix.data) + first * matrix.class_stride;
  const bool same = matrix.dtype == dtype_of<X>;
  if constexpr (kLayout == Layout::rows) {
    using V = std::conditional_t<sizeof(X) == 2, uint2, uint4>;
    constexpr int kVectors = kClassesOfThread * sizeof(X) / sizeof(V);  // of a sample
    uintptr_t addresses = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) addresses |= reinterpret_cast<uintptr_t>(from + offset[samples[i]]);
    if (same && matrix.class_stride == 1 && count == kClassesOfThread && addresses % sizeof(V) == 0) {
#pragma unroll
      for (int i = 0; i < kCount * kVectors; ++i)
        logits.template read<V>(i, from + offset[samples[i / kVectors]] + i % kVectors * (sizeof(V) / sizeof(X)));
      return;
    }
  } else {
    // All of them in one run, where every class begins at a multiple of 16 bytes.
    from += offset[samples[0]];
    const unsigned others = ((1u << kCount) - 2) << samples[0] % 32;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(from) | matrix.class_stride * sizeof(X);
    if (same && addresses % sizeof(uint4) == 0 && (follows[samples[0] / 32] & others) == others) {
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
  const int columns = own.columns * kClassesOfThread;
  Moments<double>* const all = parts + own.row * columns + own.column * kClassesOfThread;
  FewMoments<T>* const settled = few + threadIdx.x * kClassesOfThread;
  FewMoments<T> moments[kClassesOfThread];
#pragma unroll
  for (int w = 0; w < kClassesOfThread; ++w) {
    all[w] = {};
    moments[w].start(minus_infinity<T>());
  }
  // By way of shared memory one class at a time, which takes few registers.
  const auto settle = [&] {
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w) settled[w] = moments[w];
#pragma unroll 1
    for (int w = 0; w < kClassesOfThread; ++w) settled[w].settle(all[w]);
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w) moments[w].start(settled[w].shift);
  };
  int room = 0;  // for samples until the next time; the first time is soon
  const int64_t end = min((stretch + 1) * call.stretch * kPage, call.samples);
  for (int64_t from = stretch * call.stretch * kPage; from < end; from += kPage) {
    __syncthreads();
    look_up<kLayout>(call, from, page, [&](int64_t number, int) {
      int64_t target;
      return number >= 0 && given_weight(call, number, target) != 0;
    });
    __syncthreads();
    if (count <= 0) continue;
    over_page<X>(own, page, [&](const int* samples, unsigned there) {
      Logits<X, kLayout> logits;
      fetch(matrix, page.offset[side], page.follows, samples, first, count, logits);
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
  }
  settle();
  merge_rows(parts, own.rows, columns, [](Moments<double>& into, const Moments<double>& other) { merge(into, other); });
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    const int unit = own.unit - own.column + i / kClassesOfThread;
    const int of_class = (unit - side_of(unit) * units) * kClassesOfThread + i % kClassesOfThread;
    if (of_class >= call.classes) continue;
    double* out = call.sums + (stretch * 2 + side_of(unit)) * 3 * call.classes + of_class;
    out[0] = parts[i].count;
    out[call.classes] = parts[i].mean;
    out[2 * call.classes] = parts[i].m2;
  }
}

// What the gradients of a page's samples take.
template <class T>
struct PageGradients {
  T share[kMaxTerms][5][kPage];             // of each sweep's last group
  unsigned alone[kPage][kClassesOfThread];  // classes of a warp's threads, or fewer, that are in other groups, as bits
};

template <class T>
__device__ __forceinline__ GroupShare<T> saved_share(const T* saved, T weight) {
  return {saved[0], saved[1], saved[2] * weight, saved[3] * weight, saved[4] * weight};
}

// A sample's leading classes in a term by rank, as forward has written them.
__device__ __forceinline__ const int64_t* members_of(const Call& call, int term, int64_t number) {
  const int first = call.first_entry(0);
  return call.members + number * (call.first_entry(call.objective.terms) - first) + call.first_entry(term) - first;
}

// The group of a term that a sample's class is in.
__device__ __forceinline__ int group_of(const Call& call, int t, int64_t number, int64_t of_class) {
  const Term& term = call.objective.term[t];
  if (term.kind == PartitionKind::target && call.target[number] == of_class) return 0;
#pragma unroll 1
  for (int rank = 0; term.by_rank() && rank < term.k; ++rank)
    if (members_of(call, t, number)[rank] == of_class) return term.lead_group(rank);
  return term.groups() - 1;
}

// Sums over the samples of the gradient, and of the gradient times the logit, as the terms see it.
template <class X, Layout kLayout>
__device__ __forceinline__ void class_sums(const Call& call) {
  using T = Real<X>;
  constexpr int kCount = kAtOnce<X>;
  struct Sums {
    double gradient, product;
  };
  __shared__ Page page;
  __shared__ PageGradients<T> gradients;
  __shared__ Sums parts[kClassThreads * kClassesOfThread];
  const ClassThread<kLayout> own(call);
  const int64_t stretch = blockIdx.x / call.tiling.pieces;
  const int first = own.unit * kClassesOfThread;
  const int count = min(static_cast<int>(call.classes) - first, kClassesOfThread);  // 0 or less: idle
  const int columns = own.columns * kClassesOfThread, column = own.column * kClassesOfThread;
  Sums* const all = parts + own.row * columns + column;
  Affine<T> affine[2][kClassesOfThread];
#pragma unroll
  for (int w = 0; w < kClassesOfThread; ++w) {
    const int of_class = min(first + w, static_cast<int>(call.classes) - 1);
    for (int side = kStudent; side <= kTeacher; ++side)
      affine[side][w] = {affine_number<T>(call, side * kSide + kHigh, of_class),
                         affine_number<T>(call, side * kSide + kFactor, of_class),
                         affine_number<T>(call, side * kSide + kOffset, of_class)};
    all[w] = {0, 0};
  }
  // Where a sample's numbers are: threads of a warp that have different samples find them in different banks.
  const auto slot_of = [](int sample) {
    if (kLayout == Layout::rows) return sample;
    return sample / (32 * kCount) * (32 * kCount) + sample % kCount * 32 + sample / kCount % 32;
  };
  const int size = static_cast<int>(saved_size(call.objective));
  const auto saved_of = [&](int64_t number) { return static_cast<const T*>(call.saved) + number * size; };
  const int64_t end = min((stretch + 1) * call.stretch * kPage, call.samples);
  for (int64_t from = stretch * call.stretch * kPage; from < end; from += kPage) {
    __syncthreads();
    look_up<kLayout>(call, from, page, [&](int64_t number, int i) {
      const int slot = slot_of(i);
      const double given = number < 0 ? 0 : static_cast<double>(saved_of(number)[0]);
      const bool valid = given != 0;
      const T weight = valid ? static_cast<T>(given * upstream(call, number)) : T(0);
      unsigned* alone = gradients.alone[slot];
      for (int word = 0; word < (columns + 31) / 32; ++word) alone[word] = 0;
      const auto mark = [&](int64_t of_class) {
        const int64_t at = of_class - (first - column);
        if (at >= 0 && at < columns) alone[at / 32] |= 1u << at % 32;
      };
      const T* saved = saved_of(valid ? number : 0) + kSavedHeader;
      GroupShare<T> rest[kMaxTerms] = {};
#pragma unroll
      for (int t = 0; t < kMaxTerms; ++t) {
        if (t >= call.objective.terms || !valid) break;
        const Term& term = call.objective.term[t];
        const GroupShare<T> share = saved_share(saved + 5 * (term.groups() - 1), weight);
        saved += 5 * term.groups();
        if (t < call.sweeps) {
          rest[t] = share;
        } else {
          rest[0].student += share.student;
          rest[0].tilt += share.tilt;
          rest[0].teacher += share.teacher;
        }
        if (term.kind == PartitionKind::target) mark(call.target[number]);
#pragma unroll 1
        for (int rank = 0; term.by_rank() && rank < term.k; ++rank) mark(members_of(call, t, number)[rank]);
      }
#pragma unroll
      for (int k = 0; k < kMaxTerms; ++k) {
        gradients.share[k][0][slot] = rest[k].student_origin;
        gradients.share[k][1][slot] = rest[k].teacher_origin;
        gradients.share[k][2][slot] = rest[k].student;
        gradients.share[k][3][slot] = rest[k].tilt;
        gradients.share[k][4][slot] = rest[k].teacher;
      }
      return valid;
    });
    __syncthreads();
    if (count <= 0) continue;
    T few[kClassesOfThread] = {}, few_products[kClassesOfThread] = {};
    const auto alone_of = [&](int slot) {
      return gradients.alone[slot][column / 32] >> column % 32 & ((1u << kClassesOfThread) - 1);
    };
    over_page<X>(own, page, [&](const int* samples, unsigned there) {
      Logits<X, kLayout> student, teacher;
      fetch(call.student, page.offset[kStudent], page.follows, samples, first, count, student);
      fetch(call.teacher, page.offset[kTeacher], page.follows, samples, first, count, teacher);
      unsigned others = 0;  // of 32 samples, those that have classes in other groups
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int slot = slot_of(samples[i]);
        const unsigned alone = alone_of(slot);
        if ((there >> i & 1) && alone) others |= 1u << samples[i] % 32;
        T s[kClassesOfThread], t[kClassesOfThread], slope[kClassesOfThread];
#pragma unroll
        for (int w = 0; w < kClassesOfThread; ++w) {
          s[w] = apply(affine[kStudent][w], student.get(i, w));
          t[w] = apply(affine[kTeacher][w], teacher.get(i, w));
        }
#pragma unroll
        for (int k = 0; k < kMaxTerms; ++k) {
          if (k > 0 && k >= call.sweeps) break;
          const GroupShare<T> share{gradients.share[k][0][slot], gradients.share[k][1][slot],
                                    gradients.share[k][2][slot], gradients.share[k][3][slot],
                                    gradients.share[k][4][slot]};
          const T exponent = static_cast<T>(call.sweep[k].exponent);
          const auto add = [&](bool tilted) {
#pragma unroll
            for (int w = 0; w < kClassesOfThread; ++w) {
              const T of_sweep = slope_at(share, exponent, tilted, s[w], t[w]);
              slope[w] = k == 0 ? of_sweep : slope[w] + of_sweep;
            }
          };
          if (call.sweep[k].tilted) add(true);
          else add(false);
        }
#pragma unroll
        for (int w = 0; w < kClassesOfThread; ++w) {
          // Nothing comes from masked classes.
          const bool counts = (there >> i & 1) && !(alone >> w & 1) && s[w] != minus_infinity<T>();
          few[w] += counts ? slope[w] : T(0);
          few_products[w] += counts ? slope[w] * s[w] : T(0);
        }
      }
      for (; others != 0; others &= others - 1) {
        const int sample = samples[0] / 32 * 32 + __ffs(others) - 1;
        const int64_t number = from + sample;
        const T* saved = saved_of(number);
        const T weight = static_cast<T>(static_cast<double>(saved[0]) * upstream(call, number));
        for (unsigned alone = alone_of(slot_of(sample)); alone != 0; alone &= alone - 1) {
          const int w = __ffs(alone) - 1;
          const int of_class = first + w;
          const auto standardized_of = [&](const Matrix& matrix, int side) {
            const int row = side * kSide;
            return apply(
                Affine<T>{affine_number<T>(call, row + kHigh, of_class),
                          affine_number<T>(call, row + kFactor, of_class),
                          affine_number<T>(call, row + kOffset, of_class)},
                load_as<T>(matrix.data, matrix.dtype, page.offset[side][sample] + of_class * matrix.class_stride));
          };
          const T s = standardized_of(call.student, kStudent), t = standardized_of(call.teacher, kTeacher);
          if (s == minus_infinity<T>()) continue;
          T slope = 0;
          int groups = 0;
#pragma unroll 1
          for (int term = 0; term < call.objective.terms; ++term) {
            const Sweep& sweep = call.sweep[call.sweep_of(term)];
            const int group = groups + group_of(call, term, number, of_class);
            slope += slope_at(saved_share(saved + kSavedHeader + 5 * group, weight), static_cast<T>(sweep.exponent),
                              sweep.tilted, s, t);
            groups += call.objective.term[term].groups();
          }
          all[w].gradient += slope;
          all[w].product += slope * s;
        }
      }
    });
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w) {
      all[w].gradient += few[w];
      all[w].product += few_products[w];
    }
  }
  merge_rows(parts, own.rows, columns, [](Sums& into, const Sums& other) {
    into.gradient += other.gradient;
    into.product += other.product;
  });
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    const int of_class = first - column + i;
    if (of_class >= call.classes) continue;
    double* out = call.sums + stretch * 2 * call.classes + of_class;
    out[0] = parts[i].gradient;
    out[call.classes] = parts[i].product;
  }
}

}  // namespace kdk::cuda
