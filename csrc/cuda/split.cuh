// Samples that do not fit on chip: statistics of their pieces, the merge of these, and (backward.cuh) the gradient.
// What is known of the pieces meanwhile is in global memory.
#pragma once

#include "backward.cuh"
#include "settle.cuh"

namespace kdk::cuda {

template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ Exchange& own_exchange(const Block<X, kLayout, kUse>& block, int of_sample) {
  return block.call.exchange[block.samples[of_sample].number * block.call.tiling.pieces + block.piece];
}

template <class T>
__device__ __forceinline__ Entry<T>* piece_entries(const Call& call, int64_t number, int piece) {
  return static_cast<Entry<T>*>(call.entries) + (number * call.tiling.pieces + piece) * call.tiling.entries;
}

// Moments of the pieces of standardised samples.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void part_moments(const Call& call) {
  Block<X, kLayout, kUse> block(call, static_cast<int>(blockIdx.x % call.tiling.pieces));
  const Place place = place_of<kLayout>(call, blockIdx.x / call.tiling.pieces);
  if (!read_samples(block, place, false)) return;
  copy_in(block, place);
  Moments<double> moments[2];
  sample_moments(block, moments);
  if (block.member == 0 && block.sample().valid)
    for (int side = kStudent; side <= kTeacher; ++side) own_exchange(block, block.own).moments[side] = moments[side];
}

// Statistics of the pieces; their entries are kept apart.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void part_statistics(const Call& call) {
  using T = Real<X>;
  Block<X, kLayout, kUse> block(call, static_cast<int>(blockIdx.x % call.tiling.pieces));
  const Place place = place_of<kLayout>(call, blockIdx.x / call.tiling.pieces);
  if (!read_samples(block, place, false)) return;
  Sample<T>& sample = block.sample();
  copy_in(block, place);
  if (call.objective.standardize == Standardize::by_sample) {
    if (block.member == 0) {
      Moments<double> moments[2] = {};
      for (int piece = 0; sample.valid && piece < call.tiling.pieces; ++piece)
        for (int side = kStudent; side <= kTeacher; ++side)
          merge(moments[side], piece_exchange(block, block.own, piece).moments[side]);
      settle_moments(call.objective, moments, sample);
    }
    __syncthreads();
    if (sample.valid) save_standardization(block);
  }
  if (call.tiling.entries > 0) {
    find_entries(block);
    read_logits(block);
    __syncthreads();
    mask_entries(block);
    __syncthreads();
    if (sample.valid)
      for (int e = block.member; e < call.tiling.entries; e += block.team)
        piece_entries<T>(call, sample.number, block.piece)[e] = block.entries[e];
    __syncthreads();
    // What the piece tells is without them: who leads is known of all pieces together.
    for (int e = block.member; e < call.tiling.entries; e += block.team) block.entries[e].counts = false;
    __syncthreads();
  }
  maxima(block);
  statistics(block);
  __syncthreads();
  if (block.thread >= call.tiling.samples || !block.samples[block.thread].valid) return;
  Exchange& exchange = own_exchange(block, block.thread);
  if (call.objective.has_ce()) exchange.softmax = piece_softmax(block, block.thread, exchange.target_logit);
  for (int t = 0; t < call.objective.terms; ++t) piece_statistics(block, block.thread, t, exchange.group[t]);
}

// Merges the pieces of a sample: a warp each.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void merge_parts(const Call& call) {
  using T = Real<X>;
  Block<X, kLayout, kUse> block(call, 0);
  block.begin = 0;
  block.count = 0;
  if (!read_samples(block, Place{0, 0, blockIdx.x, 1}, false)) {
    settle_nothing(block);
    return;
  }
  Sample<T>& sample = block.sample();
  const int count = call.tiling.entries, pieces = call.tiling.pieces;
  if (block.thread == 0 && call.objective.standardize == Standardize::by_sample)
    read_standardization(static_cast<const T*>(call.saved) + sample.number * saved_size(call.objective) + kSavedHeader,
                         sample);
  const auto entries_of = [&](int piece) { return piece_entries<T>(call, sample.number, piece); };
  for (int i = block.thread; i < pieces * count; i += block.team) {
    const int piece = i / count, e = i % count, t = term_of_entry(call, e);
    Entry<T>& entry = entries_of(piece)[e];
    if (t < 0 || entry.of_class < 0) continue;
    entry.rank = rank_of(call, call.objective.term[t], call.first_entry(t), e, piece, entry, entries_of);
    if (call.members) write_member(call, sample.number, e, entry);
  }
  __syncthreads();
  for (int piece = block.thread; piece < pieces; piece += block.team) {
    Entry<T>* entries = entries_of(piece);
    Exchange& exchange = call.exchange[sample.number * pieces + piece];
    for (int e = 0; e < count; ++e) resolve(call, entries, e, sample.target, entries[e]);
    for (int t = 0; t < call.objective.terms && count > 0; ++t) {
      const Term& term = call.objective.term[t];
      const int rest = term.groups() - 1;
      const T exponent = static_cast<T>(call.sweep[call.sweep_of(t)].exponent);
      merge(exchange.group[t][rest], entry_statistics(call, entries, t, rest, exponent), 1.0);
#pragma unroll 1
      for (int g = 0; g < rest; ++g) exchange.group[t][g] = entry_statistics(call, entries, t, g, exponent);
    }
    if (call.objective.has_ce()) {
      for (int e = 0; e < count; ++e)
        if (entries[e].counts) add_entry(exchange.softmax, entries[e]);
      exchange.target_logit = entries[0].counts ? entries[0].raw : 0;
    }
  }
  __syncthreads();
  settle(block);
}

// Each piece's sum of gradient times standardised logit.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void part_products(const Call& call) {
  Block<X, kLayout, kUse> block(call, static_cast<int>(blockIdx.x % call.tiling.pieces));
  const Place place = place_of<kLayout>(call, blockIdx.x / call.tiling.pieces);
  if (!prepare(block, place)) return;
  block.put(0, product_sum(block) + entry_products(block));
  __syncthreads();
  if (block.thread < call.tiling.samples && block.samples[block.thread].valid)
    own_exchange(block, block.thread).product = block.total(block.thread, 0);
}

// Settles the slopes of the chain rule from the pieces' products: a thread a sample.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void merge_products(const Call& call) {
  using T = Real<X>;
  const int64_t number = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (number >= call.samples) return;
  T* saved = static_cast<T*>(call.saved) + number * saved_size(call.objective);
  if (saved[0] == 0) return;
  double product = 0;
  for (int piece = 0; piece < call.tiling.pieces; ++piece)
    product += call.exchange[number * call.tiling.pieces + piece].product;
  saved[kSavedHeader + 3] = static_cast<T>(saved[kSavedHeader + 3] * product);
}

}  // namespace kdk::cuda
