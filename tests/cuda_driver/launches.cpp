// Launches through csrc/cuda/driver.cpp as the ops do, on two devices, and prints what comes of it: see
// test_cuda_driver.py.
#include <cstdio>
#include <exception>

#include "cuda/driver.h"

int main() {
  using namespace kdk::cuda;
  try {
    const int parameter = 7;
    void* stream = reinterpret_cast<void*>(42);
    use_device(1);
    use_device(1);
    const Device device = current_device();
    std::printf("device %d %d %d %d\n", device.capability, device.shared_bytes, device.shared_bytes_of_all,
                device.multiprocessors);
    launch({"kdk_forward_rows_bf16", 64, 224, 8, 51200}, &parameter, sizeof(parameter), {}, stream);
    launch({"kdk_forward_rows_bf16", 16, 128, 1, 4096}, &parameter, sizeof(parameter), {}, stream);
    launch({"kdk_backward_pixels_f16", 16, 128, 1, 4096}, &parameter, sizeof(parameter), {}, nullptr);
    launch({"kdk_row_sum", 1, 32, 1, 0}, &parameter, sizeof(parameter), {}, stream);
    launch({"kdk_scale_rows_f64", 0, 128, 1, 0}, &parameter, sizeof(parameter), {}, stream);
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
  }
}
