// Rows to and from the planes that channels work on: a plane is one class of a tile's samples.
//
// A vector is loaded 16 bytes at a time, each from another row, so that transposing it takes shuffles inside 16 bytes
// only: those of every instruction set, one instruction each.
#pragma once

#include "tile.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kMostSamples = 64;  // of a tile: whole cache lines of every plane
constexpr int kPiece = 4;         // classes in 16 bytes of a row

// The planes of a tile, one a class: `lanes` samples each, a multiple of a vector's, `pitch` apart.
struct Planes {
  float* data;
  int lanes, pitch;

  float* operator[](int64_t plane) const { return data + plane * pitch; }
};

// Lanes of two vectors, one after the other: lane i of the result is lane at[i] of both.
template <class Result, class V, int... At>
inline Result shuffled(V a, V b, std::integer_sequence<int, At...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, At...);
#else
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  Result result{};
  int i = 0;
  ((result[i++] = At < lanes ? a[At % lanes] : b[At % lanes]), ...);
  return result;
#endif
}

// One vector of as many pieces as it takes, each from another row; the rows are kPiece apart.
template <int Lanes = kLanes>
inline typename VecOf<float, Lanes>::type load_pieces(const float* const* rows, int at) {
  using Result = typename VecOf<float, Lanes>::type;
  if constexpr (Lanes == kPiece) {
    Result piece;
    __builtin_memcpy(&piece, rows[0] + at, sizeof piece);
    return piece;
  } else {
    const auto low = load_pieces<Lanes / 2>(rows, at), high = load_pieces<Lanes / 2>(rows + Lanes / 2, at);
    return shuffled<Result>(low, high, std::make_integer_sequence<int, Lanes>());
  }
}
template <int Lanes = kLanes>
inline void store_pieces(float* const* rows, int at, typename VecOf<float, Lanes>::type v) {
  if constexpr (Lanes == kPiece) {
    __builtin_memcpy(rows[0] + at, &v, sizeof v);
  } else {
    store_pieces<Lanes / 2>(rows, at, half<float, Lanes>(v, 0));
    store_pieces<Lanes / 2>(rows + Lanes / 2, at, half<float, Lanes>(v, 1));
  }
}

// The lower (0) or upper (1) halves of all pieces of two vectors, lane by lane in turn.
template <int High, int... I>
inline Vec interleaved(Vec a, Vec b, std::integer_sequence<int, I...>) {
  constexpr int P = kPiece;
  return shuffled<Vec>(a, b,
                       std::integer_sequence<int, I / P * P + High * P / 2 + I % P / 2 + (I % 2 ? kLanes : 0)...>());
}
inline void interleave(Vec& a, Vec& b) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  const Vec low = interleaved<0>(a, b, lanes), high = interleaved<1>(a, b, lanes);
  a = low;
  b = high;
}

// Transposes the squares of kPiece x kPiece numbers of which the vectors hold a row each.
inline void transpose(Vec (&v)[kPiece]) {
  interleave(v[0], v[2]);
  interleave(v[1], v[3]);
  interleave(v[0], v[1]);
  interleave(v[2], v[3]);
}

// Calls body(c) for each piece of the classes, the last one over the one before where it is cut short.
template <class Body>
inline void each_piece(int classes, const Body& body) {
  constexpr int P = kPiece;
  for (int c = 0; c + P <= classes; c += P) body(c);
  if (classes >= P && classes % P) body(classes - P);
}

inline void rows_to_planes(const float* const* rows, int classes, const Planes& planes) {
  constexpr int P = kPiece;
  for (int i = 0; i < planes.lanes; i += kLanes) {
    float* to = planes.data + i;
    each_piece(classes, [&](int c) KDK_INLINE {
      Vec v[P];
      for (int q = 0; q < P; ++q) v[q] = load_pieces(rows + i + q, c);
      transpose(v);
      for (int q = 0; q < P; ++q) store(to + (c + q) * planes.pitch, v[q]);
    });
    for (int c = 0; c < classes && classes < P; ++c)
      for (int l = 0; l < kLanes; ++l) to[c * planes.pitch + l] = rows[i + l][c];
  }
}

inline void planes_to_rows(const Planes& planes, int classes, float* const* rows) {
  constexpr int P = kPiece;
  for (int i = 0; i < planes.lanes; i += kLanes) {
    const float* from = planes.data + i;
    each_piece(classes, [&](int c) KDK_INLINE {
      Vec v[P];
      for (int q = 0; q < P; ++q) v[q] = load(from + (c + q) * planes.pitch);
      transpose(v);
      for (int q = 0; q < P; ++q) store_pieces(rows + i + q, c, v[q]);
    });
    for (int c = 0; c < classes && classes < P; ++c)
      for (int l = 0; l < kLanes; ++l) rows[i + l][c] = from[c * planes.pitch + l];
  }
}

// Some classes, from `begin` on, of at most as many samples as a tile has lanes.
struct SampleBlock {
  int64_t first;
  int samples;
  int64_t begin;
  int classes;
};

// Whether these classes of all samples are one run of memory.
inline bool is_dense(const Problem& p, const Matrix& matrix, int64_t classes) {
  return p.dims == 1 && matrix.class_stride == 1 && matrix.sample_stride[0] == classes;
}

// A block of any strides, to planes. Lanes without a sample repeat the first. `scratch` has room for the tile.
inline void read_rows(const Problem& p, const Matrix& matrix, const SampleBlock& block, float* scratch,
                      const Planes& planes) {
  const float* rows[kMostSamples];
  const auto read = [&](int i, int count) {
    const void* sample = element(p, matrix, block.first + i);
    return read_classes(matrix, sample, block.begin, count, scratch + i * block.classes);
  };
  if (is_dense(p, matrix, block.classes)) {
    const float* all = read(0, block.samples * block.classes);
    for (int i = 0; i < block.samples; ++i) rows[i] = all + i * block.classes;
  } else {
    for (int i = 0; i < block.samples; ++i) rows[i] = read(i, block.classes);
  }
  std::fill(rows + block.samples, rows + planes.lanes, rows[0]);
  rows_to_planes(rows, block.classes, planes);
}

// Planes to a block of any strides. `scratch` has room for the tile.
inline void write_rows(const Problem& p, const Matrix& matrix, const SampleBlock& block, float* scratch,
                       const Planes& planes) {
  float* rows[kMostSamples];
  for (int i = 0; i < planes.lanes; ++i) rows[i] = scratch + i * block.classes;
  const bool direct = in_place(matrix);
  for (int i = 0; i < block.samples && direct; ++i)
    rows[i] = static_cast<float*>(element(p, matrix, block.first + i)) + block.begin;
  planes_to_rows(planes, block.classes, rows);
  if (direct) return;
  const bool dense = is_dense(p, matrix, block.classes);
  const int count = dense ? block.samples * block.classes : block.classes;
  for (int i = 0; i < (dense ? 1 : block.samples); ++i)
    write_classes(matrix, element(p, matrix, block.first + i), block.begin, count, rows[i]);
}

}  // namespace
}  // namespace KDK_NAMESPACE
