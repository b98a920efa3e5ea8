// The ops of CPU tensors: thin unpacking, on LibTorch's stable ABI. Nothing but torch_*.cpp and torch_arguments.h knows
// torch.
#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "torch_arguments.h"

namespace kdk {
namespace {

// Arrays of small arguments, in the type and order the kernels read; conversions live as long as this.
class Arguments {
 public:
  template <class T>
  const T* array(const Tensor& tensor) {
    constexpr ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Long;
    Tensor typed = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
    held_.push_back(typed.is_contiguous() ? typed : torch::stable::contiguous(typed));
    return static_cast<const T*>(held_.back().data_ptr());
  }
  template <class T>
  const T* array(const std::optional<Tensor>& tensor) {
    return tensor ? array<T>(*tensor) : nullptr;
  }

 private:
  std::vector<Tensor> held_;
};

const Parallel& parallel() {
  static thread_local Parallel threads;
  threads.run = [](int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(begin, end, grain, body);
  };
  threads.threads = static_cast<int>(torch::stable::get_num_threads());
  return threads;
}

// Sets what counts of the samples, by weight and target. Everything that can be wrong with them is found here, before
// anything is computed.
ValidSamples set_weights(Problem& problem, const double* given, int64_t ignore_index) {
  problem.weight = {1, given, problem.target, ignore_index};
  const ValidSamples valid = valid_samples(problem, parallel());
  if (valid.right) return valid;
  for (int64_t n = 0; n < problem.samples; ++n) {
    STD_TORCH_CHECK(!given || given[n] >= 0, "ValueError: sample_weight must be >= 0, got ", given[n], " for sample ",
                    n);
    const int64_t y = problem.target ? problem.target[n] : 0;
    STD_TORCH_CHECK((problem.target && y == ignore_index) || (0 <= y && y < problem.classes),
                    "IndexError: target must be in [0, ", problem.classes, ") or ignore_index ", ignore_index, ", got ",
                    y, " for sample ", n);
  }
  return valid;
}

// What the weighted sum of the row losses is multiplied by; 0 without a valid sample.
double reduction_factor(Reduction reduction, const double* denominator, double scale, int64_t batch, double weights) {
  double divisor = reduction == Reduction::batchmean ? static_cast<double>(batch) : 1;
  if (reduction == Reduction::mean) divisor = weights;
  if (denominator) divisor = *denominator;
  return divisor == 0 ? 0 : scale / divisor;
}

// The student's gradient, in the student's own memory format.
Tensor new_gradient(const Tensor& student) {
  Tensor gradient = new_like(student);
  prefer_huge_pages(gradient.data_ptr(), gradient.numel() * gradient.element_size());
  return gradient;
}

// Spares the kernels writing the gradients of ignored samples where those are many.
void skip_zeros(Problem& problem, const Tensor& gradient, int64_t valid) {
  if (4 * valid > 3 * problem.samples) return;
  problem.gradient_is_zero = zero_on_demand(gradient.data_ptr(), gradient.numel() * gradient.element_size());
}

void set_zero(Tensor& tensor) {
  const uint64_t bytes = tensor.numel() * tensor.element_size();
  if (!zero_on_demand(tensor.data_ptr(), bytes)) std::memset(tensor.data_ptr(), 0, bytes);
}

void store(Tensor& tensor, int64_t index, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    static_cast<double*>(tensor.data_ptr())[index] = value;
  } else {
    static_cast<float*>(tensor.data_ptr())[index] = static_cast<float>(value);
  }
}

// What a call compares: both sides' logits, and the shape and layout they share.
Problem compared(const Tensor& student, const Tensor& teacher, int64_t num_classes, int64_t class_dim) {
  Problem problem;
  problem.classes = num_classes;
  problem.gradient_classes = student.size(class_dim);
  problem.double_arithmetic =
      student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return problem;
}

// What standardises by class, checked against the objective.
void set_class_statistics(Problem& problem, Arguments& arguments, const std::optional<Tensor>& moments,
                          const std::optional<Tensor>& sums) {
  const bool by_class = problem.objective.standardize == Standardize::by_class;
  STD_TORCH_CHECK(by_class || !moments,
                  "ValueError: moments must be given only where logits are standardised by class");
  STD_TORCH_CHECK(!moments || moments->numel() == 6 * problem.classes, "ValueError: moments must have 2 x 3 x ",
                  problem.classes, " numbers");
  STD_TORCH_CHECK(!sums || sums->numel() == 2 * problem.classes, "ValueError: sums must have 2 x ", problem.classes,
                  " numbers");
  problem.moments = arguments.array<double>(moments);
  problem.sums = arguments.array<double>(sums);
}

// Count, mean and M2 of each class over the valid samples: of the student, then of the teacher.
Tensor class_moments_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target,
                         const std::optional<Tensor>& sample_weight, int64_t class_dim, int64_t num_classes,
                         int64_t ignore_index) {
  Problem problem = compared(student, teacher, num_classes, class_dim);
  set_layout(problem, {{&problem.student, &student}, {&problem.teacher, &teacher}}, class_dim);
  Arguments arguments;
  problem.target = arguments.array<int64_t>(target);
  set_weights(problem, arguments.array<double>(sample_weight), ignore_index);
  Tensor moments = new_tensor(student, {2, 3, num_classes}, ScalarType::Double);
  class_moments(problem, parallel(), static_cast<double*>(moments.data_ptr()));
  return moments;
}

Forward forward_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target,
                    const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& denominator,
                    const std::optional<Tensor>& moments, const std::vector<int64_t>& structure, const Tensor& numbers,
                    double scale, int64_t reduction_index, int64_t class_dim, int64_t num_classes, int64_t ignore_index,
                    bool gradient, bool save, bool parts, const std::optional<std::string>&) {
  const auto reduction = static_cast<Reduction>(reduction_index);
  Problem problem = compared(student, teacher, num_classes, class_dim);
  problem.objective = decoded(structure, numbers, num_classes);
  const ScalarType dtype = problem.double_arithmetic ? ScalarType::Double : ScalarType::Float;

  const bool own_moments = problem.objective.standardize == Standardize::by_class && !moments;
  STD_TORCH_CHECK(save || !moments || !gradient, "ValueError: save must go with gradient where there are moments");
  STD_TORCH_CHECK(!save || !own_moments, "ValueError: moments must be given with save");
  std::optional<Tensor> grad;
  std::vector<std::pair<Matrix*, const Tensor*>> sides{{&problem.student, &student}, {&problem.teacher, &teacher}};
  if (gradient && moments) {
    grad = new_tensor(student, {2, num_classes}, ScalarType::Double);
    problem.sums_out = static_cast<double*>(grad->data_ptr());
  } else if (gradient) {
    grad = new_gradient(student);
    sides.emplace_back(&problem.gradient, &*grad);
  }
  set_layout(problem, sides, class_dim);
  const int64_t samples = problem.samples;

  Arguments arguments;
  set_class_statistics(problem, arguments, moments, std::nullopt);
  problem.target = arguments.array<int64_t>(target);
  const ValidSamples valid = set_weights(problem, arguments.array<double>(sample_weight), ignore_index);
  problem.weight.factor =
      reduction_factor(reduction, arguments.array<double>(denominator), scale, student.size(0), valid.weight);
  if (problem.gradient.data) skip_zeros(problem, *grad, valid.count);
  std::vector<double> computed_moments(own_moments ? 6 * num_classes : 0);
  if (own_moments) {
    class_moments(problem, parallel(), computed_moments.data());
    problem.moments = computed_moments.data();
  }

  problem.parts = parts;
  const int64_t columns = value_count(problem), slots = reduction == Reduction::none ? samples : 1;
  std::vector<double> values(slots * columns);
  (reduction == Reduction::none ? problem.values : problem.totals) = values.data();
  std::optional<Tensor> saved, members;
  if (save) {
    saved = new_tensor(student, {samples, saved_size(problem.objective)}, dtype);
    members = new_tensor(student, {samples, members_size(problem.objective)}, ScalarType::Long);
    problem.saved = saved->data_ptr();
    problem.members = static_cast<int64_t*>(members->data_ptr());
    if (by_pixels(problem)) {  // which save weights only
      set_zero(*saved);
      set_zero(*members);
    }
  }
  forward(problem, parallel());

  std::vector<int64_t> shape;
  if (reduction == Reduction::none)
    for (int64_t d = 0; d < student.dim(); ++d)
      if (d != class_dim) shape.push_back(student.size(d));
  Tensor loss = new_tensor(student, shape, dtype);
  shape.push_back(columns - 1);
  std::optional<Tensor> part_values;
  if (parts) part_values = new_tensor(student, shape, dtype);
  for (int64_t n = 0; n < slots; ++n) {
    const double weight = problem.totals ? 1 : problem.weight(n);
    for (int64_t v = 0; v < columns; ++v) {
      const double value = weight == 0 ? 0 : weight * values[n * columns + v];
      store(v == 0 ? loss : *part_values, v == 0 ? n : n * (columns - 1) + v - 1, value);
    }
  }
  return {loss, part_values, grad, saved, members};
}

// A backward step: the logits, and what forward saved of each sample, weighted by the upstream gradient.
struct Backward {
  Problem problem;
  Arguments arguments;
  int64_t valid = 0;  // samples that counted in forward

  Backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target,
           const Tensor& saved, const Tensor& members, const std::vector<int64_t>& structure, const Tensor& numbers,
           int64_t class_dim, int64_t num_classes, Tensor* gradient)
      : problem(compared(student, teacher, num_classes, class_dim)) {
    problem.objective = decoded(structure, numbers, num_classes);
    std::vector<std::pair<Matrix*, const Tensor*>> sides{{&problem.student, &student}, {&problem.teacher, &teacher}};
    if (gradient) sides.emplace_back(&problem.gradient, gradient);
    set_layout(problem, sides, class_dim);
    problem.target = arguments.array<int64_t>(target);
    const double* upstream = arguments.array<double>(grad_loss);
    if (grad_loss.dim() == 0) problem.weight.factor = *upstream;
    if (grad_loss.dim() != 0) problem.weight.given = upstream;
    const ScalarType dtype = problem.double_arithmetic ? ScalarType::Double : ScalarType::Float;
    check_saved("saved", saved, dtype, saved_size(problem.objective));
    check_saved("members", members, ScalarType::Long, members_size(problem.objective));
    problem.saved = saved.data_ptr();
    problem.members = static_cast<int64_t*>(members.data_ptr());
    problem.double_arithmetic ? check_classes(static_cast<const double*>(problem.saved))
                              : check_classes(static_cast<const float*>(problem.saved));
  }

 private:
  void check_saved(const char* name, const Tensor& tensor, ScalarType dtype, int64_t size) const {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == problem.samples * size,
                    "ValueError: ", name, " must be what forward returned, got ", tensor.numel(), " numbers for ",
                    problem.samples, " samples");
  }

  // Counts the valid samples. Their classes are checked once more, since a target can be changed behind autograd's
  // back: nothing outside the logits may be read.
  template <class T>
  void check_classes(const T* weight) {
    const bool pixels = by_pixels(problem);  // of which only weights are saved
    const int64_t step = pixels ? 1 : saved_size(problem.objective);
    const int64_t ranks = pixels ? 0 : members_size(problem.objective);
    const int64_t* target = problem.objective.has_target() ? problem.target : nullptr;
    for (int64_t n = 0; n < problem.samples; ++n) {
      if (weight[n * step] == 0) continue;
      ++valid;
      if (target) check_class("target", target[n], n);
      for (int64_t i = 0; i < ranks; ++i) check_class("members", problem.members[n * ranks + i], n);
    }
  }

  void check_class(const char* name, int64_t index, int64_t sample) const {
    STD_TORCH_CHECK(0 <= index && index < problem.classes, "IndexError: ", name, " must be in [0, ", problem.classes,
                    ") in backward as it was in forward, got ", index, " for sample ", sample);
  }
};

Tensor backward_cpu(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                    const std::optional<Tensor>& target, const Tensor& saved, const Tensor& members,
                    const std::optional<Tensor>& moments, const std::optional<Tensor>& sums,
                    const std::vector<int64_t>& structure, const Tensor& numbers, int64_t class_dim,
                    int64_t num_classes) {
  Tensor gradient = new_gradient(student);
  Backward step(grad_loss, student, teacher, target, saved, members, structure, numbers, class_dim, num_classes,
                &gradient);
  set_class_statistics(step.problem, step.arguments, moments, sums);
  STD_TORCH_CHECK(moments.has_value() == (step.problem.objective.standardize == Standardize::by_class),
                  "ValueError: moments must be given where, and only where, logits are standardised by class");
  skip_zeros(step.problem, gradient, step.valid);
  STD_TORCH_CHECK(moments.has_value() == sums.has_value(), "ValueError: sums must be given with moments");
  backward(step.problem, parallel());
  return gradient;
}

// For each class, the sums over samples that its gradient needs.
Tensor class_sums_cpu(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                      const std::optional<Tensor>& target, const Tensor& saved, const Tensor& members,
                      const Tensor& moments, const std::vector<int64_t>& structure, const Tensor& numbers,
                      int64_t class_dim, int64_t num_classes) {
  Backward step(grad_loss, student, teacher, target, saved, members, structure, numbers, class_dim, num_classes,
                nullptr);
  set_class_statistics(step.problem, step.arguments, moments, std::nullopt);
  Tensor sums = new_tensor(student, {2, num_classes}, ScalarType::Double);
  class_sums(step.problem, parallel(), static_cast<double*>(sums.data_ptr()));
  return sums;
}

void scale_cpu(const Tensor& gradient, const Tensor& factor, int64_t class_dim) {
  Arguments arguments;
  const double* by = arguments.array<double>(factor);
  if (factor.dim() == 0 && *by == 1) return;
  Problem problem;
  problem.classes = problem.gradient_classes = gradient.size(class_dim);
  set_layout(problem, {{&problem.gradient, &gradient}}, class_dim);
  scale(problem, by, factor.dim() != 0, parallel());
}

int64_t cpu_instruction_set() { return static_cast<int64_t>(current_isa()); }

bool set_cpu_instruction_set(int64_t index) { return set_isa(static_cast<int>(index)); }

std::vector<int64_t> cpu_instruction_sets() {
  std::vector<int64_t> sets;
  for (const Isa isa : supported_isas()) sets.push_back(static_cast<int64_t>(isa));
  return sets;
}

STABLE_TORCH_LIBRARY(kdkernels, m) {
  define_ops(m);
  m.def("cpu_instruction_set() -> int");
  m.def("cpu_instruction_sets() -> int[]");
  m.def("set_cpu_instruction_set(int index) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("class_moments", TORCH_BOX(&class_moments_cpu));
  m.impl("forward", TORCH_BOX(&forward_cpu));
  m.impl("class_sums", TORCH_BOX(&class_sums_cpu));
  m.impl("backward", TORCH_BOX(&backward_cpu));
  m.impl("scale_", TORCH_BOX(&scale_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("sizes", TORCH_BOX(&sizes));
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("cpu_instruction_sets", TORCH_BOX(&cpu_instruction_sets));
  m.impl("set_cpu_instruction_set", TORCH_BOX(&set_cpu_instruction_set));
}

}  // namespace
}  // namespace kdk
