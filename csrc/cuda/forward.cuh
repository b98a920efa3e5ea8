// Steps 1 to 3 in one launch, for samples that fit on chip: in a block, or in the blocks of a cluster.
#pragma once

#include "copies.cuh"
#include "saved.cuh"
#include "settle.cuh"

namespace kdk::cuda {

// Moments of whole samples, over all pieces of the cluster.
template <class X, Layout kLayout, Use kUse>
__device__ void standardize_samples(const Block<X, kLayout, kUse>& block) {
  const Call& call = block.call;
  Moments<double> moments[2];
  sample_moments(block, moments);
  if (call.tiling.pieces > 1) {
    if (block.member == 0)
      for (int side = kStudent; side <= kTeacher; ++side) block.exchange[block.own].moments[side] = moments[side];
    cluster_sync();
    for (int side = kStudent; side <= kTeacher; ++side) {
      moments[side] = {};
      for (int piece = 0; piece < call.tiling.pieces; ++piece)
        merge(moments[side], of_block(block.exchange + block.own, piece)->moments[side]);
    }
  }
  if (block.member == 0) settle_moments(call.objective, moments, block.sample());
  __syncthreads();
}

// The slope of the chain rule of standardised samples, over all pieces of the cluster; ends with a barrier.
template <class X, Layout kLayout, Use kUse>
__device__ void settle_slopes(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  const Call& call = block.call;
  block.put(0, product_sum(block) + entry_products(block));
  __syncthreads();
  if (call.tiling.pieces > 1) {
    if (block.member == 0) block.exchange[block.own].product = block.total(block.own, 0);
    cluster_sync();
  }
  if (block.member == 0) {
    double product = 0;
    if (call.tiling.pieces == 1) product = block.total(block.own, 0);
    else
      for (int piece = 0; piece < call.tiling.pieces; ++piece)
        product += of_block(block.exchange + block.own, piece)->product;
    Sample<T>& sample = block.sample();
    sample.slope = static_cast<T>(sample.slope * product);
  }
  __syncthreads();
}

template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ void forward(const Call& call) {
  const int pieces = kUse == Use::any ? call.tiling.pieces : 1;
  Block<X, kLayout, kUse> block(call, kUse == Use::any ? static_cast<int>(blockIdx.x % pieces) : 0);
  const Place place = place_of<kLayout>(call, blockIdx.x / pieces);
  const bool by_sample = block.standardization() == Standardize::by_sample;
  const bool any = read_samples(block, place, false);
  if (any) {
    copy_in(block, place);
    if (by_sample) standardize_samples(block);
  } else {
    // Of samples that do not count there is nothing but zeros: alike in all blocks of a cluster.
    if (call.gradient.data) copy_out(block, place, true);
  }
  if (any && call.tiling.entries > 0) {
    find_entries(block);
    read_logits(block);
    __syncthreads();
    if (pieces > 1) {
      cluster_sync();
      rank_in_cluster(block);
      cluster_sync();
    }
    mask_entries(block);
    write_members(block);
    __syncthreads();
  }
  if (any) {
    maxima(block);
    statistics(block);
    __syncthreads();
    if (pieces > 1) {
      tell_statistics(block);
      cluster_sync();
    }
  }
  if (block.thread < 32) any ? settle(block) : settle_nothing(block);
  if (!any) return;
  __syncthreads();
  if (by_sample && (call.gradient.data || call.saved)) settle_slopes(block);
  if (by_sample) save_standardization(block);
  if (call.gradient.data) {
    gradient(block);
    __syncthreads();
    entry_gradients(block);
    __syncthreads();
    copy_out(block, place);
  }
  if (pieces > 1) cluster_sync();  // others may still read what this block told them
}

}  // namespace kdk::cuda
