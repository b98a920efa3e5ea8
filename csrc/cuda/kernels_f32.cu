#include "kernels.cuh"

KDK_KERNELS(f32, float)
KDK_KERNELS_OF_USE(f32, float)
