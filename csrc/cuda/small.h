// Parameters of the kernels that see no matrices.
#pragma once

#include <cstdint>

namespace kdk::cuda {

constexpr int kSumThreads = 256;  // of a block, at most
constexpr int kWeightsOfBlock = 4096;

// The sums of the columns of `rows` x `columns` numbers, a block each.
struct RowSum {
  const double* values;
  void* out;
  int64_t rows, columns;
  bool to_float;
};

// The sum of the weights of the samples that count, kWeightsOfBlock a block.
struct WeightSum {
  const int64_t* target;
  const double* weight;
  double* out;
  int64_t samples, ignore_index;
};

// What standardises each class, from its moments and, with `sums`, from those of its gradient.
struct Affines {
  const double* moments;
  const double* sums;
  void* table;
  int64_t classes;
  double correction, eps;
  bool to_float;
};

// Moments of each class and side, or sums of columns, from those of stretches of samples: some columns a block, whose
// threads share out the stretches.
struct StretchMerge {
  const double* partial;
  double* out;
  int64_t stretches, columns;
  int columns_of_block;
};

}  // namespace kdk::cuda
