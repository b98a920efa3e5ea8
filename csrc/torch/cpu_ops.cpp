// The ops of CPU tensors: thin unpacking, on LibTorch's stable ABI. Nothing outside this folder knows torch.
#include <algorithm>
#include <cstring>
#include <list>

#include "../cpu/kernels.h"
#include "arguments.h"
#include "pages.h"

namespace kdk {
namespace {

using OptionalTensor = std::optional<Tensor>;

const Parallel& parallel() {
  static thread_local Parallel threads;
  threads.run = [](int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(begin, end, grain, body);
  };
  threads.threads = static_cast<int>(torch::stable::get_num_threads());
  return threads;
}

Objective decoded(const std::vector<int64_t>& structure, const Tensor& numbers, int64_t classes) {
  return kdk::decoded<Objective>(structure, numbers, [classes](const double* values, int64_t count, Objective& into) {
    return decode_numbers(values, count, classes, into);
  });
}

// What the weighted sum of the row losses is multiplied by; 0 without a valid sample.
double reduction_factor(Reduction reduction, const double* denominator, double scale, int64_t batch, double weights) {
  double divisor = reduction == Reduction::batchmean ? static_cast<double>(batch) : 1;
  if (reduction == Reduction::mean) divisor = weights;
  if (denominator) divisor = *denominator;
  return divisor == 0 ? 0 : scale / divisor;
}

// The memory of a tensor that ops hand to each other, checked to be what another one gave.
template <class T>
T* data_of(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == rows * columns,
                  "ValueError: ", name, " must be contiguous, as the ops give it, with ", rows, " x ", columns,
                  " numbers, got ", tensor.numel());
  return static_cast<T*>(tensor.data_ptr());
}

// A call of the kernels: the problem, and small arrays that it points at, in the type and order the kernels read.
class Step {
 public:
  Problem problem;
  ValidSamples valid;

  Step(int64_t samples, int64_t num_classes) {
    problem.samples = samples;
    problem.classes = num_classes;
  }

  // Of logits; the gradient, if there is one, has the student's shape.
  Step(const Tensor& student, const Tensor* teacher, const Tensor* gradient, int64_t class_dim, int64_t num_classes) {
    std::vector<std::pair<Matrix*, const Tensor*>> sides{{&problem.student, &student}};
    if (teacher) sides.emplace_back(&problem.teacher, teacher);
    if (gradient) sides.emplace_back(&problem.gradient, gradient);
    for (const auto& side : sides) check_logits(*side.second, student, class_dim, num_classes);
    problem.classes = num_classes;
    problem.gradient_classes = student.size(class_dim);
    set_layout(problem, sides, class_dim);
  }

  void set_objective(const std::vector<int64_t>& structure, const Tensor& numbers) {
    problem.objective = decoded(structure, numbers, problem.classes);
  }

  void set_objective(const std::vector<int64_t>& structure, const Tensor& numbers, const OptionalTensor& moments) {
    set_objective(structure, numbers);
    STD_TORCH_CHECK(moments.has_value() == by_class(),
                    "ValueError: moments must be given where, and only where, logits are standardised by class");
    problem.moments = array<double>("moments", moments, 6 * problem.classes);
  }

  bool by_class() const { return problem.objective.standardize == Standardize::by_class; }

  // The moments of these samples alone.
  void find_moments() {
    moments_.resize(6 * problem.classes);
    kernels().class_moments(problem, parallel(), moments_.data());
    problem.moments = moments_.data();
  }

  void set_weights(const OptionalTensor& target, const OptionalTensor& sample_weight, int64_t ignore_index) {
    set_target(target);
    problem.weight = {1, array<double>("sample_weight", sample_weight, problem.samples), problem.target, ignore_index};
  }
  void set_target(const OptionalTensor& target) { problem.target = array<int64_t>("target", target, problem.samples); }

  // Sets what counts of the samples. Everything that can be wrong with them is found here, before anything is computed.
  void set_samples(const OptionalTensor& target, const OptionalTensor& sample_weight, int64_t ignore_index) {
    set_weights(target, sample_weight, ignore_index);
    valid = kernels().valid_samples(problem, parallel());
    for (int64_t n = 0; n < problem.samples && !valid.right; ++n) check_sample(n);
  }

  // The weights that the samples have in a reduced loss.
  void reduce_by(Reduction reduction, const OptionalTensor& denominator, double scale, int64_t batch) {
    problem.weight.factor =
        reduction_factor(reduction, array<double>("denominator", denominator, 1), scale, batch, valid.weight);
  }

  // Takes the gradient of the loss, one for all samples or one for each, for the samples' weights, which are in the
  // coefficients, the last a sample. Classes are checked once more, since they can be changed behind autograd's back:
  // nothing outside the logits may be read. A sample that did not count may have become anything.
  void set_upstream(const Tensor& grad_loss, const float* coefficients, const int64_t* selected) {
    const bool each = grad_loss.dim() != 0;
    const double* upstream = array<double>("grad_loss", grad_loss, each ? problem.samples : 1);
    problem.weight = {each ? 1 : *upstream, each ? upstream : nullptr, nullptr, 0};
    const int64_t columns = coefficients_size(problem.objective), ranks = selected_size(problem.objective);
    const int64_t* target = problem.objective.has_target() ? problem.target : nullptr;
    const auto counted = [&](int64_t n) { return coefficients[n * columns + columns - 1] != 0; };
    for (int64_t n = 0; n < problem.samples; ++n) {
      if (!counted(n)) continue;
      ++valid.count;
      if (target) check_class("target", target[n], n);
      for (int64_t i = 0; i < ranks; ++i) check_class("selected", selected[n * ranks + i], n);
    }
    problem.coefficients = coefficients;
  }

  // Spares the kernels writing the gradients of ignored samples where those are many.
  void skip_zeros(const Tensor& gradient) {
    if (4 * valid.count > 3 * problem.samples) return;
    problem.gradient_is_zero = zero_on_demand(gradient.data_ptr(), gradient.numel() * gradient.element_size());
  }

  template <class T>
  const T* array(const char* name, const Tensor& tensor, int64_t size) {
    STD_TORCH_CHECK(tensor.numel() == size, "ValueError: ", name, " must have ", size, " numbers, got ",
                    tensor.numel());
    constexpr ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Long;
    if constexpr (std::is_same_v<T, double>) {  // an op that converts takes a microsecond, of which a call has few
      if (tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous()) {
        const auto* values = static_cast<const float*>(tensor.data_ptr());
        return doubles_.emplace_back(values, values + size).data();
      }
    }
    Tensor typed = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
    held_.push_back(typed.is_contiguous() ? typed : torch::stable::contiguous(typed));
    return static_cast<const T*>(held_.back().data_ptr());
  }
  template <class T>
  const T* array(const char* name, const OptionalTensor& tensor, int64_t size) {
    return tensor ? array<T>(name, *tensor, size) : nullptr;
  }

  void check_class(const char* name, int64_t index, int64_t sample) const {
    STD_TORCH_CHECK(0 <= index && index < problem.classes, "IndexError: ", name, " must be in [0, ", problem.classes,
                    "), got ", index, " for sample ", sample);
  }

 private:
  static void check_logits(const Tensor& logits, const Tensor& student, int64_t class_dim, int64_t num_classes) {
    STD_TORCH_CHECK(logits.scalar_type() != ScalarType::Double,
                    "ValueError: the CPU kernels take float32, float16 and bfloat16 logits, got float64, which the "
                    "reference backend serves");
    STD_TORCH_CHECK(0 <= class_dim && class_dim < student.dim() && logits.dim() == student.dim(),
                    "ValueError: class_dim must be a dimension of all logits, got ", class_dim);
    for (int64_t d = 0; d < student.dim(); ++d)
      STD_TORCH_CHECK(d == class_dim ? num_classes <= logits.size(d) : logits.size(d) == student.size(d),
                      "ValueError: logits must have the same sample dimensions and at least ", num_classes,
                      " classes, got ", logits.size(d), " in dimension ", d);
  }

  void check_sample(int64_t n) const {
    const double* given = problem.weight.given;
    STD_TORCH_CHECK(!given || given[n] >= 0, "ValueError: sample_weight must be >= 0, got ", given[n], " for sample ",
                    n);
    const int64_t y = problem.target ? problem.target[n] : 0, ignore_index = problem.weight.ignore_index;
    STD_TORCH_CHECK((problem.target && y == ignore_index) || (0 <= y && y < problem.classes),
                    "IndexError: target must be in [0, ", problem.classes, ") or ignore_index ", ignore_index, ", got ",
                    y, " for sample ", n);
  }

  std::vector<Tensor> held_;
  std::list<std::vector<double>> doubles_;
  std::vector<double> moments_;
};

// The student's gradient, in the student's own memory format.
Tensor new_gradient(const Tensor& student) {
  Tensor gradient = new_like(student);
  prefer_huge_pages(gradient.data_ptr(), gradient.numel() * gradient.element_size());
  return gradient;
}

// Loss and parts of a step: one for each sample, or their weighted sums.
class Results {
 public:
  Results(const Step& step, Reduction reduction, bool parts) : problem_(step.problem) {
    const bool each = reduction == Reduction::none;
    slots_ = each ? problem_.samples : 1;
    values.parts = parts;
    values.columns = 1 + (parts ? problem_.objective.parts() : 0);
    numbers_.resize(slots_ * values.columns);
    (each ? values.of_samples : values.totals) = numbers_.data();
  }

  Values values;

  // Those of samples are weighted here. `shape` is that of the loss.
  std::pair<Tensor, OptionalTensor> tensors(const Tensor& like, std::vector<int64_t> shape) const {
    std::pair<Tensor, OptionalTensor> results{new_tensor(like, shape, ScalarType::Float), std::nullopt};
    float *loss = static_cast<float*>(results.first.data_ptr()), *part = nullptr;
    if (values.parts) {
      shape.push_back(values.columns - 1);
      results.second = new_tensor(like, shape, ScalarType::Float);
      part = static_cast<float*>(results.second->data_ptr());
    }
    const double* next = numbers_.data();
    for (int64_t n = 0; n < slots_; ++n) {
      const double weight = values.totals ? 1 : problem_.weight(n);
      const auto weighted = [weight](double value) { return static_cast<float>(weight == 0 ? 0 : weight * value); };
      *loss++ = weighted(*next++);
      for (int64_t i = 1; i < values.columns; ++i) *part++ = weighted(*next++);
    }
    return results;
  }

 private:
  const Problem& problem_;
  int64_t slots_;
  std::vector<double> numbers_;
};

std::vector<int64_t> loss_shape(const std::vector<int64_t>& logits, int64_t class_dim, Reduction reduction) {
  if (reduction != Reduction::none) return {};
  std::vector<int64_t> shape = logits;
  shape.erase(shape.begin() + class_dim);
  return shape;
}

Tensor class_moments(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                     const OptionalTensor& sample_weight, int64_t class_dim, int64_t num_classes,
                     int64_t ignore_index) {
  Step step(student, &teacher, nullptr, class_dim, num_classes);
  step.set_samples(target, sample_weight, ignore_index);
  Tensor moments = new_tensor(student, {2, 3, num_classes}, ScalarType::Double);
  kernels().class_moments(step.problem, parallel(), static_cast<double*>(moments.data_ptr()));
  return moments;
}

// Where logits are standardised by class, moments that were given are those of other processes' samples, too: what
// flows through them is for their sums to say, later. Moments that are found here leave nothing for later.
using Fused = std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;

Fused fused(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
            const OptionalTensor& sample_weight, const OptionalTensor& denominator, const OptionalTensor& moments,
            const std::vector<int64_t>& structure, const Tensor& numbers, double scale, int64_t reduction_index,
            int64_t class_dim, int64_t num_classes, int64_t ignore_index, bool gradient, bool parts,
            const std::optional<std::string>&) {
  const auto reduction = static_cast<Reduction>(reduction_index);
  OptionalTensor grad, sums;
  if (gradient) grad = new_gradient(student);
  if (gradient && moments) sums = new_tensor(student, {2, num_classes}, ScalarType::Double);
  Step step(student, &teacher, grad ? &*grad : nullptr, class_dim, num_classes);
  moments ? step.set_objective(structure, numbers, moments) : step.set_objective(structure, numbers);
  step.set_samples(target, sample_weight, ignore_index);
  step.reduce_by(reduction, denominator, scale, student.size(0));
  if (grad) step.skip_zeros(*grad);
  const bool alone = step.by_class() && !moments;
  if (alone) step.find_moments();
  std::vector<double> own_sums(alone && grad ? 2 * num_classes : 0);
  double* of_classes = sums ? static_cast<double*>(sums->data_ptr()) : alone && grad ? own_sums.data() : nullptr;
  const Results results(step, reduction, parts);
  kernels().fused(step.problem, results.values, of_classes, parallel());
  if (alone && grad) kernels().class_norm_backward(step.problem, of_classes, 1, parallel());
  auto [loss, part_values] = results.tensors(student, loss_shape(student.sizes().vec(), class_dim, reduction));
  return {loss, part_values, grad, sums};
}

Tensor select(const Step& step, const Tensor& like) {
  const int64_t ranks = selected_size(step.problem.objective);
  Tensor selected = new_tensor(like, {step.problem.samples, ranks}, ScalarType::Long);
  if (ranks > 0) kernels().select(step.problem, static_cast<int64_t*>(selected.data_ptr()), parallel());
  return selected;
}

Tensor reduce(const Step& step, const int64_t* selected, const Tensor& like) {
  Tensor stats = new_tensor(like, {step.problem.samples, stats_size(step.problem.objective)}, ScalarType::Float);
  kernels().reduce(step.problem, selected, static_cast<float*>(stats.data_ptr()), parallel());
  return stats;
}

Tensor finalize(const Step& step, const float* stats, const Values& values, const Tensor& like) {
  const int64_t columns = coefficients_size(step.problem.objective);
  Tensor coefficients = new_tensor(like, {step.problem.samples, columns}, ScalarType::Float);
  kernels().finalize(step.problem, stats, values, static_cast<float*>(coefficients.data_ptr()), parallel());
  return coefficients;
}

Tensor select_op(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                 const OptionalTensor& sample_weight, const OptionalTensor& moments,
                 const std::vector<int64_t>& structure, const Tensor& numbers, int64_t class_dim, int64_t num_classes,
                 int64_t ignore_index) {
  Step step(student, &teacher, nullptr, class_dim, num_classes);
  step.set_objective(structure, numbers, moments);
  step.set_samples(target, sample_weight, ignore_index);
  return select(step, student);
}

Tensor reduce_op(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                 const OptionalTensor& sample_weight, const Tensor& selected, const OptionalTensor& moments,
                 const std::vector<int64_t>& structure, const Tensor& numbers, int64_t class_dim, int64_t num_classes,
                 int64_t ignore_index) {
  Step step(student, &teacher, nullptr, class_dim, num_classes);
  step.set_objective(structure, numbers, moments);
  step.set_samples(target, sample_weight, ignore_index);
  const int64_t ranks = selected_size(step.problem.objective);
  const auto* classes = data_of<int64_t>("selected", selected, ScalarType::Long, step.problem.samples, ranks);
  for (int64_t n = 0; n < step.problem.samples && ranks > 0; ++n)
    for (int64_t i = 0; i < ranks && step.problem.weight(n) != 0; ++i)
      step.check_class("selected", classes[n * ranks + i], n);
  return reduce(step, classes, student);
}

using Finalized = std::tuple<Tensor, OptionalTensor, Tensor>;

Finalized finalize_op(const Tensor& stats, const OptionalTensor& target, const OptionalTensor& sample_weight,
                      const OptionalTensor& denominator, const std::vector<int64_t>& structure, const Tensor& numbers,
                      double scale, int64_t reduction_index, const std::vector<int64_t>& shape, int64_t class_dim,
                      int64_t num_classes, int64_t ignore_index, bool parts) {
  const auto reduction = static_cast<Reduction>(reduction_index);
  const auto dims = static_cast<int64_t>(shape.size());
  STD_TORCH_CHECK(0 <= class_dim && class_dim < dims, "ValueError: class_dim must be a dimension of the ", dims,
                  " of shape, got ", class_dim);
  int64_t samples = 1;
  for (int64_t d = 0; d < dims; ++d) samples *= d == class_dim ? 1 : shape[d];
  Step step(samples, num_classes);
  step.set_objective(structure, numbers);
  step.set_samples(target, sample_weight, ignore_index);
  step.reduce_by(reduction, denominator, scale, shape[0]);
  const Results results(step, reduction, parts);
  const int64_t columns = stats_size(step.problem.objective);
  const Tensor coefficients =
      finalize(step, data_of<float>("stats", stats, ScalarType::Float, samples, columns), results.values, stats);
  auto [loss, part_values] = results.tensors(stats, loss_shape(shape, class_dim, reduction));
  return {loss, part_values, coefficients};
}

using Evaluated = std::tuple<Tensor, OptionalTensor, Tensor, Tensor>;

Evaluated evaluate(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                   const OptionalTensor& sample_weight, const OptionalTensor& denominator,
                   const OptionalTensor& moments, const std::vector<int64_t>& structure, const Tensor& numbers,
                   double scale, int64_t reduction_index, int64_t class_dim, int64_t num_classes, int64_t ignore_index,
                   bool parts, const std::optional<std::string>&) {
  const auto reduction = static_cast<Reduction>(reduction_index);
  Step step(student, &teacher, nullptr, class_dim, num_classes);
  step.set_objective(structure, numbers, moments);
  step.set_samples(target, sample_weight, ignore_index);
  step.reduce_by(reduction, denominator, scale, student.size(0));
  const Tensor selected = select(step, student);
  const Tensor stats = reduce(step, static_cast<const int64_t*>(selected.data_ptr()), student);
  const Results results(step, reduction, parts);
  const Tensor coefficients = finalize(step, static_cast<const float*>(stats.data_ptr()), results.values, student);
  auto [loss, part_values] = results.tensors(student, loss_shape(student.sizes().vec(), class_dim, reduction));
  return {loss, part_values, selected, coefficients};
}

// A step of backward, from what evaluate gave of the samples.
struct Backward : Step {
  const int64_t* selected;
  const float* coefficients;

  Backward(const Tensor& student, const Tensor& teacher, const Tensor* gradient, int64_t class_dim, int64_t num_classes)
      : Step(student, &teacher, gradient, class_dim, num_classes) {}

  void set_samples_of(const Tensor& grad_loss, const OptionalTensor& target, const Tensor& of_select,
                      const Tensor& of_finalize) {
    set_target(target);
    const Objective& objective = problem.objective;
    selected = data_of<int64_t>("selected", of_select, ScalarType::Long, problem.samples, selected_size(objective));
    coefficients =
        data_of<float>("coefficients", of_finalize, ScalarType::Float, problem.samples, coefficients_size(objective));
    set_upstream(grad_loss, coefficients, selected);
  }
};

Tensor apply(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
             const Tensor& selected, const Tensor& coefficients, const OptionalTensor& moments,
             const OptionalTensor& sums, const std::vector<int64_t>& structure, const Tensor& numbers,
             int64_t class_dim, int64_t num_classes) {
  STD_TORCH_CHECK(moments.has_value() == sums.has_value(), "ValueError: sums must be given with moments");
  Tensor gradient = new_gradient(student);
  Backward step(student, teacher, &gradient, class_dim, num_classes);
  step.set_objective(structure, numbers, moments);
  step.set_samples_of(grad_loss, target, selected, coefficients);
  step.skip_zeros(gradient);
  const double* of_classes = sums ? step.array<double>("sums", *sums, 2 * num_classes) : nullptr;
  kernels().apply(step.problem, step.selected, of_classes, parallel());
  return gradient;
}

Tensor class_sums(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                  const Tensor& selected, const Tensor& coefficients, const Tensor& moments,
                  const std::vector<int64_t>& structure, const Tensor& numbers, int64_t class_dim,
                  int64_t num_classes) {
  Tensor sums = new_tensor(student, {2, num_classes}, ScalarType::Double);
  Backward step(student, teacher, nullptr, class_dim, num_classes);
  step.set_objective(structure, numbers, moments);
  step.set_samples_of(grad_loss, target, selected, coefficients);
  kernels().class_sums(step.problem, step.selected, static_cast<double*>(sums.data_ptr()), parallel());
  return sums;
}

void class_norm_backward_(const Tensor& gradient, const Tensor& student, const OptionalTensor& target,
                          const OptionalTensor& sample_weight, const Tensor& moments, const Tensor& sums,
                          const Tensor& factor, const std::vector<int64_t>& structure, const Tensor& numbers,
                          int64_t class_dim, int64_t num_classes, int64_t ignore_index) {
  Step step(student, nullptr, &gradient, class_dim, num_classes);
  step.set_objective(structure, numbers, moments);
  step.set_weights(target, sample_weight, ignore_index);
  const double* by = step.array<double>("factor", factor, 1);
  const double* of_classes = step.array<double>("sums", sums, 2 * num_classes);
  kernels().class_norm_backward(step.problem, of_classes, *by, parallel());
}

Tensor class_norm_backward(const Tensor& gradient, const Tensor& student, const OptionalTensor& target,
                           const OptionalTensor& sample_weight, const Tensor& moments, const Tensor& sums,
                           const Tensor& factor, const std::vector<int64_t>& structure, const Tensor& numbers,
                           int64_t class_dim, int64_t num_classes, int64_t ignore_index) {
  Tensor result = torch::stable::empty_like(gradient);
  torch::stable::copy_(result, gradient);
  class_norm_backward_(result, student, target, sample_weight, moments, sums, factor, structure, numbers, class_dim,
                       num_classes, ignore_index);
  return result;
}

void scale(const Tensor& gradient, const Tensor& factor, int64_t class_dim) {
  Step step(gradient, nullptr, &gradient, class_dim, gradient.size(class_dim));
  const double* by = step.array<double>("factor", factor, factor.dim() == 0 ? 1 : step.problem.samples);
  if (factor.dim() == 0 && *by == 1) return;
  kernels().scale(step.problem, by, factor.dim() != 0, parallel());
}

std::vector<int64_t> sizes(const std::vector<int64_t>& structure) {
  const auto objective = kdk::decoded<Objective>(structure);
  return {objective.parts(), selected_size(objective), stats_size(objective), coefficients_size(objective)};
}

int64_t cpu_instruction_set() { return static_cast<int64_t>(current_isa()); }

bool set_cpu_instruction_set(int64_t index) { return set_isa(static_cast<int>(index)); }

std::vector<int64_t> cpu_instruction_sets() {
  std::vector<int64_t> sets;
  for (const Isa isa : supported_isas()) sets.push_back(static_cast<int64_t>(isa));
  return sets;
}

// What the ops share. student, teacher: logits, float32, float16 or bfloat16, of which the first `num_classes` along
// `class_dim` are compared. target: a class of each sample, or ignore_index, in the sample dimensions' shape, as is
// sample_weight, >= 0. moments: what class_moments gave, merged over processes, where logits are standardised by class.
// structure, numbers: what Objective.encode() returns. scale, reduction: the index in REDUCTIONS of
// kdkernels/validation.py; a sum is divided by `denominator`, if given.
//
// IndexError for a target or selected class out of range and ValueError for a weight below 0, before anything is
// computed; ValueError for sizes that do not fit. A sample that does not count has loss and gradient 0.
//
// N is the number of samples, K of the classes selected by rank (selected_size() of csrc/common/objective.h), S of the
// statistics (stats_size()), G of the coefficients (coefficients_size() of csrc/cpu/kernels.h).
STABLE_TORCH_LIBRARY(kdkernels, m) {
  // All steps at once. loss: float32, a scalar or, by reduction "none", of the sample dimensions' shape; parts, if
  // asked for: unweighted, in one more dimension: CE, then each term's mass and groups; gradient, if asked for: of the
  // sum of the losses in the student's logits. Where logits are standardised by class, moments may be left out: those
  // of these samples are found. With moments the gradient is that for constant ones, and sums, (2, num_classes)
  // float64, are what class_norm_backward needs. `process_group` is for the op's derivative alone.
  m.def(
      "fused(Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, Tensor? denominator, "
      "Tensor? moments, int[] structure, Tensor numbers, float scale, int reduction, int class_dim, "
      "SymInt num_classes, int ignore_index, bool gradient, bool parts, str? process_group=None) -> "
      "(Tensor loss, Tensor? parts, Tensor? gradient, Tensor? sums)");
  // select, reduce and finalize in one op, whose derivative is apply: fused for a gradient that is computed later.
  m.def(
      "evaluate(Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, Tensor? denominator, "
      "Tensor? moments, int[] structure, Tensor numbers, float scale, int reduction, int class_dim, "
      "SymInt num_classes, int ignore_index, bool parts, str? process_group=None) -> "
      "(Tensor loss, Tensor? parts, Tensor selected, Tensor coefficients)");
  // The classes that the teacher's ranks select, (N, K) int64: sweep by sweep, best first; ties: the lower index.
  m.def(
      "select(Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, Tensor? moments, "
      "int[] structure, Tensor numbers, int class_dim, SymInt num_classes, int ignore_index) -> Tensor");
  // Statistics of the groups, (N, S) float32, for given selections: columns as stats_size() says.
  m.def(
      "reduce(Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, Tensor selected, "
      "Tensor? moments, int[] structure, Tensor numbers, int class_dim, SymInt num_classes, int ignore_index) -> "
      "Tensor");
  // Loss and parts from statistics, and coefficients, (N, G) float32, which carry the samples' weights: columns as
  // coefficients_size() says. `shape` is that of the student's logits.
  m.def(
      "finalize(Tensor stats, Tensor? target, Tensor? sample_weight, Tensor? denominator, int[] structure, "
      "Tensor numbers, float scale, int reduction, SymInt[] shape, int class_dim, SymInt num_classes, "
      "int ignore_index, bool parts) -> (Tensor loss, Tensor? parts, Tensor coefficients)");
  // The gradient, times grad_loss (a scalar, or one a sample), of the samples that counted for finalize. With moments
  // it takes the sums over all samples and processes.
  m.def(
      "apply(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor selected, Tensor coefficients, "
      "Tensor? moments, Tensor? sums, int[] structure, Tensor numbers, int class_dim, SymInt num_classes) -> Tensor");
  // These sums over the samples at hand, (2, num_classes) float64, as those of fused.
  m.def(
      "class_sums(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor selected, "
      "Tensor coefficients, Tensor moments, int[] structure, Tensor numbers, int class_dim, SymInt num_classes) -> "
      "Tensor");
  // Count, mean and sum of squared deviations of each class over the samples that count, without logits of -inf:
  // (2, 3, num_classes) float64, of the student, then of the teacher.
  m.def(
      "class_moments(Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, int class_dim, "
      "SymInt num_classes, int ignore_index) -> Tensor");
  // Takes off a gradient for constant moments what flows through mean and deviation, by the sums over all samples and
  // processes, and multiplies the rest by a factor, a scalar.
  m.def(
      "class_norm_backward(Tensor gradient, Tensor student, Tensor? target, Tensor? sample_weight, Tensor moments, "
      "Tensor sums, Tensor factor, int[] structure, Tensor numbers, int class_dim, SymInt num_classes, "
      "int ignore_index) -> Tensor");
  // The same in place.
  m.def(
      "class_norm_backward_(Tensor(a!) gradient, Tensor student, Tensor? target, Tensor? sample_weight, "
      "Tensor moments, Tensor sums, Tensor factor, int[] structure, Tensor numbers, int class_dim, "
      "SymInt num_classes, int ignore_index) -> ()");
  // Multiplies a gradient by a scalar or by one factor a sample; a scalar 1 touches no memory, and 0 stays 0.
  m.def("scale_(Tensor(a!) gradient, Tensor factor, int class_dim) -> ()");
  // Columns of parts, K, S and G.
  m.def("sizes(int[] structure) -> int[]");
  m.def("cpu_instruction_set() -> int");
  m.def("cpu_instruction_sets() -> int[]");
  m.def("set_cpu_instruction_set(int index) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("fused", TORCH_BOX(&fused));
  m.impl("evaluate", TORCH_BOX(&evaluate));
  m.impl("select", TORCH_BOX(&select_op));
  m.impl("reduce", TORCH_BOX(&reduce_op));
  m.impl("finalize", TORCH_BOX(&finalize_op));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("class_sums", TORCH_BOX(&class_sums));
  m.impl("class_moments", TORCH_BOX(&class_moments));
  m.impl("class_norm_backward", TORCH_BOX(&class_norm_backward));
  m.impl("class_norm_backward_", TORCH_BOX(&class_norm_backward_));
  m.impl("scale_", TORCH_BOX(&scale));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("sizes", TORCH_BOX(&sizes));
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("cpu_instruction_sets", TORCH_BOX(&cpu_instruction_sets));
  m.impl("set_cpu_instruction_set", TORCH_BOX(&set_cpu_instruction_set));
}

}  // namespace
}  // namespace kdk
