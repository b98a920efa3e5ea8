// Where logits are in memory. Host and device code; no torch.
#pragma once

#include <cstdint>

namespace kdk {

enum class DType : int { f32, f64, f16, bf16 };

constexpr int kMaxDims = 8;

// A logits-shaped array: where a sample's classes are.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t class_stride = 1;
  int64_t sample_stride[kMaxDims] = {};
};

}  // namespace kdk
