#include "kernels.cuh"

KDK_KERNELS(bf16, __nv_bfloat16)
