#include "kernels.cuh"

KDK_KERNELS(f64, double)
KDK_CLASS_KERNELS(f64, double)
