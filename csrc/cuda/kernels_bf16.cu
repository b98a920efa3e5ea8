#include "kernels.cuh"

KDK_KERNELS(bf16, __nv_bfloat16)
KDK_KERNELS_OF_USE(bf16, __nv_bfloat16)
