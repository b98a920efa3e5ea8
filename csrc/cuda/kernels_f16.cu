#include "kernels.cuh"

KDK_KERNELS(f16, __half)
KDK_KERNELS_OF_USE(f16, __half)
