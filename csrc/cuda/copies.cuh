// Between global and shared memory: each logit is read once and each gradient is written once, 16 bytes at a time where
// the matrices' alignment allows.
#pragma once

#include "block.cuh"

namespace kdk::cuda {

__device__ __forceinline__ void copy_16_bytes(unsigned shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
  copy_16_bytes(static_cast<unsigned>(__cvta_generic_to_shared(shared)), global);
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Whether a row can be copied in vectors: it lies in memory as in its slots.
template <class X, Use kUse>
__device__ __forceinline__ bool row_in_vectors(const Block<X, Layout::rows, kUse>& block, int side, int64_t first) {
  const Matrix& matrix = block.matrix(side);
  const auto address = reinterpret_cast<uintptr_t>(static_cast<const X*>(matrix.data) + first);
  return matrix.dtype == dtype_of<X> && matrix.class_stride == 1 &&
         address / sizeof(X) % block.kWidth == static_cast<unsigned>(block.lead);
}

// Visits the slots of a row's first and last vector where these are not whole: visit(slot, whether it is a class).
template <class X, Use kUse, class Visit>
__device__ __forceinline__ void over_edges(const Block<X, Layout::rows, kUse>& block, Visit visit) {
  const int lead = block.lead, end = lead + block.count, whole = block.whole;
  if (lead == 0 && whole == block.vectors) return;
  for (int i = block.member; i < 2 * block.kWidth; i += block.team) {
    const bool tail = i >= block.kWidth;
    const int slot = tail ? whole * block.kWidth + i - block.kWidth : i;
    if (tail ? slot < block.vectors * block.kWidth && (whole > 0 || lead == 0) : lead > 0)
      visit(slot, slot >= lead && slot < end);
  }
}

// Whether a block of pixels can be: all of them are there, and every class of them begins at a multiple of 16 bytes.
template <class X, Use kUse>
__device__ __forceinline__ bool pixels_in_vectors(const Block<X, Layout::pixels, kUse>& block, int side,
                                                  const Place& place) {
  const Matrix& matrix = block.matrix(side);
  const int samples = block.call.tiling.samples;
  const auto address = reinterpret_cast<uintptr_t>(static_cast<const X*>(matrix.data) + block.samples[0].offset[side]);
  return matrix.dtype == dtype_of<X> && block.call.dims > 0 && matrix.sample_stride[block.call.dims - 1] == 1 &&
         place.count == samples && samples * sizeof(X) % 16 == 0 && address % 16 == 0 &&
         matrix.class_stride * static_cast<int64_t>(sizeof(X)) % 16 == 0;
}

// Visits the thread's share of the vectors of a block's pixels: visit(where it is in the tile, and in the matrix).
template <class X, Use kUse, class Visit>
__device__ __forceinline__ void over_pixel_vectors(const Block<X, Layout::pixels, kUse>& block, X* tile,
                                                   const Matrix& matrix, int64_t offset, Visit visit) {
  constexpr int kElements = 16 / sizeof(X);
  const int samples = block.call.tiling.samples, of_class = samples / kElements;
  const int first = block.thread / of_class, step = block.call.tiling.threads() / of_class;  // classes
  X* slot = tile - block.own + block.thread * kElements;
  X* at = static_cast<X*>(matrix.data) + offset + (block.begin + first) * matrix.class_stride +
          block.thread % of_class * kElements;
  const int slots_apart = step * samples;
  const int64_t apart = step * matrix.class_stride;
  in_turn<4>(first, block.count, step, [&](int) {
    visit(reinterpret_cast<Vector*>(slot), reinterpret_cast<Vector*>(at));
    slot += slots_apart;
    at += apart;
  });
}

// Starts to read a side's logits. Slots without a logit that counts get -inf.
template <class X, Layout kLayout, Use kUse>
__device__ void copy_in(const Block<X, kLayout, kUse>& block, int side, const Place& place) {
  using T = Real<X>;
  const Call& call = block.call;
  const Matrix& matrix = block.matrix(side);
  const Sample<T>& sample = block.sample();
  const int slots = block.vectors * block.kWidth;
  const X none = narrow<X>(minus_infinity<T>());
  const int64_t first = sample.offset[side] + block.begin * matrix.class_stride;
  if constexpr (kLayout == Layout::rows) {
    if (sample.valid && row_in_vectors(block, side, first)) {
      const X* from = static_cast<const X*>(matrix.data) + first - block.lead;  // where slot 0 would be
      X* to = block.tile[side];
      const int begin = block.member + (block.lead > 0);
      const auto* global = reinterpret_cast<const Vector*>(from) + begin;
      const unsigned slots_at = static_cast<unsigned>(__cvta_generic_to_shared(to));
      const unsigned end = slots_at + block.whole * sizeof(Vector), step = block.team * sizeof(Vector);
      in_turn<4>(slots_at + begin * static_cast<unsigned>(sizeof(Vector)), end, step, [&](unsigned at) {
        copy_16_bytes(at, global);
        global += block.team;
      });
      over_edges(block, [&](int i, bool inside) { to[i] = inside ? from[i] : none; });
      return;
    }
  } else {
    if (pixels_in_vectors(block, side, place)) {
      over_pixel_vectors(block, block.tile[side], matrix, block.samples[0].offset[side],
                         [](Vector* slot, const Vector* at) { copy_16_bytes(slot, at); });
      for (int i = block.count + block.member; i < slots; i += block.team) block.slot(side, i) = none;
      return;
    }
  }
#pragma unroll 4
  for (int i = block.member; i < slots; i += block.team) {
    const int c = i - block.lead;
    const bool inside = sample.valid && static_cast<unsigned>(c) < static_cast<unsigned>(block.count);
    block.slot(side, i) =
        inside ? narrow<X>(load_as<T>(matrix.data, matrix.dtype, first + c * matrix.class_stride)) : none;
  }
}

// Reads the piece's logits of both sides.
template <class X, Layout kLayout, Use kUse>
__device__ void copy_in(const Block<X, kLayout, kUse>& block, const Place& place) {
  copy_in(block, kStudent, place);
  copy_in(block, kTeacher, place);
  wait_for_copies();
  __syncthreads();
  if constexpr (kLayout == Layout::pixels) {
    // What was copied with its neighbours but does not count.
    if (!block.sample().valid) {
      const X none = narrow<X>(minus_infinity<Real<X>>());
      for (int i = block.member; i < block.count; i += block.team)
        block.slot(kStudent, i) = block.slot(kTeacher, i) = none;
    }
    __syncthreads();
  }
}

// Writes the gradient from the student's slots (zeros if `zero`), and zeros for the classes that are not compared.
template <class X, Layout kLayout, Use kUse>
__device__ void copy_out(const Block<X, kLayout, kUse>& block, const Place& place, bool zero = false) {
  using T = Real<X>;
  const Call& call = block.call;
  const Matrix& matrix = call.gradient;
  const Sample<T>& sample = block.sample();
  const int64_t first = sample.offset[kGradient] + block.begin * matrix.class_stride;
  const X nothing = narrow<X>(T(0));
  bool done = false;
  if constexpr (kLayout == Layout::rows) {
    if (sample.number >= 0 && row_in_vectors(block, kGradient, first)) {
      X* to = static_cast<X*>(matrix.data) + first - block.lead;
      const X* from = block.tile[kStudent];
      const int begin = block.member + (block.lead > 0);
      auto* global = reinterpret_cast<Vector*>(to) + begin;
      in_turn<4>(begin, block.whole, block.team, [&](int v) {
        *global = zero ? Vector{} : reinterpret_cast<const Vector*>(from)[v];
        global += block.team;
      });
      over_edges(block, [&](int i, bool inside) {
        if (inside) to[i] = zero ? nothing : from[i];
      });
      done = true;
    }
  } else {
    if (pixels_in_vectors(block, kGradient, place)) {
      over_pixel_vectors(block, block.tile[kStudent], matrix, block.samples[0].offset[kGradient],
                         [&](const Vector* slot, Vector* at) { *at = zero ? Vector{} : *slot; });
      done = true;
    }
  }
  if (sample.number < 0) return;
  if (!done) {
    for (int c = block.member; c < block.count; c += block.team) {
      const X value = zero ? nothing : block.slot(kStudent, block.slot_of(c));
      store_as<T>(matrix.data, matrix.dtype, first + c * matrix.class_stride, widen(value));
    }
  }
  if (block.begin + block.count == call.classes)
    for (int64_t c = call.classes + block.member; c < call.gradient_classes; c += block.team)
      store_as<T>(matrix.data, matrix.dtype, sample.offset[kGradient] + c * matrix.class_stride, T(0));
}

}  // namespace kdk::cuda
