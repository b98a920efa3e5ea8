// LOAD and STORE: whatever varies by input ends here. A tile is dense float32 in cache, whatever dtype and strides the
// logits have.
#pragma once

#include "simd.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kTile = 2048;  // classes of a tile of a row: both sides, exponentials and gradient stay in L1

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

// Vectors of a tile in which classes are absent: where they are, ascending, and what is taken instead of the logits.
struct Patches {
  alignas(64) float student[kTile], teacher[kTile];
  int at[kTile / kLanes];
  int count = 0;
};

// Some classes of one sample, both sides: where they are in memory, but for the patches. `count` is of whole vectors.
struct Tile {
  const float* student;
  const float* teacher;
  int count;
  const Patches* patches = nullptr;
};

struct Maxima {
  float student = -INFINITY, teacher = -INFINITY;

  bool deep() const { return !(student > kDeep && teacher > kDeep); }
};

// Makes a tile of classes without those in the holes, and finds the maxima.
inline Maxima load_tile(const float* student, const float* teacher, int count, const Holes& holes, float absent,
                        Patches& patches, Tile& tile) {
  constexpr int W = kLanes;
  tile = {student, teacher, static_cast<int>(round_up(count, W)), &patches};
  Vec top_s[2] = {broadcast(-INFINITY), broadcast(-INFINITY)}, top_t[2] = {top_s[0], top_s[0]};
  const auto look_at = [&](Vec s, Vec t, int chain) KDK_INLINE {
    top_s[chain] = max(s, top_s[chain]);
    top_t[chain] = max(t, top_t[chain]);
  };
  patches.count = 0;
  int i = 0, hole = 0;
  while (true) {
    const int whole = (hole < holes.count ? holes.at[hole] : count) / W * W;
    for (; i + 2 * W <= whole; i += 2 * W) {
      look_at(load(student + i), load(teacher + i), 0);
      look_at(load(student + i + W), load(teacher + i + W), 1);
    }
    for (; i < whole; i += W) look_at(load(student + i), load(teacher + i), 0);
    if (i >= count) break;
    Vec s = load_first(student + i, count - i, absent), t = load_first(teacher + i, count - i, absent);
    for (; hole < holes.count && holes.at[hole] < i + W; ++hole) {
      const Ints gone = kLaneIndex == holes.at[hole] - i;  // a store to a lane would have to be waited for
      s = gone ? broadcast(absent) : s;
      t = gone ? broadcast(absent) : t;
    }
    store(patches.student + patches.count * W, s);
    store(patches.teacher + patches.count * W, t);
    look_at(s, t, 1);
    patches.at[patches.count++] = i;
    i += W;
  }
  return {horizontal_max(max(top_s[0], top_s[1])), horizontal_max(max(top_t[0], top_t[1]))};
}

// Whole vectors.
inline int padded(int64_t count) { return static_cast<int>(round_up(count, kLanes)); }

}  // namespace
}  // namespace KDK_NAMESPACE
