// Steps 1 to 3 of samples of few classes that are side by side in memory: a thread each, in registers. Each sweep reads
// the logits again, which the L1 cache has since the first. Of standardised classes step 3 is in class_lanes.cuh.
#pragma once

#include "saved.cuh"
#include "sweeps.cuh"

namespace kdk::cuda {

// What standardises a class, in shared memory.
template <class T>
struct alignas(16) ClassRow {
  Affine<T> affine[2];
  T level, slope;
};

// Reads that of all classes, of the table's rows those before `end`, by a block that is a warp.
template <class T>
__device__ __forceinline__ void read_classes(const Call& call, AffineRow end, ClassRow<T>* rows) {
  static_assert(sizeof(ClassRow<T>) == kAffineRows * sizeof(T));
  const int classes = static_cast<int>(call.classes);
  for (int i = threadIdx.x; i < end * classes; i += kWarp)
    reinterpret_cast<T*>(rows + i % classes)[i / classes] = affine_number<T>(call, i / classes, i % classes);
  __syncwarp();
}

// A thread's sample. Its classes are in up to three groups: the one at `single`, those in `leading`, and the rest.
template <class X, Use kUse>
struct Lane {
  using T = Real<X>;
  static constexpr bool kRanks = kUse != Use::simple, kStandardized = kUse == Use::any;

  const Call& call;
  const ClassRow<T>* rows;  // of standardised classes
  const X *student, *teacher;
  X* gradient;
  double weight;
  int target;
  int single = -1;       // the class that is a group of its own; -1 for none
  uint64_t leading = 0;  // a bit a class

  __device__ T raw_at(int c) const { return widen(__ldg(student + c * call.student.class_stride)); }
  __device__ T student_at(int c) const { return seen(kStudent, c, raw_at(c)); }
  __device__ T teacher_at(int c) const {
    return seen(kTeacher, c, widen(__ldg(teacher + c * call.teacher.class_stride)));
  }
  // A logit as the term sees it.
  __device__ T seen(int side, int c, T logit) const {
    if constexpr (kStandardized) return apply(rows[c].affine[side], logit);
    return logit;
  }
  __device__ void put(int c, T value) const { gradient[c * call.gradient.class_stride] = narrow<X>(value); }

  __device__ void put_zeros(int first, int end) const {
    for (int c = first; c < end; ++c) put(c, T(0));
  }

  // visit(first class, how many as a constant), up to kSummed of them.
  template <class Visit>
  __device__ void over_groups(Visit visit) const {
    in_groups<kSummed>(0, static_cast<int>(call.classes), 1, visit);
  }

  // visit(first class, how many as a constant, the student's logits, the teacher's, a bit for each class that leads)
  template <class Visit>
  __device__ void over_logits(Visit visit) const {
    over_groups([&](int first, auto count) {
      T s[count.value], t[count.value];
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
        s[i] = student_at(first + i);
        t[i] = teacher_at(first + i);
      }
      visit(first, count, s, t, kRanks ? static_cast<unsigned>(leading >> first) : 0u);
    });
  }

  // visit(the student's logit as it is)
  template <class Visit>
  __device__ void over_raw(Visit visit) const {
    over_groups([&](int first, auto count) {
      T raw[count.value];
#pragma unroll
      for (int i = 0; i < count.value; ++i) raw[i] = raw_at(first + i);
#pragma unroll
      for (int i = 0; i < count.value; ++i) visit(raw[i]);
    });
  }

  // visit(class, student's logit, teacher's, whether it leads)
  template <class Visit>
  __device__ void over_classes(Visit visit) const {
    over_logits([&](int first, auto count, const T* s, const T* t, unsigned leads) {
#pragma unroll
      for (int i = 0; i < count.value; ++i) visit(first + i, s[i], t[i], (leads >> i & 1) != 0);
    });
  }

  // Finds the groups of a term.
  __device__ void partition(const Term& term) {
    if (term.kind == PartitionKind::target) single = target;
    if (kRanks && (!kStandardized || term.by_rank())) rank(term.k, term.largest ? T(1) : T(-1), has_single(term));
  }

  // Finds the k classes that lead, of equals the first, and takes the best one apart where that is asked for.
  __device__ void rank(int k, T sign, bool apart) {
    T best[kMostLaneLeads];  // in order
    for (T& value : best) value = minus_infinity<T>();
    over_groups([&](int first, auto count) {
      T t[count.value];
#pragma unroll
      for (int i = 0; i < count.value; ++i) t[i] = sign * teacher_at(first + i);
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
        T value = t[i] == t[i] ? t[i] : minus_infinity<T>();
#pragma unroll
        for (T& place : best) {
          const T lower = smaller(place, value);
          place = larger(place, value);
          value = lower;
        }
      }
    });
    T bound = best[0];
    int left = 0;  // of the classes that equal the k-th
#pragma unroll
    for (int i = 0; i < kMostLaneLeads; ++i) bound = i < k ? best[i] : bound;
#pragma unroll
    for (int i = 0; i < kMostLaneLeads; ++i) left += i < k && best[i] == bound;
    over_groups([&](int first, auto count) {
      T t[count.value];
#pragma unroll
      for (int i = 0; i < count.value; ++i) t[i] = sign * teacher_at(first + i);
      unsigned leads = 0;
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
        const bool last = t[i] == bound && left > 0;
        left -= last;
        const bool first_of_all = apart && single < 0 && t[i] == best[0];
        if (first_of_all) single = first + i;
        leads |= !first_of_all && (t[i] > bound || last) ? 1u << i : 0u;
      }
      leading |= uint64_t{leads} << first;
    });
  }

  // Writes the classes that lead by rank: a class's is the number of those that are better, or equal and before it.
  __device__ void write_members(int64_t number, const Term& term) const {
    const T sign = term.largest ? T(1) : T(-1);
    uint64_t all = leading;
    if (has_single(term)) all |= uint64_t{1} << single;
    for (uint64_t left = all; left != 0; left &= left - 1) {
      const int c = __ffsll(left) - 1;
      const T own = sign * teacher_at(c);
      int rank = 0;
      for (uint64_t others = all; others != 0; others &= others - 1) {
        const int other = __ffsll(others) - 1;
        const T value = sign * teacher_at(other);
        rank += value > own || (value == own && other < c);
      }
      call.members[number * term.k + rank] = c;
    }
  }

  // Whether a term's first group is one class.
  __device__ static bool has_single(const Term& term) { return term.groups() > 1 && term.group_end(0) == 1; }

  __device__ GroupStats<double> single_statistics(T exponent) const {
    GroupStats<double> stats;
    if (single < 0) return stats;
    stats.student_origin = static_cast<double>(student_at(single)) * exponent;
    stats.teacher_origin = static_cast<double>(teacher_at(single)) * exponent;
    stats.student_sum = single_sum(stats.student_origin);
    stats.teacher_sum = single_sum(stats.teacher_origin);
    return stats;
  }

  // Statistics of the last group and of those that lead, origins in log2. `largest` are both groups' largest logits.
  __device__ void statistics(T exponent, const T (&largest)[2][2], GroupStats<double> (&stats)[2]) const {
    T origin[2][2];
#pragma unroll
    for (int g = 0; g <= kRanks; ++g) {
#pragma unroll
      for (int side = kStudent; side <= kTeacher; ++side) origin[g][side] = origin_of(largest[g][side], exponent);
      stats[g].student_origin = largest[g][kStudent] * exponent;
      stats[g].teacher_origin = largest[g][kTeacher] * exponent;
    }
    over_logits([&](int first, auto count, const T* s, const T* t, unsigned leads) {
      T sum[2][4] = {};
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
        const bool of_leading = kRanks && (leads >> i & 1) != 0;
        const T student_origin = of_leading ? origin[1][kStudent] : origin[0][kStudent],
                teacher_origin = of_leading ? origin[1][kTeacher] : origin[0][kTeacher];
        const T a = fma(s[i], exponent, -student_origin), b = fma(t[i], exponent, -teacher_origin), gap = b - a;
        const bool counts = first + i != single;
        const T es = counts ? power(a) : T(0), et = counts ? power(b) : T(0);
#pragma unroll
        for (int g = 0; g <= kRanks; ++g) {
          const bool here = !kRanks || of_leading == (g == 1);
          sum[g][0] += here ? es : T(0);
          sum[g][1] += here ? et : T(0);
          sum[g][2] += here && et > 0 ? et * gap : T(0);
          if (call.sweep[0].reverse) sum[g][3] += here && es > 0 ? es * gap : T(0);
        }
      }
#pragma unroll
      for (int g = 0; g <= kRanks; ++g) {
        stats[g].student_sum += sum[g][0];
        stats[g].teacher_sum += sum[g][1];
        stats[g].teacher_gap += sum[g][2];
        stats[g].student_gap += sum[g][3];
      }
    });
  }

  __device__ GroupShare<T> share(const GroupStats<double>& stats, const GroupCoefficients<double>& by,
                                 double factor) const {
    return {static_cast<T>(start(stats.student_origin)), static_cast<T>(start(stats.teacher_origin)),
            static_cast<T>(by.student * factor) * from_rounded<T>(stats.student_origin),
            static_cast<T>(by.tilt * factor), static_cast<T>(-by.teacher * factor)};
  }

  // The loss of a sample; writes its gradient or, of standardised classes, what that takes, where it is asked for.
  __device__ double step(int64_t number) {
    const Objective& objective = call.objective;
    const Term& term = objective.term[0];
    partition(term);
    const int rest = term.groups() - 1;
    const bool apart = has_single(term);
    const T exponent = static_cast<T>(call.sweep[0].exponent);
    T largest[2][2];
    for (auto& of_group : largest) of_group[kStudent] = of_group[kTeacher] = minus_infinity<T>();
    over_classes([&](int c, T s, T t, bool leads) {
#pragma unroll
      for (int g = 0; g <= kRanks; ++g) {
        const bool here = c != single && (!kRanks || leads == (g == 1));
        largest[g][kStudent] = here ? larger(largest[g][kStudent], s) : largest[g][kStudent];
        largest[g][kTeacher] = here ? larger(largest[g][kTeacher], t) : largest[g][kTeacher];
      }
    });
    GroupStats<double> stats[2];
    statistics(exponent, largest, stats);
    if (term.group_size(rest, call.classes) == 1)
      count_exactly(stats[0], largest[0][kStudent], largest[0][kTeacher], exponent);
    // Results of the last group, of the first one, which may be those that lead, and of those that lead behind it.
    constexpr int kRest = 0, kFirst = 1, kLeading = kRanks ? 2 : 1;
    TermResult<double> result;
    result.loss = 0;
    evaluate_group(term, rest, stats[0], call.classes, 1.0, result, kRest);
    GroupStats<double> first;
    if (rest > 0) {
      if constexpr (kRanks) {
        if (rest == 2 && term.group_size(1, call.classes) == 1)
          count_exactly(stats[1], largest[1][kStudent], largest[1][kTeacher], exponent);
        if (rest == 2) evaluate_group(term, 1, stats[1], call.classes, 1.0, result, kLeading);
        first = stats[1];
      }
      if (apart) first = single_statistics(exponent);
      evaluate_group(term, 0, first, call.classes, 1.0, result, kFirst);
      if (kRanks && rest == 2) add_masses<3>(term, result);
      else add_masses<2>(term, result);
    }
    double loss = result.loss * term.scale;
    Sample<T> softmax;
    T softmax_inverse = 0;
    softmax.softmax_origin = 0;
    if (objective.has_ce()) {
      const T student_target = raw_at(target);
      T most = larger(largest[0][kStudent], student_target);
      if constexpr (kStandardized) {
        most = student_target;
        over_raw([&](T raw) { most = larger(most, raw); });
      } else if constexpr (kRanks) {
        most = larger(larger(most, largest[1][kStudent]), student_at(max(single, 0)));
      }
      softmax.softmax_origin = start(most);
      double sum = 0;
      over_raw([&](T raw) { sum += softmax_power(raw, softmax.softmax_origin); });
      const double above_target = static_cast<double>(softmax.softmax_origin) - student_target;
      if (call.classes > 1) loss += objective.ce_weight * (log(sum) + above_target);
      softmax.entropy_factor = static_cast<T>(objective.ce_slope(call.classes) * weight);
      softmax_inverse = static_cast<T>(inverse(sum));
      softmax.softmax_factor = softmax.entropy_factor * softmax_inverse;
    }
    if constexpr (kStandardized) {
      if (!call.saved) return loss * weight;
      T* saved = static_cast<T*>(call.saved) + number * saved_size(objective);
      saved[0] = static_cast<T>(weight);
      saved[1] = softmax.softmax_origin;
      saved[2] = softmax_inverse;
      const auto save = [&](int g, const GroupStats<double>& of, int slot) {
        reinterpret_cast<GroupShare<T>*>(saved + kSavedHeader)[g] = share(of, result.group[slot], 1.0);
      };
      if (rest > 0) save(0, first, kFirst);
      if (rest == 2) save(1, stats[1], kLeading);
      save(rest, stats[0], kRest);
      if (term.by_rank()) write_members(number, term);
    } else if (call.gradient.data) {
      const bool tilted = call.sweep[0].tilted;
      const GroupShare<T> others = share(stats[0], result.group[kRest], weight);
      GroupShare<T> of_leading;
      if constexpr (kRanks) {
        const GroupCoefficients<double>&one = result.group[kFirst], &other = result.group[kLeading];
        of_leading = share(
            stats[1],
            {apart ? other.student : one.student, apart ? other.tilt : one.tilt, apart ? other.teacher : one.teacher},
            weight);
      }
      T of_single = 0;
      if (single >= 0) {
        const GroupShare<T> own = share(first, result.group[kFirst], weight);
        of_single = slope_of_any(own, exponent, tilted, student_at(single), teacher_at(single));
      }
      over_classes([&](int c, T s, T t, bool leads) {
        GroupShare<T> of_class = others;
        if (kRanks && leads) of_class = of_leading;
        T slope = slope_of_any(of_class, exponent, tilted, s, t);
        if (c == single) slope = of_single;
        if (objective.has_ce()) {
          slope += softmax_gradient(softmax, s);
          if (c == target) slope -= softmax.entropy_factor;
        }
        put(c, slope);
      });
      put_zeros(static_cast<int>(call.classes), static_cast<int>(call.gradient_classes));
    }
    return loss * weight;
  }
};

// Visits the samples of a block of them, which a warp takes, some a lane: visit(a sample's number, its logits of both
// sides, its gradient).
template <class X, class Visit>
__device__ __forceinline__ void over_samples(const Call& call, int64_t block, Visit visit) {
  const Place place = place_of<Layout::pixels>(call, block);
  const int own = threadIdx.x;
  const Matrix& matrix = own == kTeacher ? call.teacher : own == kGradient ? call.gradient : call.student;
  const int64_t offset = own <= kGradient && matrix.data ? offset_of(call, matrix, place.first) : 0;
  const X* student = static_cast<const X*>(call.student.data) + __shfl_sync(kAllLanes, offset, kStudent);
  const X* teacher = static_cast<const X*>(call.teacher.data) + __shfl_sync(kAllLanes, offset, kTeacher);
  X* gradient = static_cast<X*>(call.gradient.data) + __shfl_sync(kAllLanes, offset, kGradient);
  const int64_t step = call.gradient.sample_stride[call.dims - 1];
#pragma unroll 1
  for (int at = own; at < place.count; at += kWarp)
    visit(place.first + at, student + at, teacher + at, gradient + at * step);
}

template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void lanes(const Call& call) {
  using T = Real<X>;
  const ClassRow<T>* rows = nullptr;
  if constexpr (kUse == Use::any) {
    __shared__ ClassRow<T> of_classes[kMostLaneClasses];
    read_classes(call, kLevel, of_classes);
    rows = of_classes;
  }
  const double factor = result_factor(call);
  double losses = 0;
  over_samples<X>(call, blockIdx.x, [&](int64_t number, const X* student, const X* teacher, X* gradient) {
    int64_t target = 0;
    const double weight = given_weight(call, number, target);
    Lane<X, kUse> lane{call, rows, student, teacher, gradient, weight * factor, static_cast<int>(target)};
    double loss = 0;
    if (weight != 0) loss = lane.step(number);
    else if (call.gradient.data) lane.put_zeros(0, static_cast<int>(call.gradient_classes));
    else if (call.saved) static_cast<T*>(call.saved)[number * saved_size(call.objective)] = 0;
    if (call.each) static_cast<T*>(call.losses)[number] = static_cast<T>(loss);
    losses += loss;
  });
  if (call.each) return;
  for (int distance = 16; distance > 0; distance /= 2) losses += __shfl_xor_sync(kAllLanes, losses, distance);
  if (threadIdx.x == 0) static_cast<double*>(call.losses)[blockIdx.x] = losses;
}

}  // namespace kdk::cuda
