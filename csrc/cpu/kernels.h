// What the CPU kernels read and write: load -> select -> reduce -> finalize -> apply -> store. No torch.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../common/matrix.h"
#include "../common/objective.h"

namespace kdk {

// The weight of each sample in the result, 0 for samples that do not count (are not valid).
struct SampleWeights {
  double factor = 1;              // of all
  const double* given = nullptr;  // of each, if any
  const int64_t* target = nullptr;
  int64_t ignore_index = 0;  // the target of samples that do not count

  double operator()(int64_t n) const {
    if (target && target[n] == ignore_index) return 0;
    return given ? given[n] * factor : factor;
  }
};

// Columns of the coefficients that APPLY takes of a sample: for each sweep and group the student's and the teacher's
// shift and those of Coefficients in their order, then, with a cross entropy, the target's coefficient and, where that
// sees other logits than the terms, the shift and coefficient of its softmax; last the sample's weight, which is in the
// coefficients: 0 of samples that do not count.
inline int64_t coefficients_size(const Objective& objective) { return stats_size(objective) + 1; }

// The logits of a call, float32 or 16 bit, and what they mean. Arrays that were not given are null.
struct Problem {
  Objective objective;
  Matrix student, teacher, gradient;
  int64_t classes = 0;            // that are compared
  int64_t gradient_classes = 0;   // that the gradient has: those beyond `classes` get 0
  bool gradient_is_zero = false;  // before anything is written
  int64_t samples = 0;
  int dims = 0;  // of the samples, merged where the strides allow
  int64_t sample_size[kMaxDims] = {};
  const int64_t* target = nullptr;
  SampleWeights weight;
  const double* moments = nullptr;  // where logits are standardised by class: count, mean, m2, of student, then teacher
  const float* coefficients = nullptr;  // that APPLY takes: those of finalize, with problem.weight as upstream gradient

  // Whether a sample counts. A sample that counted for finalize does without an upstream gradient of its own, too, if
  // its logits are in the statistics of others.
  bool valid(int64_t n) const {
    if (!coefficients) return weight(n) != 0;
    const int64_t columns = coefficients_size(objective);
    return coefficients[n * columns + columns - 1] != 0 && (moments || weight(n) != 0);
  }
};

// What FINALIZE gives of each sample, unweighted: the loss, then, if `parts`, the objective's parts.
struct Values {
  bool parts = false;
  int64_t columns = 1;
  double* of_samples = nullptr;  // one of both: of each sample, samples x columns, or
  double* totals = nullptr;      // their sums, weighted
};

// parallel_for(begin, end, grain, body) calls body(from, to) on threads of the caller's choice.
using ParallelFor = std::function<void(int64_t, int64_t, int64_t, const std::function<void(int64_t, int64_t)>&)>;

struct Parallel {
  ParallelFor run;
  int threads;
};

// Samples that count, the sum of their weights, and whether all weights and targets are right.
struct ValidSamples {
  int64_t count = 0;
  double weight = 0;
  bool right = true;
};

// One build of the kernels for one instruction set. All results are bitwise the same for any number of threads.
//
// Where logits are standardised by class, gradients are those for constant moments, and `sums` gets, for each class,
// the sums over samples of the gradient in the standardised logit (without the cross entropy's) and of its product with
// that logit, 2 x classes: what flows through mean and deviation, which class_norm_backward takes off.
struct Kernels {
  ValidSamples (*valid_samples)(const Problem&, const Parallel&);
  // All steps, a sample after the other: values and, if problem.gradient is there, the gradient.
  void (*fused)(const Problem&, const Values&, double* sums, const Parallel&);
  // The steps one by one. `selected` are the classes selected by rank, selected_size() a sample: sweep by sweep, best
  // first.
  void (*select)(const Problem&, int64_t* selected, const Parallel&);
  void (*reduce)(const Problem&, const int64_t* selected, float* stats, const Parallel&);
  void (*finalize)(const Problem&, const float* stats, const Values&, float* coefficients, const Parallel&);
  // By problem.coefficients. With sums of classes, over all processes, the gradient is not one for constant moments.
  void (*apply)(const Problem&, const int64_t* selected, const double* sums, const Parallel&);
  // These sums alone.
  void (*class_sums)(const Problem&, const int64_t* selected, double* sums, const Parallel&);
  // Count, mean and m2 of each class over the samples that count, without logits of -inf: 3 x classes numbers of the
  // student, then of the teacher.
  void (*class_moments)(const Problem&, const Parallel&, double* moments);
  // Makes problem.gradient, of the samples that count, the gradient in the student's logits, times a factor.
  void (*class_norm_backward)(const Problem&, const double* sums, double factor, const Parallel&);
  // problem.gradient *= factor, one factor for all samples or one a sample. A gradient of 0 stays 0 whatever the
  // factor, NaN and infinities included: it may be that of a sample that does not count, or of a class that is not
  // compared.
  void (*scale)(const Problem&, const double* factor, bool per_sample, const Parallel&);
};

// Instruction sets of this build, slowest first. -1 stands for the best that the CPU has.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };
std::vector<Isa> supported_isas();
Isa current_isa();
bool set_isa(int isa);

// Those of the current instruction set.
const Kernels& kernels();

}  // namespace kdk
