// The kernels for any CPU: 128-bit vectors (SSE2, NEON), which every 64-bit target has.
#include "includes.h"

#define KDK_NAMESPACE kdk::baseline
#define KDK_VECTOR_BYTES 16
#include "kernels_of_isa.h"
