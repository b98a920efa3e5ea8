// APPLY: the gradient of each class, from its exponentials and its group's coefficients.
#pragma once

#include "../common/finalize.h"
#include "reduce.h"

namespace KDK_NAMESPACE {
namespace {

// The gradient of one vector of classes.
template <bool Tilt, bool Ce>
KDK_INLINE inline Vec gradient_at(Vec es, Vec et, Vec gap, Vec ce, const Coefficients<Vec>& by) {
  Vec gradient = es * by.student - et * by.teacher;
  if constexpr (Tilt)  // a class without probability has no gap to look at: it may be infinite
    gradient = es == 0 ? -et * by.teacher : es * (by.student + by.log_ratio * (gap - by.mean_gap)) - et * by.teacher;
  if constexpr (Ce) gradient += ce * by.ce;
  return gradient;
}

inline Coefficients<Vec> broadcast(const Coefficients<float>& by) {
  return {broadcast(by.student), broadcast(by.log_ratio), broadcast(by.mean_gap), broadcast(by.teacher),
          broadcast(by.ce)};
}

// Writes gradient(i) of the vectors of `count` classes to `out`, or adds it.
template <bool Add, class Gradient>
KDK_INLINE inline void write_gradient(int count, float* out, const Gradient& gradient) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, Add ? load(out + i) + gradient(i) : gradient(i));
  if (i == count) return;
  const Vec last = gradient(i);
  store_first(out + i, Add ? load_first(out + i, count - i, 0) + last : last, count - i);
}

// The gradient of a tile's classes from their exponentials, which are there for whole vectors.
template <bool Tilt, bool Ce, bool Add>
void apply_exps(const Exps& from, int count, const Coefficients<float>& coefficients, float* out) {
  const Coefficients<Vec> by = broadcast(coefficients);
  const Exps exps = from;
  write_gradient<Add>(count, out, [=](int i) KDK_INLINE {
    return gradient_at<Tilt, Ce>(load(exps.student + i), load(exps.teacher + i), Tilt ? load(exps.gap + i) : Vec{},
                                 Ce ? load(exps.ce + i) : Vec{}, by);
  });
}

// What turns logits of a group into their gradient.
struct GroupCoefficients {
  float student_shift, teacher_shift, inv_t;
  Coefficients<float> by;
};

// The same from the logits.
template <bool Tilt, bool Ce, bool Add>
void apply_logits(const float* student, const float* teacher, int count, const GroupCoefficients& of, float* out) {
  const Coefficients<Vec> by = broadcast(of.by);
  const Shifts shifts{broadcast(finite_shift(of.student_shift)), broadcast(finite_shift(of.teacher_shift)), of.inv_t};
  write_gradient<Add>(count, out, [=](int i) KDK_INLINE {
    const VectorExps<Tilt, Ce> exps(load_first(student + i, count - i, -INFINITY),
                                    load_first(teacher + i, count - i, -INFINITY), shifts);
    return gradient_at<Tilt, Ce>(exps.student, exps.teacher, exps.gap, exps.ce, by);
  });
}

// Both, by what they need: gaps, the cross entropy's softmax, and what is there to be added to.
using ApplyExps = void (*)(const Exps&, int, const Coefficients<float>&, float*);
using ApplyLogits = void (*)(const float*, const float*, int, const GroupCoefficients&, float*);
struct Apply {
  ApplyExps exps;
  ApplyLogits logits;
};
template <bool Tilt, bool Ce, bool Add>
constexpr Apply kApply{apply_exps<Tilt, Ce, Add>, apply_logits<Tilt, Ce, Add>};
inline const Apply& choose_apply(bool tilt, bool ce, bool add) {
  static constexpr Apply kChoices[] = {
      kApply<false, false, false>, kApply<false, false, true>, kApply<false, true, false>, kApply<false, true, true>,
      kApply<true, false, false>,  kApply<true, false, true>,  kApply<true, true, false>,  kApply<true, true, true>,
  };
  return kChoices[4 * tilt + 2 * ce + add];
}

}  // namespace
}  // namespace KDK_NAMESPACE
