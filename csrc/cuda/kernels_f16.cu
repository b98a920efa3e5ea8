#include "kernels.cuh"

KDK_KERNELS(f16, __half)
