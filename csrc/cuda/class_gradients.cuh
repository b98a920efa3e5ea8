// Gradients of standardised classes, from what forward kept: their sums over the samples, which the chain rule takes,
// and what becomes of them in the logits. Threads keep what standardises their classes, and look up what a sample's
// gradient takes.
#pragma once

#include "classes.cuh"
#include "saved.cuh"

namespace kdk::cuda {

template <class T>
__device__ __forceinline__ const T* saved_of(const Call& call, int64_t number) {
  return static_cast<const T*>(call.saved) + number * saved_size(call.objective);
}

// The factor of the gradient of a sample that counts.
template <class T>
__device__ __forceinline__ T weight_of(const Call& call, int64_t number) {
  return static_cast<T>(static_cast<double>(saved_of<T>(call, number)[0]) * upstream(call, number));
}

// The gradient's coefficients in each sweep's last group.
template <class T>
__device__ __forceinline__ void read_rest(const Call& call, int64_t number, T weight,
                                          GroupShare<T> (&rest)[kMaxTerms]) {
  const T* saved = saved_of<T>(call, number) + kSavedHeader;
#pragma unroll
  for (int t = 0; t < kMaxTerms; ++t) {
    rest[t] = {};
    if (t >= call.objective.terms) continue;
    const int groups = call.objective.term[t].groups();
    add_rest(call, t, saved_share(saved + 5 * (groups - 1), weight), rest);
    saved += 5 * groups;
  }
}

// A sample's leading classes in a term by rank, as forward has written them.
__device__ __forceinline__ const int64_t* members_of(const Call& call, int term, int64_t number) {
  const int first = call.first_entry(0);
  return call.members + number * (call.first_entry(call.objective.terms) - first) + call.first_entry(term) - first;
}

// Visits the classes of a sample that may be in another group than the last one, or have a gradient of their own. A
// target that is none of the classes has made the sample's weight NaN, and no access follows it.
template <class Visit>
__device__ __forceinline__ void over_alone(const Call& call, int64_t number, Visit visit) {
  const auto visit_class = [&](int64_t of_class) {
    if (of_class >= 0 && of_class < call.classes) visit(static_cast<int>(of_class));
  };
  if (call.target_is_entry()) visit_class(call.target[number]);
  const int64_t* members = members_of(call, 0, number);
  const int count = call.first_entry(call.objective.terms) - call.first_entry(0);
#pragma unroll 1
  for (int i = 0; i < count; ++i) visit_class(members[i]);
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

// The gradient of such a class in the logit that the terms see.
template <class T>
__device__ __forceinline__ T slope_alone(const Call& call, int64_t number, T weight, int of_class, T s, T t) {
  const T* saved = saved_of<T>(call, number) + kSavedHeader;
  T slope = 0;
#pragma unroll 1
  for (int term = 0; term < call.objective.terms; ++term) {
    const Sweep& sweep = call.sweep[call.sweep_of(term)];
    const GroupShare<T> share = saved_share(saved + 5 * group_of(call, term, number, of_class), weight);
    slope += slope_at(share, static_cast<T>(sweep.exponent), is_tilted(sweep, share), s, t);
    saved += 5 * call.objective.term[term].groups();
  }
  return slope;
}

// What the gradients of a page's samples take.
template <class T>
struct PageGradients {
  T share[kMaxTerms][5][kPage];  // of each sweep's last group
  T softmax_origin[kPage], softmax_factor[kPage];
  unsigned alone[kPage][kClassesOfThread];  // classes of a warp's threads, or fewer, that are in other groups, as bits
};

// A thread's classes, and the samples of the page at hand.
template <class X, Layout kLayout>
struct ClassGradients {
  using T = Real<X>;
  static constexpr int kCount = kAtOnce<X>;

  const Call& call;
  const ClassThread<kLayout> own;
  Page& page;
  PageGradients<T>& numbers;
  int first, count;     // classes of the thread; 0 or less: idle
  int columns, column;  // classes of the block, and which of these is the thread's first
  bool in_vectors;      // see fetch()
  Affine<T> affine[2][kClassesOfThread];

  __device__ ClassGradients(const Call& call_, Page& page_, PageGradients<T>& numbers_)
      : call(call_), own(call_), page(page_), numbers(numbers_) {
    first = own.unit * kClassesOfThread;
    count = min(static_cast<int>(call.classes) - first, kClassesOfThread);
    columns = own.columns * kClassesOfThread;
    column = own.column * kClassesOfThread;
    in_vectors = in_row_vectors<X>(call, call.student) && in_row_vectors<X>(call, call.teacher) &&
                 (!call.gradient.data || in_row_vectors<X>(call, call.gradient));
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w)
      for (int side = kStudent; side <= kTeacher; ++side) affine[side][w] = affine_near(side, first + w);
  }

  // What standardises a class; beyond the last one, that one.
  __device__ Affine<T> affine_near(int side, int of_class) const {
    return affine_of_class<T>(call, side, min(of_class, static_cast<int>(call.classes) - 1));
  }

  // Where a sample's numbers are: threads of a warp that have different samples find them in different banks.
  __device__ static int slot_of(int sample) {
    if (kLayout == Layout::rows) return sample;
    return sample / (32 * kCount) * (32 * kCount) + sample % kCount * 32 + sample / kCount % 32;
  }
  // Which of the thread's classes of a sample are in other groups, as bits.
  __device__ unsigned alone_of(int slot) const {
    return numbers.alone[slot][column / 32] >> column % 32 & ((1u << kClassesOfThread) - 1);
  }

  // Looks up the page that begins at a sample.
  __device__ void look_up_page(int64_t from) const {
    look_up(call, from, page, [&](int64_t number, int i) {
      const int slot = slot_of(i);
      const bool valid = number >= 0 && saved_of<T>(call, number)[0] != 0;
      const T weight = valid ? weight_of<T>(call, number) : T(0);
      unsigned* alone = numbers.alone[slot];
      for (int word = 0; word < (columns + 31) / 32; ++word) alone[word] = 0;
      GroupShare<T> rest[kMaxTerms] = {};
      if (valid) {
        over_alone(call, number, [&](int of_class) {
          const int at = of_class - (first - column);
          if (at >= 0 && at < columns) alone[at / 32] |= 1u << at % 32;
        });
        read_rest(call, number, weight, rest);
      }
      if (call.objective.has_ce()) {
        const T* saved = saved_of<T>(call, valid ? number : 0);
        numbers.softmax_origin[slot] = valid ? saved[1] : T(0);
        numbers.softmax_factor[slot] = valid ? saved[2] * entropy_factor(call, weight) : T(0);
      }
#pragma unroll
      for (int k = 0; k < kMaxTerms; ++k) {
        numbers.share[k][0][slot] = rest[k].student_origin;
        numbers.share[k][1][slot] = rest[k].teacher_origin;
        numbers.share[k][2][slot] = rest[k].student;
        numbers.share[k][3][slot] = rest[k].tilt;
        numbers.share[k][4][slot] = rest[k].teacher;
      }
      return valid;
    });
  }

  // Visits the page's samples that count, some at a time: each(which one of these, its place, whether it is there,
  // which of its classes are alone as bits, the student's logits, these as the terms see them, the gradients in them),
  // after(their places, which of them are there as bits), and then their classes that are alone: lone(the sample's
  // place, its number, which of the thread's classes, the student's logit, as the terms see it, its gradient).
  template <class Each, class After, class Lone>
  __device__ __forceinline__ void over_slopes(int64_t from, Each each, After after, Lone lone) const {
    over_page<X>(own, page, [&](const int* samples, unsigned there) {
      Logits<X, kLayout> student, teacher;
      fetch(call.student, in_vectors, page.offset[kStudent], page.follows, samples, first, count, student);
      fetch(call.teacher, in_vectors, page.offset[kTeacher], page.follows, samples, first, count, teacher);
      unsigned others = 0;  // of 32 samples, those that have classes in other groups
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int slot = slot_of(samples[i]);
        const unsigned alone = alone_of(slot);
        if ((there >> i & 1) && alone) others |= 1u << samples[i] % 32;
        T raw[kClassesOfThread], s[kClassesOfThread], t[kClassesOfThread], slope[kClassesOfThread] = {};
#pragma unroll
        for (int w = 0; w < kClassesOfThread; ++w) {
          raw[w] = student.get(i, w);
          s[w] = apply(affine[kStudent][w], raw[w]);
          t[w] = apply(affine[kTeacher][w], teacher.get(i, w));
        }
#pragma unroll 1
        for (int k = 0; k < call.sweeps; ++k) {
          const GroupShare<T> share{numbers.share[k][0][slot], numbers.share[k][1][slot], numbers.share[k][2][slot],
                                    numbers.share[k][3][slot], numbers.share[k][4][slot]};
          const T exponent = static_cast<T>(call.sweep[k].exponent);
          const auto add = [&](bool tilted) {
#pragma unroll
            for (int w = 0; w < kClassesOfThread; ++w) slope[w] += slope_at(share, exponent, tilted, s[w], t[w]);
          };
          if (is_tilted(call.sweep[k], share)) add(true);
          else add(false);
        }
        each(i, samples[i], (there >> i & 1) != 0, alone, raw, s, slope);
      }
      after(samples, there);
      for (; others != 0; others &= others - 1) {
        const int sample = samples[0] / 32 * 32 + __ffs(others) - 1;
        for (unsigned alone = alone_of(slot_of(sample)); alone != 0; alone &= alone - 1) {
          const int w = __ffs(alone) - 1, of_class = first + w;
          const auto logit_of = [&](const Matrix& matrix, int side) {
            return load_as<T>(matrix.data, matrix.dtype, page.offset[side][sample] + of_class * matrix.class_stride);
          };
          const T raw = logit_of(call.student, kStudent), s = apply(affine_of_class<T>(call, kStudent, of_class), raw);
          const T t = apply(affine_of_class<T>(call, kTeacher, of_class), logit_of(call.teacher, kTeacher));
          lone(sample, from + sample, w, raw, s,
               slope_alone(call, from + sample, weight_of<T>(call, from + sample), of_class, s, t));
        }
      }
    });
  }
};

// Sums over the samples of the gradient, and of the gradient times the logit, as the terms see it.
template <class X, Layout kLayout>
__device__ __forceinline__ void class_sums(const Call& call) {
  using T = Real<X>;
  struct Sums {
    double gradient, product;
  };
  __shared__ Page page;
  __shared__ PageGradients<T> numbers;
  __shared__ Sums parts[kClassThreads * kClassesOfThread];
  const ClassGradients<X, kLayout> classes(call, page, numbers);
  const auto all = [&](int w) -> Sums& { return parts[classes.own.part(w)]; };
#pragma unroll
  for (int w = 0; w < kClassesOfThread; ++w) all(w) = {0, 0};
  const auto look_up = [&](int64_t from) { classes.look_up_page(from); };
  over_pages(call, look_up, [&](int64_t from) {
    if (classes.count <= 0) return;
    T few[kClassesOfThread] = {}, few_products[kClassesOfThread] = {};
    classes.over_slopes(
        from,
        [&](int, int, bool there, unsigned alone, const T*, const T* s, const T* slope) {
#pragma unroll
          for (int w = 0; w < kClassesOfThread; ++w) {
            // Nothing comes from masked classes.
            const bool counts = there && !(alone >> w & 1) && s[w] != minus_infinity<T>();
            few[w] += counts ? slope[w] : T(0);
            few_products[w] += counts ? slope[w] * s[w] : T(0);
          }
        },
        [](const int*, unsigned) {},
        [&](int, int64_t, int w, T, T s, T slope) {
          if (s == minus_infinity<T>()) return;
          all(w).gradient += slope;
          all(w).product += slope * s;
        });
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w) {
      all(w).gradient += few[w];
      all(w).product += few_products[w];
    }
  });
  classes.own.over_merged(
      call, parts,
      [](Sums& into, const Sums& other) {
        into.gradient += other.gradient;
        into.product += other.product;
      },
      [&](int unit, int w, const Sums& result) {
        const int of_class = unit * kClassesOfThread + w;
        if (of_class >= call.classes) return;
        double* out = call.sums + blockIdx.x / call.tiling.pieces * 2 * call.classes + of_class;
        out[0] = result.gradient;
        out[call.classes] = result.product;
      });
}

// Writes an element of the gradient. It is of type X, or both sides of different types.
template <class X, class T>
__device__ __forceinline__ void put(const Matrix& matrix, int64_t at, T value) {
  if constexpr (sizeof(X) == 2) static_cast<X*>(matrix.data)[at] = narrow<X>(value);
  else store_as(matrix.data, matrix.dtype, at, value);
}

// Writes what a thread has of a sample, of `count` classes.
template <class X>
__device__ __forceinline__ void put_row(const Matrix& matrix, bool in_vectors, int64_t offset, int64_t first, int count,
                                        const Real<X>* values) {
  const int64_t at = offset + first * matrix.class_stride;
  if (in_vectors && count == kClassesOfThread) {
    using V = RowVector<X>;
    constexpr int kOf = sizeof(V) / sizeof(X);
    alignas(sizeof(V)) X row[kClassesOfThread];
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w) row[w] = narrow<X>(values[w]);
#pragma unroll
    for (int i = 0; i < kClassesOfThread / kOf; ++i)
      reinterpret_cast<V*>(static_cast<X*>(matrix.data) + at)[i] = reinterpret_cast<const V*>(row)[i];
    return;
  }
#pragma unroll
  for (int w = 0; w < kClassesOfThread; ++w)
    if (w < count) put<X>(matrix, at + w * matrix.class_stride, values[w]);
}

// Writes what a thread has of some pixels, as fetch() reads it, of `count` classes.
template <class X>
__device__ __forceinline__ void put_pixels(const Call& call, const Page& page, const int* samples, unsigned there,
                                           int64_t first, int count, const Logits<X, Layout::pixels>& values) {
  constexpr int kCount = kAtOnce<X>;
  const Matrix& matrix = call.gradient;
  const int64_t* offset = page.offset[kGradient];
  X* const to = static_cast<X*>(matrix.data) + offset[samples[0]] + first * matrix.class_stride;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(to) | matrix.class_stride * sizeof(X);
  if (matrix.dtype == dtype_of<X> && matrix.sample_stride[call.dims - 1] == 1 && addresses % sizeof(uint4) == 0 &&
      there == (1u << kCount) - 1 && in_a_run<kCount>(page.follows, samples)) {
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w)
      if (w < count) values.template write<uint4>(w, to + w * matrix.class_stride);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!(there >> i & 1)) continue;
#pragma unroll
    for (int w = 0; w < kClassesOfThread; ++w)
      if (w < count) put<X>(matrix, offset[samples[i]] + (first + w) * matrix.class_stride, values.get(i, w));
  }
}

// The gradient in the student's logits.
template <class X, Layout kLayout>
__device__ __forceinline__ void class_gradient(const Call& call) {
  using T = Real<X>;
  __shared__ Page page;
  __shared__ PageGradients<T> numbers;
  const ClassGradients<X, kLayout> classes(call, page, numbers);
  const bool entropy = call.objective.has_ce();
  // The gradient has zeros in classes that are not compared.
  const int first = classes.first, written = min(static_cast<int>(call.gradient_classes) - first, kClassesOfThread);
  const auto chain_number = [&](AffineRow row, int of_class) {
    return affine_number<T>(call, row, min(of_class, static_cast<int>(call.classes) - 1));
  };
  T level[kClassesOfThread], slope_of[kClassesOfThread];
#pragma unroll
  for (int w = 0; w < kClassesOfThread; ++w) {
    level[w] = chain_number(kLevel, first + w);
    slope_of[w] = chain_number(kSlope, first + w);
  }
  const auto softmax_gradient_of = [&](int sample, T raw) {
    const int slot = classes.slot_of(sample);
    return softmax_gradient(numbers.softmax_origin[slot], numbers.softmax_factor[slot], raw);
  };
  const auto put_samples = [&](const int* samples, unsigned there, const Logits<X, kLayout>& out) {
    if constexpr (kLayout == Layout::pixels) put_pixels(call, page, samples, there, first, written, out);
  };
  const auto put_sample = [&](int sample, const T* values) {
    if constexpr (kLayout == Layout::rows)
      put_row<X>(call.gradient, classes.in_vectors, page.offset[kGradient][sample], first, written, values);
  };
  const auto put_zeros = [&](const int* samples, unsigned there) {
    const T zeros[kClassesOfThread] = {};
#pragma unroll
    for (int i = 0; i < classes.kCount; ++i)
      if (there >> i & 1) put_sample(samples[i], zeros);
    put_samples(samples, there, {});
  };
  const auto look_up = [&](int64_t from) { classes.look_up_page(from); };
  over_pages(call, look_up, [&](int64_t from) {
    if (written <= 0) return;
    over_page<X, true>(classes.own, page, put_zeros);
    if (classes.count <= 0) return over_page<X>(classes.own, page, put_zeros);
    Logits<X, kLayout> out;
    classes.over_slopes(
        from,
        [&](int i, int sample, bool there, unsigned, const T* raw, const T* s, const T* slope) {
          T values[kClassesOfThread];
#pragma unroll
          for (int w = 0; w < kClassesOfThread; ++w) {
            values[w] = chain(slope[w], s[w], level[w], slope_of[w], classes.affine[kStudent][w].factor);
            if (entropy) values[w] += softmax_gradient_of(sample, raw[w]);
            if (w >= classes.count) values[w] = 0;
            if constexpr (kLayout == Layout::pixels) out.set(i, w, narrow<X>(values[w]));
          }
          if (there) put_sample(sample, values);
        },
        [&](const int* samples, unsigned there) { put_samples(samples, there, out); },
        [&](int sample, int64_t number, int w, T raw, T s, T slope) {
          const int of_class = first + w;
          T value = chain(slope, s, chain_number(kLevel, of_class), chain_number(kSlope, of_class),
                          affine_number<T>(call, kFactor, of_class));
          if (entropy) {
            value += softmax_gradient_of(sample, raw);
            if (call.target[number] == of_class) value -= entropy_factor(call, weight_of<T>(call, number));
          }
          put<X>(call.gradient, page.offset[kGradient][sample] + of_class * call.gradient.class_stride, value);
        });
  });
}

}  // namespace kdk::cuda
