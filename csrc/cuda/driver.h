// Launches through the CUDA driver, which is loaded when the first kernel is: what links this needs no CUDA library and
// loads on machines without a GPU. Tests put a simulator in the driver's place.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "plan.h"

namespace kdk::cuda {

// A tensor that a kernel's parameters point at. Only the simulator looks at it: it knows which bytes may be accessed.
struct Buffer {
  const char* name;
  int64_t offset;  // of the pointer in the parameters
  void* data;
  int64_t element_bytes;
  int64_t dims;
  int64_t sizes[kMaxDims + 1];
  int64_t strides[kMaxDims + 1];
  int64_t fresh;  // whether this call has allocated it
};

// Compute capabilities that the kernels were compiled for, and whether a device of some capability can run them.
std::vector<int> targets();
bool serves(int capability);

// Makes sure that the calling thread has a context of a device, its primary one, which is torch's too.
void use_device(int index);

// Limits of the current device. Throws std::runtime_error where there is no driver.
const Device& current_device();

// Launches a kernel on a stream of the current device. Throws std::runtime_error with the driver's words.
void launch(const Launch& launch, const void* parameters, size_t bytes, const std::vector<Buffer>& buffers,
            void* stream);

// Whether launches go to a simulator.
bool simulated();

}  // namespace kdk::cuda
