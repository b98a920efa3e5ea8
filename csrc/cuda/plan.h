// Launch configuration: which kernels serve a call, and with what grid, block, cluster and shared memory. Functions of
// the call's shape and the device's limits alone: nothing here needs a GPU.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "call.h"

namespace kdk::cuda {

// What the configuration depends on of a device.
struct Device {
  int capability = 90;               // 10 * major + minor
  int shared_bytes = 232448;         // that a block may have
  int shared_bytes_of_all = 233472;  // of one multiprocessor
  int multiprocessors = 132;

  bool has_clusters() const { return capability >= 90; }
};

struct Launch {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0;
  int cluster = 1;
  int shared_bytes = 0;
};

// The type that blocks hold logits in: that of both sides, or the arithmetic's where they differ.
DType tile_type(const Call& call);
Layout layout_of(const Call& call);
// How the fused kernel shares out a call; nothing where a sample does not fit on chip.
std::optional<Tiling> fused_tiling(const Call& call, const Device& device);
// How samples are shared out that a thread each works on, if they can be: side by side, of few classes; and for steps 1
// and 2 of one term, with nothing asked for but loss and gradient. How many blocks of these a block adds up where it
// adds up classes, so that sums of a lane are in float32 of few samples.
std::optional<Tiling> lane_tiling(const Call& call);
std::optional<Tiling> lane_forward_tiling(const Call& call);
int64_t lane_stretch_of(const Call& call, const Device& device);
// How kernels that look at any piece of a sample share out a call; nothing where not even the smallest piece fits.
std::optional<Tiling> piece_tiling(const Call& call, const Device& device);
// How many leading classes of a sample there is room for on a device, whatever the call; up to kMostLeads.
constexpr int kMostLeads = 1024;
int most_leads(const Device& device);
// How kernels that keep to a few classes share out a call, each side's by themselves where there are two sides; how
// many pages of samples go by one of their blocks; and their launch.
Tiling class_tiling(const Call& call, const Device& device, int sides);
// The same where they add up each sample, if they can: rows of standardised classes, without ranks; and how these
// samples are settled.
std::optional<Tiling> statistics_tiling(const Call& call);
Tiling settling_tiling(const Call& call, const Device& device);
int64_t stretch_of(const Call& call, const Device& device);
Launch configure_classes(const char* step, const Call& call);
// How the pieces of a sample are merged, and the launches that do it: a warp, or a thread, a sample.
Tiling merge_tiling(const Call& call);
Launch configure_merge(const char* step, Call& call);
// Blocks of samples.
int64_t sample_blocks(const Call& call);
// The launch of a kernel ("forward", ...) on a call whose tiling is chosen; its pieces are a cluster where `clustered`.
// Sets the call's regions.
Launch configure(const char* step, Call& call, bool clustered);

}  // namespace kdk::cuda
