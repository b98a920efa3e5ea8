#include "kernels.cuh"

KDK_KERNELS(f64, double)
