// Samples whose classes are side by side in memory (rows), to and from the planes that the pixel kernels work on: a
// plane is one class of a tile's samples. Built once per instruction set (see simd.h).
//
// A vector is loaded 16 bytes at a time, each from another row, so that transposing it takes shuffles inside 16 bytes
// only: those of every instruction set, one instruction each.

constexpr int kMostPixels = 64;  // of a tile: whole cache lines of every plane

template <class T>
constexpr int kPiece = 16 / sizeof(T);  // classes in 16 bytes of a row
template <class T>
using Piece = typename VecOfLanes<T, kPiece<T>>::type;

// The planes of a tile: `lanes` samples each, a multiple of a vector's, `pitch` apart.
template <class T>
struct Planes {
  T* data;
  int lanes, pitch;
};

// Some classes, from `begin` on, of at most as many samples as a tile has lanes.
struct SampleBlock {
  int64_t first;
  int samples;
  int64_t begin;
  int classes;
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
template <class T, int Lanes = kLanes<T>>
inline typename VecOfLanes<T, Lanes>::type load_pieces(const T* const* rows, int at) {
  using Result = typename VecOfLanes<T, Lanes>::type;
  if constexpr (Lanes == kPiece<T>) {
    Result piece;
    __builtin_memcpy(&piece, rows[0] + at, sizeof piece);
    return piece;
  } else {
    const auto low = load_pieces<T, Lanes / 2>(rows, at), high = load_pieces<T, Lanes / 2>(rows + Lanes / 2, at);
    return shuffled<Result>(low, high, std::make_integer_sequence<int, Lanes>());
  }
}
template <class T, int Lanes = kLanes<T>>
inline void store_pieces(T* const* rows, int at, typename VecOfLanes<T, Lanes>::type v) {
  if constexpr (Lanes == kPiece<T>) {
    __builtin_memcpy(rows[0] + at, &v, sizeof v);
  } else {
    store_pieces<T, Lanes / 2>(rows, at, half<T, Lanes>(v, 0));
    store_pieces<T, Lanes / 2>(rows + Lanes / 2, at, half<T, Lanes>(v, 1));
  }
}

// The lower (0) or upper (1) halves of all pieces of two vectors, lane by lane in turn.
template <class T, int High, int... I>
inline Vec<T> interleaved(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int P = kPiece<T>;
  return shuffled<Vec<T>>(
      a, b, std::integer_sequence<int, I / P * P + High * P / 2 + I % P / 2 + (I % 2 ? kLanes<T> : 0)...>());
}
template <class T>
inline void interleave(Vec<T>& a, Vec<T>& b) {
  constexpr std::make_integer_sequence<int, kLanes<T>> lanes;
  const Vec<T> low = interleaved<T, 0>(a, b, lanes), high = interleaved<T, 1>(a, b, lanes);
  a = low;
  b = high;
}

// Transposes the squares of kPiece x kPiece numbers of which the vectors hold a row each.
template <class T>
inline void transpose(Vec<T> (&v)[kPiece<T>]) {
  if constexpr (kPiece<T> == 4) {
    interleave<T>(v[0], v[2]);
    interleave<T>(v[1], v[3]);
    interleave<T>(v[0], v[1]);
    interleave<T>(v[2], v[3]);
  } else {
    interleave<T>(v[0], v[1]);
  }
}

// Calls body(c) for each piece of the classes, the last one over the one before where it is cut short.
template <class T, class Body>
inline void each_piece(int classes, const Body& body) {
  constexpr int P = kPiece<T>;
  for (int c = 0; c + P <= classes; c += P) body(c);
  if (classes >= P && classes % P) body(classes - P);
}

template <class T>
void rows_to_planes(const T* const* rows, int classes, const Planes<T>& planes) {
  constexpr int P = kPiece<T>;
  for (int i = 0; i < planes.lanes; i += kLanes<T>) {
    T* to = planes.data + i;
    each_piece<T>(classes, [&](int c) INLINED {
      Vec<T> v[P];
      for (int q = 0; q < P; ++q) v[q] = load_pieces<T>(rows + i + q, c);
      transpose<T>(v);
      for (int q = 0; q < P; ++q) store(to + (c + q) * planes.pitch, v[q]);
    });
    for (int c = 0; c < classes && classes < P; ++c)
      for (int l = 0; l < kLanes<T>; ++l) to[c * planes.pitch + l] = rows[i + l][c];
  }
}

template <class T>
void planes_to_rows(const Planes<T>& planes, int classes, T* const* rows) {
  constexpr int P = kPiece<T>;
  for (int i = 0; i < planes.lanes; i += kLanes<T>) {
    const T* from = planes.data + i;
    each_piece<T>(classes, [&](int c) INLINED {
      Vec<T> v[P];
      for (int q = 0; q < P; ++q) v[q] = load(from + (c + q) * planes.pitch);
      transpose<T>(v);
      for (int q = 0; q < P; ++q) store_pieces<T>(rows + i + q, c, v[q]);
    });
    for (int c = 0; c < classes && classes < P; ++c)
      for (int l = 0; l < kLanes<T>; ++l) rows[i + l][c] = from[c * planes.pitch + l];
  }
}

// Whether these classes of all samples are one run of memory.
inline bool is_dense(const Problem& p, const Matrix& matrix, int64_t classes) {
  return p.dims == 1 && matrix.class_stride == 1 && matrix.sample_stride[0] == classes;
}

// A block of any strides, to planes. Lanes without a sample repeat the first. `scratch` has room for the tile.
template <class T>
void read_rows(const Problem& p, const Matrix& matrix, const SampleBlock& block, T* scratch, const Planes<T>& planes) {
  const T* rows[kMostPixels];
  const auto read = [&](int i, int count) {
    const void* sample = element(p, matrix, block.first + i);
    return read_classes(matrix, sample, block.begin, count, scratch + i * block.classes);
  };
  if (is_dense(p, matrix, block.classes)) {
    const T* all = read(0, block.samples * block.classes);
    for (int i = 0; i < block.samples; ++i) rows[i] = all + i * block.classes;
  } else {
    for (int i = 0; i < block.samples; ++i) rows[i] = read(i, block.classes);
  }
  std::fill(rows + block.samples, rows + planes.lanes, rows[0]);
  rows_to_planes(rows, block.classes, planes);
}

// Classes of a row, to where they belong.
template <class T>
void write_classes(const Matrix& matrix, void* row, int64_t begin, int count, const T* from) {
  with_dtype(matrix.dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(row) + begin * matrix.class_stride;
    if (matrix.class_stride == 1) {
      narrow_all(from, count, to);
    } else {
      for (int i = 0; i < count; ++i) narrow(from[i], to[i * matrix.class_stride]);
    }
  });
}

// Planes to a block of any strides. `scratch` has room for the tile.
template <class T>
void write_rows(const Problem& p, const Matrix& matrix, const SampleBlock& block, T* scratch, const Planes<T>& planes) {
  T* rows[kMostPixels];
  for (int i = 0; i < planes.lanes; ++i) rows[i] = scratch + i * block.classes;
  const bool in_place = matrix.class_stride == 1 && is_arithmetic<T>(matrix.dtype);
  for (int i = 0; i < block.samples && in_place; ++i)
    rows[i] = static_cast<T*>(element(p, matrix, block.first + i)) + block.begin;
  planes_to_rows(planes, block.classes, rows);
  if (in_place) return;
  const bool dense = is_dense(p, matrix, block.classes);
  const int count = dense ? block.samples * block.classes : block.classes;
  for (int i = 0; i < (dense ? 1 : block.samples); ++i)
    write_classes(matrix, element(p, matrix, block.first + i), block.begin, count, rows[i]);
}
