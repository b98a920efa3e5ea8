#include "kernels.cuh"

KDK_KERNELS(f32, float)
