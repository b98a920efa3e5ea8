// Step 3 alone, from what forward kept: of any piece of the samples.
#pragma once

#include "copies.cuh"
#include "entries.cuh"
#include "saved.cuh"

namespace kdk::cuda {

// Reads a piece and what its gradient takes, and masks its entries; ends with a barrier. False if no sample counts.
template <class X, Layout kLayout, Use kUse>
__device__ bool prepare(Block<X, kLayout, kUse>& block, const Place& place) {
  if (!read_samples(block, place, true)) return false;
  read_saved(block);
  copy_in(block, place);
  if (block.call.tiling.entries > 0) {
    read_entries(block);
    __syncthreads();
    read_logits(block);
    __syncthreads();
    mask_entries(block);
    __syncthreads();
  }
  return true;
}

template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void backward(const Call& call) {
  const int pieces = call.tiling.pieces;
  Block<X, kLayout, kUse> block(call, static_cast<int>(blockIdx.x % pieces));
  const Place place = place_of<kLayout>(call, blockIdx.x / pieces);
  const bool any = prepare(block, place);
  if (any) {
    gradient(block);
    __syncthreads();
    entry_gradients(block);
    __syncthreads();
  }
  copy_out(block, place, !any);
}

}  // namespace kdk::cuda
