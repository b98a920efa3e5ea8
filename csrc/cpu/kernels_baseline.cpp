// The kernels for any CPU: 128-bit vectors (SSE2, NEON), which every 64-bit target has.
#include "kernel_includes.h"

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
#include "pixel_kernels.h"
#include "kernels_of_isa.h"
// clang-format on
}  // namespace
extern const Kernels kernels;
const Kernels kernels = kKernels;
}  // namespace kdk::baseline
