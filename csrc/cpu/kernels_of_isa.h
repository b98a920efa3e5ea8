// The kernels of one instruction set (see simd.h): by channels or by rows (see by_channels).
#pragma once

#include "rows.h"

namespace KDK_NAMESPACE {
namespace {
void fused(const Problem& p, const Values& values, double* sums, const Parallel& parallel) {
  RowRunner(p, parallel).fused(values, sums);
}
}  // namespace
extern const Kernels kernels;
const Kernels kernels{nullptr, fused, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}
