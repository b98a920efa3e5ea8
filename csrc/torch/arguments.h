// What the ops of all devices share: tensors in, plain data out, on LibTorch's stable ABI.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in torch's headers
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/matrix.h"

namespace kdk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Reduction : int64_t { none = 0, sum = 1, mean = 2, batchmean = 3 };  // the order of validation.REDUCTIONS

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, "ValueError: logits must be float32, float64, float16 or bfloat16");
  return DType::f32;
}

// What Objective.encode() returns: integers, of which the first says whether there is a cross entropy, as sizes depend
// on it, and the others are read by decode_structure(); and numbers, which decode_numbers() reads.
template <class Objective>
Objective decoded(const std::vector<int64_t>& structure) {
  Objective objective{};
  const auto count = static_cast<int64_t>(structure.size());
  STD_TORCH_CHECK(count > 0 && decode_structure(structure.data() + 1, count - 1, objective),
                  "ValueError: structure must be what Objective.encode() returns, got ", count, " integers");
  objective.ce_weight = structure[0] != 0 ? 1 : 0;
  return objective;
}

// `decode(numbers, count, objective)` reads the numbers. They are on the CPU, whatever device the logits are on.
template <class Objective, class Decode>
Objective decoded(const std::vector<int64_t>& structure, const Tensor& numbers, Decode decode) {
  Objective objective = decoded<Objective>(structure);
  const bool has_ce = objective.has_ce();
  STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Double && numbers.is_cpu() && numbers.is_contiguous() &&
                      decode(static_cast<const double*>(numbers.data_ptr()), numbers.numel(), objective) &&
                      objective.has_ce() == has_ce,
                  "ValueError: numbers must be the float64 CPU tensor that Objective.encode() returns, got ",
                  numbers.numel(), " numbers");
  return objective;
}

// Points the problem's matrices at the tensors and merges sample dimensions that all of them walk alike.
template <class Problem>
void set_layout(Problem& problem, std::vector<std::pair<Matrix*, const Tensor*>> sides, int64_t class_dim) {
  const Tensor& shape = *sides.front().second;
  problem.samples = 1;
  problem.dims = 0;
  for (auto& [matrix, tensor] : sides) {
    matrix->data = tensor->data_ptr();
    matrix->dtype = dtype_of(*tensor);
    matrix->class_stride = tensor->stride(class_dim);
  }
  for (int64_t d = 0; d < shape.dim(); ++d) {
    if (d == class_dim) continue;
    const int64_t size = shape.size(d);
    problem.samples *= size;
    if (size == 1) continue;
    bool merges = problem.dims > 0;
    for (auto& [matrix, tensor] : sides)
      merges = merges && matrix->sample_stride[problem.dims - 1] == size * tensor->stride(d);
    const int at = merges ? problem.dims - 1 : problem.dims++;
    STD_TORCH_CHECK(at < kMaxDims, "ValueError: logits must have at most ", kMaxDims, " sample dimensions");
    problem.sample_size[at] = merges ? problem.sample_size[at] * size : size;
    for (auto& [matrix, tensor] : sides) matrix->sample_stride[at] = tensor->stride(d);
  }
}

// Contiguous, not set. torch::stable::empty looks its op up by name each time: microseconds, of which a call has few.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &type,
                                                   nullptr, nullptr, 0, nullptr, &tensor));  // the rest is that of like
  return Tensor(tensor);
}

// In the memory format of another tensor, not set.
inline Tensor new_like(const Tensor& like) {
  return like.is_contiguous() ? new_tensor(like, like.sizes().vec(), like.scalar_type())
                              : torch::stable::empty_like(like);
}

}  // namespace kdk
