// LOAD and STORE: whatever varies by input ends here. A tile is dense float32 in cache, whatever dtype and strides the
// logits have.
#pragma once

#include "simd.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kTile = 1024;  // classes of a tile of a row: both sides, exponentials and gradient stay in L1

// A selected class in the tile of the rest, or what is behind its end: as a logit far below all others its exponential
// is 0 and its gap finite.
constexpr float kAbsent = -1e30f;
constexpr float kDeep = -1e29f;  // where logits are as low as this, absent classes have to be -inf

inline int64_t dtype_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Calls body with a value of the element type that `dtype` names.
template <class Body>
inline void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f16: return body(Half{});
    case DType::bf16: return body(BFloat16{});
    default: return body(float{});
  }
}

// Where a sample starts, in elements.
inline int64_t sample_offset(const Problem& problem, const Matrix& matrix, int64_t sample) {
  int64_t offset = 0;
  for (int d = problem.dims - 1; d > 0; --d) {
    offset += sample % problem.sample_size[d] * matrix.sample_stride[d];
    sample /= problem.sample_size[d];
  }
  return offset + sample * matrix.sample_stride[0];
}

inline void* element(const Problem& problem, const Matrix& matrix, int64_t sample) {
  return static_cast<char*>(matrix.data) + sample_offset(problem, matrix, sample) * dtype_size(matrix.dtype);
}

// Whether a row's classes can be used where they are.
inline bool in_place(const Matrix& matrix) { return matrix.class_stride == 1 && matrix.dtype == DType::f32; }

// Classes of a row: in place, or in `to` where they have to be converted or gathered.
inline const float* read_classes(const Matrix& matrix, const void* row, int64_t begin, int count, float* to) {
  if (in_place(matrix)) return static_cast<const float*>(row) + begin;
  with_dtype(matrix.dtype, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(row) + begin * matrix.class_stride;
    if (matrix.class_stride == 1) {
      widen_all(from, count, to);
    } else {
      for (int i = 0; i < count; ++i) to[i] = widen(from[i * matrix.class_stride]);
    }
  });
  return to;
}

// Classes of a row, to where they belong.
inline void write_classes(const Matrix& matrix, void* row, int64_t begin, int count, const float* from) {
  with_dtype(matrix.dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(row) + begin * matrix.class_stride;
    if (matrix.class_stride == 1) {
      narrow_all(from, count, to);
    } else {
      for (int i = 0; i < count; ++i) narrow(from[i], to[i * matrix.class_stride]);
    }
  });
}

inline float read_class(const Matrix& matrix, const void* row, int64_t index) {
  float value = 0;
  with_dtype(matrix.dtype, [&](auto element) {
    value = widen(static_cast<const decltype(element)*>(row)[index * matrix.class_stride]);
  });
  return value;
}

// Zeros for the classes of a row in [begin, end).
inline void clear_classes(const Matrix& matrix, void* row, int64_t begin, int64_t end) {
  with_dtype(matrix.dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(row);
    for (int64_t j = begin; j < end; ++j) to[j * matrix.class_stride] = decltype(element){};
  });
}

// A growing array of whole vectors, kept by a thread from call to call.
template <class T>
class Buffer {
 public:
  T* data(int64_t count) {
    if (count > size_) {
      data_.reset(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T), 64))));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0;
};

// A standardised logit is (logit - high) * factor + offset, with the mean split in two, high and a small rest in the
// offset: logit - high is exact where the mean is large against the deviation.
struct Norm {
  float high = 0, factor = 1, offset = 0;

  Norm() = default;
  Norm(double mean, double inv_std)
      : high(static_cast<float>(mean)),
        factor(static_cast<float>(inv_std)),
        offset(static_cast<float>((high - mean) * inv_std)) {}

  float operator()(float logit) const { return (logit - high) * factor + offset; }
};

// One a class, or one a sample of a tile of channels, in whole vectors.
struct Norms {
  const float* high = nullptr;
  const float* factor = nullptr;
  const float* offset = nullptr;

  Norms from(int64_t begin) const { return {high + begin, factor + begin, offset + begin}; }
  float operator()(int64_t j, float logit) const { return (logit - high[j]) * factor[j] + offset[j]; }
  Vec at(int i, Vec logits) const { return (logits - load(high + i)) * load(factor + i) + load(offset + i); }
};

// The positions of selected classes in a tile, ascending.
struct Holes {
  const int* at = nullptr;
  int count = 0;
};

// One sample's classes of both sides, whole pairs of vectors.
struct Tile {
  const float* student;
  const float* teacher;
  int count;
};

struct Maxima {
  float student = -INFINITY, teacher = -INFINITY;

  bool deep() const { return !(student > kDeep && teacher > kDeep); }
};

// Copies classes of both sides to dense arrays, with absent ones in the holes and up to a whole pair of vectors, and
// finds the maxima on the way. The copies may be where the logits are.
inline Maxima load_tile(const float* student, const float* teacher, int count, const Holes& holes, float absent,
                        float* to_student, float* to_teacher) {
  constexpr int W = kLanes;
  Vec top_s[2] = {broadcast(-INFINITY), broadcast(-INFINITY)}, top_t[2] = {top_s[0], top_s[0]};
  const auto move = [&](int i, int chain) KDK_INLINE {
    const Vec s = load(student + i), t = load(teacher + i);
    store(to_student + i, s);
    store(to_teacher + i, t);
    top_s[chain] = max(s, top_s[chain]);
    top_t[chain] = max(t, top_t[chain]);
  };
  int i = 0, hole = 0;
  while (true) {
    const int whole = (hole < holes.count ? holes.at[hole] : count) / W * W;
    for (; i + 2 * W <= whole; i += 2 * W) {
      move(i, 0);
      move(i + W, 1);
    }
    for (; i < whole; i += W) move(i, 0);
    if (i >= count) break;
    store(to_student + i, load_first(student + i, count - i, absent));
    store(to_teacher + i, load_first(teacher + i, count - i, absent));
    for (; hole < holes.count && holes.at[hole] < i + W; ++hole)
      to_student[holes.at[hole]] = to_teacher[holes.at[hole]] = absent;
    top_s[1] = max(load(to_student + i), top_s[1]);
    top_t[1] = max(load(to_teacher + i), top_t[1]);
    i += W;
  }
  if (i % (2 * W)) {
    store(to_student + i, broadcast(absent));
    store(to_teacher + i, broadcast(absent));
  }
  return {horizontal_max(max(top_s[0], top_s[1])), horizontal_max(max(top_t[0], top_t[1]))};
}

// The maxima of classes that are used where they are: whole pairs of vectors.
inline Maxima maxima_of(const Tile& tile) {
  Vec top_s[2] = {broadcast(-INFINITY), broadcast(-INFINITY)}, top_t[2] = {top_s[0], top_s[0]};
  for (int i = 0; i < tile.count; i += 2 * kLanes)
    for (int chain = 0; chain < 2; ++chain) {
      top_s[chain] = max(load(tile.student + i + chain * kLanes), top_s[chain]);
      top_t[chain] = max(load(tile.teacher + i + chain * kLanes), top_t[chain]);
    }
  return {horizontal_max(max(top_s[0], top_s[1])), horizontal_max(max(top_t[0], top_t[1]))};
}

// Whole pairs of vectors.
inline int padded(int64_t count) { return static_cast<int>(round_up(count, 2 * kLanes)); }

}  // namespace
}  // namespace KDK_NAMESPACE
