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

inline Objective decoded(const std::vector<int64_t>& structure) {
  Objective objective{};
  STD_TORCH_CHECK(decode_structure(structure.data(), static_cast<int64_t>(structure.size()), objective),
                  "ValueError: structure must be what Objective.encode() returns, got ", structure.size(), " integers");
  return objective;
}

// An objective from what Objective.encode() returns, for so many classes. Its numbers are on the CPU, whatever device
// the logits are on.
inline Objective decoded(const std::vector<int64_t>& structure, const Tensor& numbers, int64_t classes) {
  Objective objective = decoded(structure);
  STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Double && numbers.is_cpu() && numbers.is_contiguous() &&
                      decode_numbers(static_cast<const double*>(numbers.data_ptr()), numbers.numel(), objective),
                  "ValueError: numbers must be the float64 CPU tensor that Objective.encode() returns, got ",
                  numbers.numel(), " numbers");
  drop_single_groups(objective, classes);
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
      "Tensor? moments, int[] structure, Tensor numbers, float scale, int reduction, int class_dim, SymInt "
      "num_classes, "
      "int ignore_index, bool gradient, bool save, bool parts, str? process_group=None) -> "
      "(Tensor loss, Tensor? parts, Tensor? gradient, Tensor? saved, Tensor? members)");
  m.def(
      "class_sums(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor saved, Tensor members, "
      "Tensor moments, int[] structure, Tensor numbers, int class_dim, SymInt num_classes) -> Tensor");
  m.def(
      "backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor saved, Tensor members, "
      "Tensor? moments, Tensor? sums, int[] structure, Tensor numbers, int class_dim, SymInt num_classes) -> Tensor");
  m.def("scale_(Tensor(a!) gradient, Tensor factor, int class_dim) -> ()");
  // Numbers a sample of the loss parts, of what forward saves, and of the leading classes.
  m.def("sizes(int[] structure) -> int[]");
}

inline std::vector<int64_t> sizes(const std::vector<int64_t>& structure) {
  const Objective objective = decoded(structure);
  return {objective.parts(), saved_size(objective), members_size(objective)};
}

}  // namespace kdk
