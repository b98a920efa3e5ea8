// The row kernels for any CPU: 128-bit vectors (SSE2, NEON), which every 64-bit target has.
#include "row_includes.h"

#define KDK_VECTOR_BYTES 16

namespace kdk::baseline {
namespace {
// The order matters: each needs the one before.
// clang-format off
#include "simd.h"
#include "../evaluate.h"
#include "tile_kernels.h"
#include "standardize.h"
#include "row_kernels.h"
// clang-format on
}  // namespace
extern const RowKernels kernels;
const RowKernels kernels = kRowKernels;
}  // namespace kdk::baseline
