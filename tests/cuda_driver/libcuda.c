// Stands in for the CUDA driver: writes down what is asked of it, a line a call, and does nothing. The function that
// the environment variable FAILS names returns an error. See test_cuda_driver.py.
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static CUcontext context = NULL;

static CUresult done(const char* name) {
  const char* fails = getenv("FAILS");
  return fails && strcmp(fails, name) == 0 ? CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES : CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES ? "too many resources requested for launch" : NULL;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return done("cuDeviceGet");
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* of_device, CUdevice device) {
  printf("primary context of device %d\n", device);
  *of_device = (CUcontext)(size_t)(device + 1);
  return done("cuDevicePrimaryCtxRetain");
}

CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = context;
  return done("cuCtxGetCurrent");
}

CUresult cuCtxSetCurrent(CUcontext current) {
  context = current;
  return done("cuCtxSetCurrent");
}

CUresult cuCtxGetDevice(CUdevice* device) {
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  *device = (CUdevice)(size_t)context - 1;
  return done("cuCtxGetDevice");
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return done("cuDeviceGetAttribute");
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* jit, void** jit_values, unsigned jits,
                           CUlibraryOption* options, void** values, unsigned count) {
  (void)jit, (void)jit_values, (void)jits, (void)options, (void)values, (void)count;
  printf("load %s\n", (const char*)code);  // the test's images are their names
  *library = (CUlibrary)code;
  return done("cuLibraryLoadData");
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  printf("find %s in %s\n", name, (const char*)library);
  *kernel = (CUkernel)strdup(name);
  return done("cuLibraryGetKernel");
}

CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  printf("up to %d bytes for %s on device %d\n", value, (const char*)kernel, device);
  return done("cuKernelSetAttribute");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction kernel, void** parameters, void** extra) {
  (void)extra;
  printf("launch %s grid %u %u %u block %u %u %u shared %u stream %zu parameter %d", (const char*)kernel,
         config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY, config->blockDimZ,
         config->sharedMemBytes, (size_t)config->hStream, *(const int*)parameters[0]);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) return CUDA_ERROR_INVALID_VALUE;
    const unsigned x = config->attrs[i].value.clusterDim.x, y = config->attrs[i].value.clusterDim.y;
    printf(" cluster %u %u %u", x, y, config->attrs[i].value.clusterDim.z);
  }
  printf("\n");
  return done("cuLaunchKernelEx");
}
