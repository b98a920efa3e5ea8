#include "driver.h"

#include <cuda.h>
#include <dlfcn.h>

#include <array>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

// The compiled kernels, one image of all targets a type of logits: made by nvcc, included as they are.
#define KDK_IMAGE(name, path)                                                                                    \
  __asm__(".pushsection .rodata\n.balign 64\nkdk_image_" #name ":\n.incbin \"" path "\"\n.byte 0\n.popsection"); \
  extern "C" __attribute__((visibility("hidden"))) const unsigned char kdk_image_##name[];
KDK_IMAGE(f32, KDK_IMAGES "/f32.fatbin")
KDK_IMAGE(f64, KDK_IMAGES "/f64.fatbin")
KDK_IMAGE(f16, KDK_IMAGES "/f16.fatbin")
KDK_IMAGE(bf16, KDK_IMAGES "/bf16.fatbin")
KDK_IMAGE(common, KDK_IMAGES "/common.fatbin")

namespace kdk::cuda {

namespace {

using Simulate = void (*)(const char* kernel, int64_t blocks, int64_t threads, int64_t cluster, int64_t shared_bytes,
                          const void* parameters, int64_t bytes, const Buffer* buffers, int64_t buffer_count);
Simulate simulate = nullptr;
Device simulated_device;

// The functions of the driver that launching takes.
struct Driver {
  decltype(&::cuGetErrorString) error_string;
  decltype(&::cuDeviceGet) device_of;
  decltype(&::cuDevicePrimaryCtxRetain) primary_context;
  decltype(&::cuCtxGetCurrent) current_context;
  decltype(&::cuCtxSetCurrent) set_context;
  decltype(&::cuCtxGetDevice) current_device;
  decltype(&::cuDeviceGetAttribute) attribute;
  decltype(&::cuLibraryLoadData) load;
  decltype(&::cuLibraryGetKernel) find;
  decltype(&::cuKernelSetAttribute) set_attribute;
  decltype(&::cuLaunchKernelEx) launch;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
    get(library, "cuGetErrorString", error_string);
    get(library, "cuDeviceGet", device_of);
    get(library, "cuDevicePrimaryCtxRetain", primary_context);
    get(library, "cuCtxGetCurrent", current_context);
    get(library, "cuCtxSetCurrent", set_context);
    get(library, "cuCtxGetDevice", current_device);
    get(library, "cuDeviceGetAttribute", attribute);
    get(library, "cuLibraryLoadData", load);
    get(library, "cuLibraryGetKernel", find);
    get(library, "cuKernelSetAttribute", set_attribute);
    get(library, "cuLaunchKernelEx", launch);
  }

  template <class F>
  static void get(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string("the CUDA driver is too old: it has no ") + name);
  }

  void check(CUresult result, const std::string& what) const {
    if (result == CUDA_SUCCESS) return;
    const char* text = nullptr;
    error_string(result, &text);
    throw std::runtime_error(what + ": " + (text ? text : "unknown error"));
  }

  int number(CUdevice device, CUdevice_attribute which) const {
    int value = 0;
    check(attribute(&value, which, device), "CUDA device attribute");
    return value;
  }

  CUdevice device() const {
    CUdevice device = 0;
    check(current_device(&device), "current CUDA device");
    return device;
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

const unsigned char* image_of(const std::string& kernel) {
  const auto ends_with = [&](const std::string& end) {
    return kernel.size() >= end.size() && kernel.compare(kernel.size() - end.size(), end.size(), end) == 0;
  };
  if (ends_with("_bf16")) return kdk_image_bf16;
  if (ends_with("_f16")) return kdk_image_f16;
  if (ends_with("_f32")) return kdk_image_f32;
  if (ends_with("_f64")) return kdk_image_f64;
  return kdk_image_common;
}

// A kernel of the device's, ready for as much shared memory as the device has unless it takes none at launch: some of
// it is then its own.
CUkernel kernel_of(const std::string& name, CUdevice device, bool takes_shared) {
  static std::mutex mutex;
  static std::map<const unsigned char*, CUlibrary> libraries;
  static std::map<std::pair<std::string, int>, CUkernel> kernels;
  const std::lock_guard lock(mutex);
  const auto known = kernels.find({name, device});
  if (known != kernels.end()) return known->second;
  const unsigned char* image = image_of(name);
  if (!libraries.count(image)) {
    CUlibrary library;
    driver().check(driver().load(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0), "loading CUDA kernels");
    libraries[image] = library;
  }
  CUkernel kernel;
  driver().check(driver().find(&kernel, libraries[image], name.c_str()), name);
  if (!takes_shared) return kernels[{name, device}] = kernel;
  const int shared = driver().number(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  driver().check(driver().set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared, kernel, device), name);
  return kernels[{name, device}] = kernel;
}

}  // namespace

std::vector<int> targets() {
  std::vector<int> all;
  std::istringstream list(KDK_CUDA_TARGETS);
  for (int target; list >> target;) all.push_back(target);
  return all;
}

// Binaries run on devices of the same major version; the newest target is there as PTX too.
bool serves(int capability) {
  int newest = 0;
  for (const int target : targets()) {
    if (target / 10 == capability / 10 && target <= capability) return true;
    newest = target > newest ? target : newest;
  }
  return capability >= newest;
}

bool simulated() { return simulate != nullptr; }

void use_device(int index) {
  CUcontext context = nullptr;
  driver().check(driver().current_context(&context), "current CUDA context");
  if (context) return;
  CUdevice device = 0;
  driver().check(driver().device_of(&device, index), "CUDA device");
  driver().check(driver().primary_context(&context, device), "primary CUDA context");
  driver().check(driver().set_context(context), "primary CUDA context");
}

const Device& current_device() {
  if (simulate) return simulated_device;
  static std::mutex mutex;
  static std::map<CUdevice, Device> devices;
  const CUdevice device = driver().device();
  const std::lock_guard lock(mutex);
  const auto known = devices.find(device);
  if (known != devices.end()) return known->second;
  const auto number = [&](CUdevice_attribute which) { return driver().number(device, which); };
  const int major = number(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  const int minor = number(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  return devices[device] = {10 * major + minor, number(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
                            number(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR),
                            number(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)};
}

void launch(const Launch& launch, const void* parameters, size_t bytes, const std::vector<Buffer>& buffers,
            void* stream) {
  if (launch.blocks == 0) return;
  if (launch.blocks > 0x7fffffff) throw std::runtime_error(launch.kernel + ": more blocks than a grid can have");
  if (simulate) {
    simulate(launch.kernel.c_str(), launch.blocks, launch.threads, launch.cluster, launch.shared_bytes, parameters,
             static_cast<int64_t>(bytes), buffers.data(), static_cast<int64_t>(buffers.size()));
    return;
  }
  CUlaunchAttribute cluster;
  cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  cluster.value.clusterDim.x = static_cast<unsigned>(launch.cluster);
  cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1;
  CUlaunchConfig config = {};
  config.gridDimX = static_cast<unsigned>(launch.blocks);
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = static_cast<unsigned>(launch.threads);
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned>(launch.shared_bytes);
  config.hStream = static_cast<CUstream>(stream);
  config.attrs = &cluster;
  config.numAttrs = launch.cluster > 1 ? 1 : 0;
  std::array<void*, 1> arguments{const_cast<void*>(parameters)};
  const CUkernel kernel = kernel_of(launch.kernel, driver().device(), launch.shared_bytes > 0);
  // The driver takes kernels where it takes functions, and finds the current context's.
  driver().check(driver().launch(&config, reinterpret_cast<CUfunction>(kernel), arguments.data(), nullptr),
                 launch.kernel);
}

}  // namespace kdk::cuda

// Makes launches call `simulate` instead of the driver, as on a device of such limits; null ends that. For tests.
extern "C" __attribute__((visibility("default"))) void kdk_simulate(kdk::cuda::Simulate simulate, int64_t capability,
                                                                    int64_t shared_bytes, int64_t shared_bytes_of_all,
                                                                    int64_t multiprocessors) {
  kdk::cuda::simulate = simulate;
  kdk::cuda::simulated_device = {static_cast<int>(capability), static_cast<int>(shared_bytes),
                                 static_cast<int>(shared_bytes_of_all), static_cast<int>(multiprocessors)};
}
