// The kernels for any CPU: 128-bit vectors (SSE2, NEON), which every 64-bit target has.
#include "kernel_includes.h"

#define KDK_VECTOR_BYTES 16

namespace kdk::baseline {
namespace {
#include "kernels_of_isa.h"
}  // namespace
extern const Kernels kernels;
const Kernels kernels = kKernels;
}  // namespace kdk::baseline
