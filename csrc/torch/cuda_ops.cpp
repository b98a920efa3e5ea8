// The ops of CUDA tensors: unpacks tensors, chooses kernels and launches them. Nothing here waits for the device.
//
// They are a namespace of their own, so that tests can call them with CPU tensors, on which a simulator runs kernels.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "../cuda/driver.h"
#include "../cuda/small.h"
#include "arguments.h"

namespace kdk::cuda {
namespace {

// What forward returns: the loss and, where they were asked for, its parts, the gradient, saved numbers and members.
using Forward =
    std::tuple<Tensor, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

Objective decoded(const std::vector<int64_t>& structure, const Tensor& numbers, int64_t classes) {
  auto objective = kdk::decoded<Objective>(
      structure, numbers,
      [](const double* values, int64_t count, Objective& into) { return decode_numbers(values, count, into); });
  drop_single_groups(objective, classes);
  return objective;
}

// Launches go to the tensor's device, and to torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda() != simulated(),
                    "ValueError: the CUDA kernels take CUDA tensors, a simulator CPU's");
    if (simulated()) return;
    guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(tensor.get_device_index());
    try {
      use_device(tensor.get_device_index());
    } catch (const std::exception& error) {
      STD_TORCH_CHECK(false, error.what());
    }
    // torch's CUDA library is loaded where there are CUDA tensors; what is built without it cannot link it.
    using CurrentStream = int32_t (*)(int32_t, void**);
    static const auto current = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(current, "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(current(tensor.get_device_index(), &stream_) == 0, "no current CUDA stream");
  }
  void* stream() const { return stream_; }

 private:
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// Parameters of a kernel, and the tensors that they point at.
template <class P>
class Parameters {
 public:
  P values{};

  template <class V>
  void point(const char* name, V*& at, const Tensor& tensor, bool fresh = false) {
    point(name, &at, tensor.data_ptr(), tensor, fresh);
  }
  void point(const char* name, Matrix& matrix, const Tensor& tensor, bool fresh = false) {
    point(name, &matrix.data, tensor.data_ptr(), tensor, fresh);
  }
  void launch(const Launch& how, const OnDevice& device) {
    try {
      kdk::cuda::launch(how, &values, sizeof(P), buffers_, device.stream());
    } catch (const std::exception& error) {
      STD_TORCH_CHECK(false, error.what());
    }
    for (Buffer& buffer : buffers_) buffer.fresh = 0;
  }

 private:
  void point(const char* name, void* at, void* data, const Tensor& tensor, bool fresh) {
    std::memcpy(at, &data, sizeof(data));
    Buffer buffer{};
    buffer.name = name;
    buffer.offset = static_cast<char*>(at) - reinterpret_cast<char*>(&values);
    buffer.data = data;
    buffer.element_bytes = static_cast<int64_t>(tensor.element_size());
    buffer.dims = tensor.dim();
    buffer.fresh = fresh;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      buffer.sizes[d] = tensor.size(d);
      buffer.strides[d] = tensor.stride(d);
    }
    std::erase_if(buffers_, [&](const Buffer& other) { return other.offset == buffer.offset; });
    buffers_.push_back(buffer);
  }

  std::vector<Buffer> buffers_;
};

Tensor typed(const Tensor& tensor, ScalarType dtype) {
  const Tensor right = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return right.is_contiguous() ? right : torch::stable::contiguous(right);
}

Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes) {
  Tensor tensor = new_tensor(like, sizes, ScalarType::Double);
  torch::stable::zero_(tensor);
  return tensor;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of as many threads as there are numbers for each, within limits.
Launch small_launch(const char* kernel, int64_t blocks, int64_t numbers = kSumThreads) {
  Launch launch;
  launch.kernel = kernel;
  launch.blocks = blocks;
  launch.threads = round_up(static_cast<int>(std::clamp<int64_t>(numbers, 1, kSumThreads)), 32);
  return launch;
}

const Device& device_limits() {
  try {
    return current_device();
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, error.what());
  }
  return current_device();
}

// One op's call: its kernels' parameters, and the tensors that live as long.
struct Step {
  const Tensor& student;
  const OnDevice device;
  Parameters<Call> parameters;
  ScalarType dtype;  // of the arithmetic
  std::vector<Tensor> held;

  Step(const Tensor& student_, const Tensor& teacher, int64_t num_classes, int64_t class_dim, const Tensor* gradient)
      : student(student_), device(student_) {
    Call& call = parameters.values;
    const bool wide = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
    dtype = wide ? ScalarType::Double : ScalarType::Float;
    call.classes = num_classes;
    call.gradient_classes = student.size(class_dim);
    std::vector<std::pair<Matrix*, const Tensor*>> sides{{&call.student, &student}, {&call.teacher, &teacher}};
    if (gradient) sides.emplace_back(&call.gradient, gradient);
    set_layout(call, sides, class_dim);
    parameters.point("student", call.student, student);
    parameters.point("teacher", call.teacher, teacher);
    if (gradient) parameters.point("gradient", call.gradient, *gradient, true);
  }

  Call& call() { return parameters.values; }

  // The tiling of kernels that look at any piece of a sample.
  Tiling pieces() {
    const auto tiling = piece_tiling(call(), device_limits());
    STD_TORCH_CHECK(tiling,
                    "ValueError: the leading classes of a sample do not fit in the GPU's shared memory, which has ",
                    device_limits().shared_bytes, " bytes a block");
    return *tiling;
  }

  // The tensor in the kernels' type, which the parameters point at.
  template <class V>
  std::optional<Tensor> read(const char* name, V*& at, const std::optional<Tensor>& tensor, ScalarType as) {
    if (!tensor) return std::nullopt;
    held.push_back(typed(*tensor, as));
    parameters.point(name, at, held.back());
    return held.back();
  }

  // New memory for a kernel to write.
  template <class V>
  Tensor room(const char* name, V*& at, const std::vector<int64_t>& sizes, ScalarType as) {
    held.push_back(new_tensor(student, sizes, as));
    parameters.point(name, at, held.back(), true);
    return held.back();
  }

  void launch(const char* step, bool clustered = false) {
    parameters.launch(configure(step, call(), clustered), device);
  }

  // The sums of the columns of a table.
  void sum_rows(const Tensor& table, Tensor& out) {
    Parameters<RowSum> sum;
    sum.values.rows = table.size(0);
    sum.values.columns = table.size(1);
    sum.values.to_float = out.scalar_type() == ScalarType::Float;
    sum.point("values", sum.values.values, table);
    sum.point("out", sum.values.out, out, true);
    sum.launch(small_launch("kdk_row_sum", sum.values.columns, sum.values.rows), device);
  }

  // The sum of the weights of the samples that count.
  void weight_sum(const std::optional<Tensor>& target, const std::optional<Tensor>& weight) {
    Parameters<WeightSum> sum;
    sum.values.samples = call().samples;
    sum.values.ignore_index = call().ignore_index;
    if (target) sum.point("target", sum.values.target, *target);
    if (weight) sum.point("weight", sum.values.weight, *weight);
    const int64_t blocks = ceil_div(call().samples, kWeightsOfBlock);
    held.push_back(new_tensor(student, {blocks, 1}, ScalarType::Double));
    const Tensor sums = held.back();
    sum.point("sums", sum.values.out, sums, true);
    sum.launch(small_launch("kdk_weight_sum", blocks, call().samples), device);
    Tensor divisor = sums;
    if (blocks > 1) {
      held.push_back(new_tensor(student, {1}, ScalarType::Double));
      divisor = held.back();
      sum_rows(sums, divisor);
    }
    parameters.point("divisor", call().divisor, divisor);
  }

  // The table of what standardises each class, if something does.
  std::optional<Tensor> affines(const std::optional<Tensor>& moments, const std::optional<Tensor>& sums) {
    const bool by_class = call().objective.standardize == Standardize::by_class;
    const int64_t classes = call().classes;
    STD_TORCH_CHECK(by_class == moments.has_value(),
                    "ValueError: moments must be given where, and only where, logits are standardised by class");
    if (!moments) return std::nullopt;
    STD_TORCH_CHECK(moments->numel() == 6 * classes, "ValueError: moments must have 2 x 3 x ", classes, " numbers");
    STD_TORCH_CHECK(!sums || sums->numel() == 2 * classes, "ValueError: sums must have 2 x ", classes, " numbers");
    const Tensor table = room("affines", call().affines, {kAffineRows, classes}, dtype);
    Parameters<Affines> of_class;
    held.push_back(typed(*moments, ScalarType::Double));
    of_class.point("moments", of_class.values.moments, held.back());
    if (sums) {
      held.push_back(typed(*sums, ScalarType::Double));
      of_class.point("sums", of_class.values.sums, held.back());
    }
    of_class.point("affines", of_class.values.table, table, true);
    of_class.values.classes = classes;
    of_class.values.correction = call().objective.correction;
    of_class.values.eps = call().objective.eps;
    of_class.values.to_float = dtype == ScalarType::Float;
    of_class.launch(small_launch("kdk_affines", ceil_div(classes, kSumThreads)), device);
    parameters.point("affines", call().affines, table);
    return table;
  }

  // Statistics of pieces of the samples, their merge, and a sweep for the gradient: where samples do not fit on chip.
  void split();

  // A launch whose threads keep to a few classes, as the tiling says, while samples stream by.
  Launch streaming(const char* step) {
    call().stretch = stretch_of(call(), device_limits());
    return configure_classes(step, call());
  }
  Launch streaming(const char* step, int sides) {
    call().tiling = class_tiling(call(), device_limits(), sides);
    return streaming(step);
  }
};

void Step::split() {
  Call& call = parameters.values;
  const int64_t samples = call.samples, pieces = samples * call.tiling.pieces;
  const bool by_sample = call.objective.standardize == Standardize::by_sample;
  const bool wide = dtype == ScalarType::Double;
  if (!call.saved) {
    room("saved", call.saved, {samples, saved_size(call.objective)}, dtype);
    if (members_size(call.objective) > 0)
      room("members", call.members, {samples, members_size(call.objective)}, ScalarType::Long);
  }
  room("exchange", call.exchange, {pieces, static_cast<int64_t>(sizeof(Exchange) / sizeof(double))},
       ScalarType::Double);
  if (call.tiling.entries > 0) {
    const auto bytes = static_cast<int64_t>(wide ? sizeof(Entry<double>) : sizeof(Entry<float>));
    static_assert(sizeof(Entry<double>) % 4 == 0 && sizeof(Entry<float>) % 4 == 0);
    room("entries", call.entries, {pieces * call.tiling.entries, bytes / 4}, ScalarType::Float);
  }
  if (by_sample) launch("part_moments");
  launch("part_statistics");
  const Tiling of_pieces = call.tiling;
  call.tiling = merge_tiling(call);
  parameters.launch(configure_merge("merge_parts", call), device);
  call.tiling = of_pieces;
  if (by_sample) {
    launch("part_products");
    parameters.launch(configure_merge("merge_products", call), device);
  }
  if (call.gradient.data) launch("backward");
}

// Backward steps read the logits and what forward saved of each sample. The gradient from above is 1 if none is given.
struct BackwardStep : Step {
  BackwardStep(const std::optional<Tensor>& grad_loss, const Tensor& student, const Tensor& teacher,
               const std::optional<Tensor>& target, const Tensor& saved, const Tensor& members,
               const std::vector<int64_t>& structure, const Tensor& numbers, int64_t class_dim, int64_t num_classes,
               const Tensor* gradient)
      : Step(student, teacher, num_classes, class_dim, gradient) {
    call().set(decoded(structure, numbers, num_classes));
    read("target", call().target, target, ScalarType::Long);
    read("grad_loss", call().upstream, grad_loss, ScalarType::Double);
    call().upstream_each = grad_loss && grad_loss->dim() > 0;
    parameters.point("saved", call().saved, saved);
    if (members.numel() > 0) parameters.point("members", call().members, members);
  }
};

Tensor backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                const std::optional<Tensor>& target, const Tensor& saved, const Tensor& members,
                const std::optional<Tensor>& moments, const std::optional<Tensor>& sums,
                const std::vector<int64_t>& structure, const Tensor& numbers, int64_t class_dim, int64_t num_classes) {
  STD_TORCH_CHECK(moments.has_value() == sums.has_value(), "ValueError: sums must be given with moments");
  Tensor gradient = torch::stable::empty_like(student);
  BackwardStep step(grad_loss, student, teacher, target, saved, members, structure, numbers, class_dim, num_classes,
                    &gradient);
  if (step.call().samples == 0) return gradient;
  if (!step.affines(moments, sums)) {
    step.call().tiling = step.pieces();
    step.launch("backward");
  } else if (const auto lanes = lane_tiling(step.call())) {
    step.call().tiling = *lanes;
    step.launch("lane_gradient");
  } else {
    step.parameters.launch(step.streaming("class_gradient", 1), step.device);
  }
  return gradient;
}

// The sum over stretches of samples of what a launch adds up for each class.
Tensor over_stretches(Step& step, const Launch& launch, const char* merge, int sides,
                      const std::vector<int64_t>& sizes) {
  Call& call = step.call();
  const int64_t stretches = launch.blocks / call.tiling.pieces;
  Tensor out = new_tensor(step.student, sizes, ScalarType::Double);
  int64_t numbers = 1;
  for (const int64_t size : sizes) numbers *= size;
  Tensor partial = stretches == 1 ? out : new_tensor(step.student, {stretches, numbers}, ScalarType::Double);
  step.held.push_back(partial);
  step.parameters.point("sums", call.sums, partial, true);
  step.parameters.launch(launch, step.device);
  if (stretches > 1) {
    Parameters<StretchMerge> merged;
    merged.values.stretches = stretches;
    merged.values.columns = sides > 1 ? call.classes : numbers;
    // As many threads a column as have something to add up, but whole sectors of memory.
    constexpr int kFewestColumns = 8;
    int& columns = merged.values.columns_of_block = kSumThreads;
    while (columns > kFewestColumns && kSumThreads / columns < stretches) columns /= 2;
    merged.point("partial", merged.values.partial, partial);
    merged.point("sums", merged.values.out, out, true);
    merged.launch(small_launch(merge, ceil_div(sides * merged.values.columns, columns)), step.device);
  }
  return out;
}

Tensor class_moments(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target,
                     const std::optional<Tensor>& sample_weight, int64_t class_dim, int64_t num_classes,
                     int64_t ignore_index) {
  Step step(student, teacher, num_classes, class_dim, nullptr);
  step.call().ignore_index = ignore_index;
  step.read("target", step.call().target, target, ScalarType::Long);
  step.read("weight", step.call().weight, sample_weight, ScalarType::Double);
  if (step.call().samples == 0) return zeros(student, {2, 3, num_classes});
  return over_stretches(step, step.streaming("class_moments", 2), "kdk_merge_moments", 2, {2, 3, num_classes});
}

Tensor sums_of_classes(BackwardStep& step) {
  Call& call = step.call();
  Launch launch;
  if (const auto lanes = lane_tiling(call)) {
    call.tiling = *lanes;
    call.stretch = lane_stretch_of(call, device_limits());
    launch = configure("lane_sums", call, false);
  } else {
    launch = step.streaming("class_sums", 1);
  }
  return over_stretches(step, launch, "kdk_add_stretches", 1, {2, call.classes});
}

Tensor class_sums(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                  const std::optional<Tensor>& target, const Tensor& saved, const Tensor& members,
                  const Tensor& moments, const std::vector<int64_t>& structure, const Tensor& numbers,
                  int64_t class_dim, int64_t num_classes) {
  BackwardStep step(grad_loss, student, teacher, target, saved, members, structure, numbers, class_dim, num_classes,
                    nullptr);
  if (step.call().samples == 0) return zeros(student, {2, num_classes});
  step.affines(moments, std::nullopt);
  return sums_of_classes(step);
}

Forward forward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target,
                const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& denominator,
                const std::optional<Tensor>& moments, const std::vector<int64_t>& structure, const Tensor& numbers,
                double scale, int64_t reduction_index, int64_t class_dim, int64_t num_classes, int64_t ignore_index,
                bool gradient, bool save, bool parts, const std::optional<std::string>&) {
  const auto reduction = static_cast<Reduction>(reduction_index);
  const bool by_class = moments.has_value(), each = reduction == Reduction::none;
  STD_TORCH_CHECK(save || !by_class || !gradient, "ValueError: save must go with gradient where there are moments");
  std::optional<Tensor> grad;
  if (gradient && !by_class) grad = torch::stable::empty_like(student);
  Step step(student, teacher, num_classes, class_dim, grad ? &*grad : nullptr);
  Call& call = step.call();
  call.set(decoded(structure, numbers, num_classes));
  call.ignore_index = ignore_index;
  call.scale = scale;
  call.each = each;
  const int64_t samples = call.samples, columns = call.objective.parts();

  std::vector<int64_t> shape;
  for (int64_t d = 0; d < student.dim() && each; ++d)
    if (d != class_dim) shape.push_back(student.size(d));
  std::vector<int64_t> part_shape = shape;
  part_shape.push_back(columns);
  Tensor loss = new_tensor(student, shape, step.dtype);
  std::optional<Tensor> part_values, saved, members;
  if (parts) part_values = new_tensor(student, part_shape, step.dtype);
  if (save) {
    saved = new_tensor(student, {samples, saved_size(call.objective)}, step.dtype);
    members = new_tensor(student, {samples, members_size(call.objective)}, ScalarType::Long);
  }
  if (samples == 0) {
    torch::stable::zero_(loss);
    if (parts) torch::stable::zero_(*part_values);
    if (gradient && by_class) grad = zeros(student, {2, num_classes});
  } else {
    const Tiling of_pieces = step.pieces();  // nothing is launched where backward could not be
    const auto of_target = step.read("target", call.target, target, ScalarType::Long);
    const auto of_weight = step.read("weight", call.weight, sample_weight, ScalarType::Double);
    step.read("denominator", call.divisor, denominator, ScalarType::Double);
    if (!denominator && reduction == Reduction::mean) {
      if (!target && !sample_weight) {
        call.scale /= static_cast<double>(samples);
      } else {
        step.weight_sum(of_target, of_weight);
      }
    } else if (reduction == Reduction::batchmean) {
      call.scale /= static_cast<double>(student.size(0));
    }
    const std::optional<Tensor> affines = step.affines(moments, std::nullopt);
    if (save) {
      step.parameters.point("saved", call.saved, *saved, true);
      if (members->numel() > 0) step.parameters.point("members", call.members, *members, true);
    }
    const char* kernel = "forward";
    std::optional<Tiling> tiling = statistics_tiling(call);
    if (tiling) {
      call.tiling = *tiling;
      step.room("piece_sums", call.piece_sums, {tiling->pieces, sum_columns(call), samples}, step.dtype);
      step.parameters.launch(step.streaming("class_statistics"), step.device);
      kernel = "class_settle";
      tiling = settling_tiling(call, device_limits());
    } else if (!parts && (tiling = lane_forward_tiling(call))) {
      kernel = "lanes";
    } else {
      tiling = fused_tiling(call, device_limits());
    }
    call.tiling = tiling ? *tiling : of_pieces;
    const int64_t blocks = tiling ? sample_blocks(call) : samples;
    Tensor block_losses = loss;
    std::optional<Tensor> block_parts = part_values;
    if (!each) {
      block_losses = new_tensor(student, {blocks, 1}, ScalarType::Double);
      if (parts) block_parts = new_tensor(student, {blocks, columns}, ScalarType::Double);
    }
    step.parameters.point("losses", call.losses, block_losses, true);
    if (parts) step.parameters.point("parts", call.part_values, *block_parts, true);
    if (tiling) step.launch(kernel, true);
    else step.split();
    if (!each) {
      step.sum_rows(block_losses, loss);
      if (parts) step.sum_rows(*block_parts, *part_values);
    }
    if (gradient && by_class) {
      BackwardStep sums(std::nullopt, student, teacher, target, *saved, *members, structure, numbers, class_dim,
                        num_classes, nullptr);
      sums.parameters.point("affines", sums.call().affines, *affines);
      grad = sums_of_classes(sums);
    }
  }
  return {loss, part_values, grad, saved, members};
}

void scale_(const Tensor& gradient, const Tensor& factor, int64_t class_dim) {
  if (gradient.numel() == 0) return;
  Step step(gradient, gradient, gradient.size(class_dim), class_dim, nullptr);
  step.read("factor", step.call().upstream, factor, ScalarType::Double);
  step.call().upstream_each = factor.dim() > 0;
  step.call().tiling = step.pieces();
  step.launch("scale");
}

std::vector<int64_t> cuda_targets() {
  const std::vector<int> all = targets();
  return {all.begin(), all.end()};
}

bool cuda_serves(int64_t capability) { return serves(static_cast<int>(capability)); }

bool cuda_simulated() { return simulated(); }

int64_t cuda_most_leads(int64_t device) {
  try {
    if (!simulated()) use_device(static_cast<int>(device));
    return most_leads(current_device());
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, error.what());
  }
  return 0;
}

std::vector<int64_t> sizes(const std::vector<int64_t>& structure) {
  const Objective objective = kdk::decoded<Objective>(structure);
  return {objective.parts(), saved_size(objective), members_size(objective)};
}

STABLE_TORCH_LIBRARY(kdkernels_cuda, m) {
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
  // Compute capabilities that the kernels were compiled for; whether a device of some capability can run them.
  m.def("targets() -> int[]");
  m.def("serves(int capability) -> bool");
  m.def("simulated() -> bool");
  // Leading classes of a sample that a device, the current one, has room for.
  m.def("most_leads(int device) -> int");
}

// CPU tensors are for the simulator.
#define KDK_IMPLEMENT(key)                              \
  STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda, key, m) {   \
    m.impl("class_moments", TORCH_BOX(&class_moments)); \
    m.impl("forward", TORCH_BOX(&forward));             \
    m.impl("class_sums", TORCH_BOX(&class_sums));       \
    m.impl("backward", TORCH_BOX(&backward));           \
    m.impl("scale_", TORCH_BOX(&scale_));               \
  }
KDK_IMPLEMENT(CUDA)
KDK_IMPLEMENT(CPU)

STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("sizes", TORCH_BOX(&sizes));
  m.impl("targets", TORCH_BOX(&cuda_targets));
  m.impl("serves", TORCH_BOX(&cuda_serves));
  m.impl("simulated", TORCH_BOX(&cuda_simulated));
  m.impl("most_leads", TORCH_BOX(&cuda_most_leads));
}

}  // namespace
}  // namespace kdk::cuda
