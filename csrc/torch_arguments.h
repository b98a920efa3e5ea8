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
#include <type_traits>
#include <utility>
#include <vector>

#include "matrix.h"
#include "objective.h"

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

inline Objective decoded(const std::vector<double>& numbers) {
  Objective objective;
  STD_TORCH_CHECK(decode(numbers.data(), static_cast<int64_t>(numbers.size()), objective),
                  "ValueError: objective must be what Objective.encode() returns, got ", numbers.size(), " numbers");
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

// What forward returns: the loss and, where they were asked for, its parts, the gradient, saved numbers and members.
using Forward =
    std::tuple<Tensor, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

// The schemas that all backends' ops have.
inline void define_ops(torch::stable::detail::StableLibrary& m) {
  m.def(
      "class_moments(Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, int class_dim, "
      "SymInt num_classes, int ignore_index) -> Tensor");
  m.def(
      "forward(Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, Tensor? denominator, "
      "Tensor? moments, float[] objective, float scale, int reduction, int class_dim, SymInt num_classes, "
      "int ignore_index, bool gradient, bool save, bool parts) -> "
      "(Tensor loss, Tensor? parts, Tensor? gradient, Tensor? saved, Tensor? members)");
  m.def(
      "class_sums(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor saved, Tensor members, "
      "Tensor moments, float[] objective, int class_dim, SymInt num_classes) -> Tensor");
  m.def(
      "backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor saved, Tensor members, "
      "Tensor? moments, Tensor? sums, float[] objective, int class_dim, SymInt num_classes) -> Tensor");
  m.def("scale_(Tensor(a!) gradient, Tensor factor, int class_dim) -> ()");
  // Numbers a sample of the loss parts, of what forward saves, and of the leading classes.
  m.def("sizes(float[] objective) -> int[]");
}

inline std::vector<int64_t> sizes(const std::vector<double>& objective) {
  const Objective decoded_objective = decoded(objective);
  return {decoded_objective.parts(), saved_size(decoded_objective), members_size(decoded_objective)};
}

}  // namespace kdk
