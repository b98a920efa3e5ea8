// What the CPU kernels read and write. No torch.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../matrix.h"
#include "../objective.h"

namespace kdk {

// The weight of each sample in the result, 0 for samples that do not count.
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

// Everything a call reads and writes. Arrays that were not asked for are null.
struct Problem {
  Objective objective;
  Matrix student, teacher, gradient;
  int64_t classes = 0;            // that are compared
  bool gradient_is_zero = false;  // before anything is written
  int64_t gradient_classes = 0;   // that the gradient has: those beyond `classes` get 0
  int64_t samples = 0;
  int dims = 0;  // of the samples, merged where the strides allow
  int64_t sample_size[kMaxDims] = {};
  const int64_t* target = nullptr;
  bool double_arithmetic = false;
  SampleWeights weight;
  // Out, one of both: of each sample, unweighted, or the weighted sums over samples. First the loss, then, if `parts`,
  // the objective's parts.
  double* values = nullptr;
  double* totals = nullptr;
  bool parts = false;
  // What backward needs of forward, if asked for:
  // Float or double, saved_size() a sample, its weight first. By pixels: all weights, and no more.
  void* saved = nullptr;
  int64_t* members = nullptr;  // leading classes by rank, members_size() a sample
  // Where logits are standardised by class:
  const double* moments = nullptr;  // count, mean and M2 of each class, of the student, then of the teacher
  const double* sums = nullptr;     // see class_sums; backward needs them
  double* sums_out = nullptr;       // the same, for forward to write
};

// Whether samples are next to one another in memory, in lines of the last dimension's size.
inline bool side_by_side(const Problem& p, const Matrix& matrix) { return matrix.sample_stride[p.dims - 1] == 1; }

// Whether the logits of both sides lie in planes, one a class, as those of NCHW.
inline bool in_planes(const Problem& p) {
  const auto lies_so = [&](const Matrix& m) { return m.class_stride != 1 && side_by_side(p, m); };
  return p.dims > 0 && p.samples > 0 && lies_so(p.student) && lies_so(p.teacher);
}

// Which kernels serve a call: those that take many samples at a time, a lane each (pixel_kernels.h), or those that take
// one sample after the other (row_kernels.h). The first serve
//   - logits in planes;
//   - few classes of any strides, transposed on the way (transpose.h): vectors along a row would be mostly empty.
// Forward and backward must find the same, so that it depends on shapes and strides alone.
inline bool by_pixels(const Problem& p) {
  constexpr int64_t few_classes = 64;
  constexpr int64_t exact_in_float = int64_t{1} << 24;  // classes are compared as numbers of T
  if (p.dims == 0 || p.samples == 0) return false;
  return p.classes <= few_classes || (p.classes < exact_in_float && in_planes(p));
}

// Numbers a sample, or all samples, get: see Problem::values.
inline int64_t value_count(const Problem& p) { return 1 + (p.parts ? p.objective.parts() : 0); }

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
ValidSamples valid_samples(const Problem& problem, const Parallel& parallel);

// Steps 1 and 2 of every sample and, if problem.gradient.data is set, step 3 while the sample is in cache. Where logits
// are standardised by class, step 3 is for a batch of which no other process has a share.
void forward(const Problem& problem, const Parallel& parallel);

// Step 3 alone, from problem.saved and problem.members.
void backward(const Problem& problem, const Parallel& parallel);

// Count, mean and M2 of each class over the samples of weight > 0, without logits of -inf: 3 x classes numbers of the
// student, then of the teacher.
void class_moments(const Problem& problem, const Parallel& parallel, double* moments);

// Sums over the samples, for each class, of the gradient in the standardised logit and of its product with that logit:
// 2 x classes. backward needs them, over all processes, where logits are standardised by class.
void class_sums(const Problem& problem, const Parallel& parallel, double* sums);

// gradient *= factor, one factor for all samples or one a sample. A gradient of 0 stays 0 whatever the factor, NaN and
// infinities included: it may be that of a sample that does not count, or of a class that is not compared.
void scale(const Problem& problem, const double* factor, bool per_sample, const Parallel& parallel);

// Instruction sets of this build, slowest first. -1 stands for the best that the CPU has.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };
std::vector<Isa> supported_isas();
Isa current_isa();
bool set_isa(int isa);

// One build of the kernels for one instruction set.
struct Kernels {
  ValidSamples (*valid_samples)(const Problem&, const Parallel&);
  void (*forward)(const Problem&, const Parallel&);
  void (*backward)(const Problem&, const Parallel&);
  void (*class_moments)(const Problem&, const Parallel&, double*);
  void (*class_sums)(const Problem&, const Parallel&, double*);
  void (*scale)(const Problem&, const double*, bool, const Parallel&);
};

}  // namespace kdk
