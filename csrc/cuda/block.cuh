// A block and its samples: which thread works on what, where that is in shared memory, and how threads share results.
#pragma once

#include "numbers.cuh"

namespace kdk::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
enum Side { kStudent = 0, kTeacher = 1, kGradient = 2 };

extern __shared__ __align__(16) unsigned char shared_memory[];

// Clusters: blocks that can read each other's shared memory.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same variable of another block of the cluster.
template <class P>
__device__ __forceinline__ const P* of_block(const P* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<const P*>(address);
#else
  return shared;
#endif
}

// Visits `first`, `first` + `step`, ... before `end`: kMost of them at once while so many are left, then half as many,
// so that there is little to check and to add up. visit(the first of them, how many as a constant)
template <int kMost, class At, class Step, class Visit>
__device__ __forceinline__ void in_groups(At first, At end, Step step, Visit visit) {
#pragma unroll 1
  for (; first + (kMost - 1) * step < end; first += kMost * step) visit(first, std::integral_constant<int, kMost>{});
  if constexpr (kMost > 1) in_groups<kMost / 2>(first, end, step, visit);
}

// The same, one at a time to see: visit(which).
template <int kMost, class At, class Step, class Visit>
__device__ __forceinline__ void in_turn(At first, At end, Step step, Visit visit) {
  in_groups<kMost>(first, end, step, [&](At at, auto count) {
#pragma unroll
    for (int i = 0; i < count.value; ++i, at += step) visit(at);
  });
}

// Of two numbers, the sum over two lanes that are `distance` apart: of the first one for the lower, of the second one
// for the upper lane.
template <class V>
__device__ __forceinline__ V shared_sum(V first, V second, int distance) {
  const bool upper = threadIdx.x & distance;
  return (upper ? second : first) + __shfl_xor_sync(kAllLanes, upper ? first : second, distance);
}

// A thread's view of its block: it belongs to the team of one sample. Elements of a sample's piece are taken in vectors
// of kWidth; a team's thread takes every so many vectors.
template <class X, Layout kLayout, Use kUse>
struct Block {
  using T = Real<X>;
  static constexpr int kWidth = width(kLayout, sizeof(X));
  static constexpr bool kRows = kLayout == Layout::rows;
  static constexpr bool kAny = kUse == Use::any, kRanks = kUse != Use::simple;

  const Call& call;
  int thread, team, own, member;  // `own`: the thread's sample in the block; `member`: which one of the team it is
  int piece;                      // which one of the sample the block holds
  int begin, count;               // its classes
  int lead;                       // the own sample's slots before its first class
  int vectors;                    // that they take
  int whole;                      // of these, all but a last one that has room left
  int stride, pitch;              // between a sample's slots, and between the samples' first ones
  Sample<T>* samples;
  Entry<T>* entries;           // of the own sample
  Candidate<T>* candidates;    // too
  double* partials;            // of all samples
  GroupStats<double>* groups;  // room for those of one term, of all samples
  Exchange* exchange;
  X* tile[2];  // the own sample's slots: of student (later: its gradient) and teacher

  // The block's samples begin at `first`, a multiple of what a block holds (for pixels, within their run).
  __device__ Block(const Call& call_, int piece_) : call(call_), piece(piece_) {
    const Tiling& tiling = call.tiling;
    const Regions& at = call.regions;
    thread = threadIdx.x;
    team = tiling.team;
    own = kRows ? thread / team : thread % tiling.samples;
    member = kRows ? thread % team : thread / tiling.samples;
    begin = piece * tiling.piece;
    count = static_cast<int>(min(call.classes - begin, static_cast<int64_t>(tiling.piece)));
    samples = reinterpret_cast<Sample<T>*>(shared_memory + at.samples);
    entries = reinterpret_cast<Entry<T>*>(shared_memory + at.entries) + own * tiling.entries;
    candidates = reinterpret_cast<Candidate<T>*>(shared_memory + at.candidates) + own * tiling.candidates;
    partials = reinterpret_cast<double*>(shared_memory + at.partials);
    groups = reinterpret_cast<GroupStats<double>*>(shared_memory + at.groups);
    exchange = reinterpret_cast<Exchange*>(shared_memory + at.exchange);
    pitch = kRows ? slots(kLayout, tiling.piece, sizeof(X)) : 1;
    stride = kRows ? 1 : tiling.samples;
    tile[kStudent] = reinterpret_cast<X*>(shared_memory + at.student) + own * pitch;
    tile[kTeacher] = reinterpret_cast<X*>(shared_memory + at.teacher) + own * pitch;
    lead = vectors = whole = 0;
  }

  // The block as the team of another of its samples sees it: that one's entries and slots.
  __device__ Block of_sample(int sample) const {
    Block other = *this;
    const int after = sample - own;
    other.own = sample;
    other.lead = samples[sample].lead;
    other.entries += after * call.tiling.entries;
    other.tile[kStudent] += after * pitch;
    other.tile[kTeacher] += after * pitch;
    return other;
  }

  // Whether the terms see the logits as they are.
  __device__ Standardize standardization() const { return kAny ? call.objective.standardize : Standardize::none; }
  __device__ bool plain() const { return standardization() == Standardize::none; }
  // How many blocks share a sample.
  __device__ int pieces() const { return kAny ? call.tiling.pieces : 1; }
  // Whether what is known of these pieces is in global memory, and not in the blocks of a cluster.
  __device__ bool split() const { return kAny && call.exchange; }

  __device__ Sample<T>& sample() const { return samples[own]; }
  __device__ const Matrix& matrix(int side) const {
    return side == kStudent ? call.student : side == kTeacher ? call.teacher : call.gradient;
  }

  // Slots of the own sample.
  __device__ X& slot(int side, int index) const { return tile[side][index * stride]; }
  __device__ void load(int side, int vector, T* values) const {
    if constexpr (kRows) {
      widen<X>(reinterpret_cast<const Vector*>(tile[side])[vector], values);
    } else {
      const X* at = &slot(side, vector * kWidth);
#pragma unroll
      for (int w = 0; w < kWidth; ++w, at += stride) values[w] = widen(*at);
    }
  }
  __device__ void store(int side, int vector, const T* values) const {
    if constexpr (kRows) {
      reinterpret_cast<Vector*>(tile[side])[vector] = narrow_all<X>(values);
    } else {
      X* at = &slot(side, vector * kWidth);
#pragma unroll
      for (int w = 0; w < kWidth; ++w, at += stride) *at = narrow<X>(values[w]);
    }
  }

  // The slot of a class of the piece, counted from the piece's first.
  __device__ int slot_of(int of_piece) const { return lead + of_piece; }
  // The class, counted in the same way, of a vector's first element; past either end for pads.
  __device__ int class_of(int vector) const { return vector * kWidth - lead; }

  // Sums and maxima over the team. Partial results are in `partials`, `kPartials` a warp (rows) or thread (pixels).
  __device__ int partial_results() const { return partial_count(kLayout, team); }
  __device__ double* partial(int of_sample, int result) const {
    return partials + (result * call.tiling.samples + of_sample) * kPartials;
  }
  __device__ int own_result() const { return kRows ? member / 32 : member; }
  __device__ bool writes_result() const { return !kRows || member % 32 == 0; }
  template <class V, class Op>
  __device__ V over_lanes(V value, Op op) const {
    if constexpr (kRows) {
      if (team >= 32) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
          value = op(value, __shfl_xor_sync(kAllLanes, value, distance));
      } else {
        for (int distance = team / 2; distance > 0; distance /= 2)
          value = op(value, __shfl_xor_sync(kAllLanes, value, distance));
      }
    }
    return value;
  }
  // To be read by total(), after a barrier.
  __device__ void put(int column, double value) const {
    value = over_lanes(value, [](double a, double b) { return a + b; });
    if (writes_result()) partial(own, own_result())[column] = value;
  }
  // The same for four columns at once. Each step halves what a lane adds up: the first its columns, the others the
  // lanes.
  __device__ void put_four(int column, const double* values) const {
    if constexpr (kRows) {
      const int lane = member % 32;
      double value = shared_sum(shared_sum(values[0], values[1], 1), shared_sum(values[2], values[3], 1), 2);
      for (int distance = 4; distance < min(team, 32); distance *= 2)
        value += __shfl_xor_sync(kAllLanes, value, distance);
      if (lane < 4) partial(own, own_result())[column + lane] = value;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) partial(own, own_result())[column + i] = values[i];
    }
  }
  __device__ double total(int of_sample, int column) const {
    double sum = 0;
    for (int i = 0; i < partial_results(); ++i) sum += partial(of_sample, i)[column];
    return sum;
  }
  // The maximum over the team, known to all of it. All threads of the block must call it; it ends with a barrier.
  template <int kCount>
  __device__ void maximum(T* values) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = over_lanes(values[i], Larger{});
    maximum_of_warps<kCount>(values);
  }
  // The same of values that are alike in each of a team's warps.
  template <int kCount>
  __device__ void maximum_of_warps(T* values) const {
    if (partial_results() == 1) return __syncwarp();
    if (writes_result())
      for (int i = 0; i < kCount; ++i) partial(own, own_result())[i] = values[i];
    __syncthreads();
    for (int result = 0; result < partial_results(); ++result)
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = larger(values[i], static_cast<T>(partial(own, result)[i]));
    __syncthreads();
  }
};

// The block's place among the samples.
struct Place {
  int64_t outer, inner;  // pixels: the run's place in the outer dimensions, and the first sample's in the innermost one
  int64_t first;         // the first sample's number
  int count;             // samples that are there
};

template <Layout kLayout>
__device__ __forceinline__ int64_t blocks_of_samples(const Call& call) {
  const int64_t samples = call.tiling.samples, run = kLayout == Layout::rows ? call.samples : call.inner();
  return call.samples / run * ((run + samples - 1) / samples);
}

template <Layout kLayout>
__device__ __forceinline__ Place place_of(const Call& call, int64_t block) {
  const int samples = call.tiling.samples;
  if constexpr (kLayout == Layout::rows) {
    const int64_t first = block * samples;
    return {0, 0, first, static_cast<int>(min(call.samples - first, static_cast<int64_t>(samples)))};
  } else {
    const int64_t size = call.inner(), blocks = (size + samples - 1) / samples;
    const int64_t outer = block / blocks, inner = block % blocks * samples;
    return {outer, inner, outer * size + inner, static_cast<int>(min(size - inner, static_cast<int64_t>(samples)))};
  }
}

// Offset of a sample's first logit.
__device__ __forceinline__ int64_t offset_of(const Call& call, const Matrix& matrix, int64_t sample) {
  int64_t offset = 0;
  for (int d = call.dims - 1; d > 0; --d) {
    offset += sample % call.sample_size[d] * matrix.sample_stride[d];
    sample /= call.sample_size[d];
  }
  return call.dims > 0 ? offset + sample * matrix.sample_stride[0] : 0;
}

}  // namespace kdk::cuda
