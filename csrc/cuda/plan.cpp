#include "plan.h"

#include <algorithm>

namespace kdk::cuda {

namespace {

int element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "f32";
    case DType::f64: return "f64";
    case DType::f16: return "f16";
    default: return "bf16";
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int power_of_two_up_to(int64_t number) {
  int power = 1;
  while (2 * int64_t{power} <= number) power *= 2;
  return power;
}

int power_of_two_from(int number) {
  int power = 1;
  while (power < number) power *= 2;
  return power;
}

// Classes that are worked on one by one, of one sample.
int entry_count(const Call& call) { return call.first_entry(call.objective.terms); }

// Room for the classes that a first look at a sample finds good enough to lead: most often a few more than will.
int candidates_of(int leads) { return leads == 0 ? 0 : leads + std::min(leads, 24) + 8; }

int candidate_count(const Call& call) {
  int leads = 0;
  for (int t = 0; t < call.objective.terms; ++t)
    if (call.objective.term[t].by_rank()) leads = std::max(leads, call.objective.term[t].k);
  return candidates_of(leads);
}

Regions regions_of(DType type, Layout layout, const Tiling& tiling) {
  return type == DType::f64 ? regions_of<double>(layout, tiling, 8)
                            : regions_of<float>(layout, tiling, element_bytes(type));
}

int shared_bytes(const Call& call, const Tiling& tiling) {
  return regions_of(tile_type(call), layout_of(call), tiling).total;
}

// Vectors of each side that a thread works on: as many as fill a multiprocessor's shared memory and its registers
// alike, and share what a thread does once a sample; fewer where there are so few rows that threads are left over.
constexpr int kMostVectors = 16, kFewestVectors = 4;
constexpr int kRowThreads = 128;  // of a block of short rows: small, so that the next ones load while one computes
constexpr int kSmallestTeam = 4;
constexpr int kMostSamples = 32;  // of a block: one warp takes step 2
constexpr int kPixels = 32;       // side by side in memory: a sector or more of each class
constexpr int kFewestPixels = 8;
constexpr int kPixelElements = 16;  // of a thread: its pixel is shared where there are more classes
constexpr int kMostClassWarps = 4;
constexpr int kMostPieces = 8;  // blocks of a cluster that every device can hold
constexpr int kFewestPieceClasses = 16;
// Blocks of several pieces: three of them fit a multiprocessor, and load while others compute.
constexpr int kBlocksAtATime = 3;
constexpr int kReserved = 1024;  // bytes of a block that the device takes

// Threads and samples of a block for a piece of that many classes.
Tiling block_tiling(const Call& call, const Device& device, int piece, int pieces) {
  const DType type = tile_type(call);
  Tiling tiling;
  tiling.piece = piece;
  tiling.pieces = pieces;
  tiling.entries = entry_count(call);
  tiling.candidates = candidate_count(call);
  if (layout_of(call) == Layout::pixels) {
    tiling.samples = kPixels;
    tiling.team = std::min(power_of_two_up_to(std::max(piece / kPixelElements, 1)), kMostClassWarps);
    return tiling;
  }
  const auto vectors = ceil_div(piece, width(Layout::rows, element_bytes(type)));
  const int64_t wanted = int64_t{kBlocksAtATime} * device.multiprocessors;
  for (int each = kMostVectors;; each /= 2) {
    const int team = static_cast<int>(ceil_div(vectors, each));
    tiling.team =
        team > kWarp ? std::min(round_up(team, kWarp), kMostThreads) : power_of_two_from(std::max(team, kSmallestTeam));
    tiling.samples = std::clamp(kRowThreads / tiling.team, 1, kMostSamples);
    if (each == kFewestVectors || ceil_div(call.samples, tiling.samples) * pieces >= wanted) break;
  }
  while (tiling.samples > 1 && tiling.threads() > kWarp &&
         ceil_div(call.samples, tiling.samples) < device.multiprocessors)
    tiling.samples /= 2;
  return tiling;
}

// The same with fewer samples where that many do not fit in `bytes`; nothing if the fewest do not.
std::optional<Tiling> fitting(const Call& call, Tiling tiling, int bytes, int fewest) {
  while (shared_bytes(call, tiling) > bytes) {
    if (tiling.samples / 2 < fewest) return std::nullopt;
    tiling.samples /= 2;
    tiling.team = layout_of(call) == Layout::pixels ? 2 * tiling.team : std::max(tiling.team, kWarp / tiling.samples);
  }
  return tiling;
}

}  // namespace

DType tile_type(const Call& call) {
  if (call.student.dtype == call.teacher.dtype) return call.student.dtype;
  const bool wide = call.student.dtype == DType::f64 || call.teacher.dtype == DType::f64;
  return wide ? DType::f64 : DType::f32;
}

Layout layout_of(const Call& call) {
  const auto in_planes = [&](const Matrix& matrix) {
    return matrix.class_stride != 1 && call.dims > 0 && matrix.sample_stride[call.dims - 1] == 1;
  };
  return call.classes > 1 && in_planes(call.student) && in_planes(call.teacher) ? Layout::pixels : Layout::rows;
}

int64_t sample_blocks(const Call& call) {
  const int64_t samples = call.tiling.samples;
  if (layout_of(call) == Layout::rows) return ceil_div(call.samples, samples);
  return call.samples / call.inner() * ceil_div(call.inner(), samples);
}

std::optional<Tiling> fused_tiling(const Call& call, const Device& device) {
  const int preferred = device.shared_bytes_of_all / kBlocksAtATime - kReserved;
  const int wide = width(Layout::rows, element_bytes(tile_type(call)));
  const bool pixels = layout_of(call) == Layout::pixels;
  if (call.classes > int64_t{1} << 24) return std::nullopt;
  for (const int limit : {std::min(preferred, device.shared_bytes), device.shared_bytes}) {
    // Rather more blocks a pixel than fewer pixels side by side.
    for (int fewest = pixels ? kPixels : 1; fewest >= (pixels ? kFewestPixels : 1); fewest /= 2) {
      for (int pieces = 1; pieces <= (device.has_clusters() ? kMostPieces : 1); pieces *= 2) {
        const int piece = round_up(static_cast<int>(ceil_div(call.classes, pieces)), wide);
        if (pieces > 1 && int64_t{piece} * (pieces - 1) >= call.classes) break;
        const int held = pieces == 1 ? static_cast<int>(call.classes) : piece;
        if (const auto tiling = fitting(call, block_tiling(call, device, held, pieces), limit, fewest)) return tiling;
      }
    }
  }
  return std::nullopt;
}

std::optional<Tiling> lane_tiling(const Call& call) {
  constexpr int kLaneSamples = 128;  // the L1 cache has as many logits as a multiprocessor's lanes
  const DType type = tile_type(call);
  if (layout_of(call) != Layout::pixels || call.classes > kMostLaneClasses || type == DType::f64 ||
      type != call.student.dtype || type != call.teacher.dtype)
    return std::nullopt;
  Tiling tiling;
  tiling.samples = kLaneSamples;
  tiling.piece = static_cast<int>(call.classes);
  return tiling;
}

std::optional<Tiling> lane_forward_tiling(const Call& call) {
  const Objective& objective = call.objective;
  const bool by_class = objective.standardize == Standardize::by_class;
  if (objective.standardize == Standardize::by_sample || objective.terms > 1 || objective.term[0].k > kMostLaneLeads ||
      (call.saved && !by_class) || call.part_values)
    return std::nullopt;
  return lane_tiling(call);
}

int64_t lane_stretch_of(const Call& call, const Device& device) {
  constexpr int64_t kMostSamplesOfLane = 64, kBlocksOfMultiprocessor = 16;
  return std::clamp<int64_t>(sample_blocks(call) / (kBlocksOfMultiprocessor * device.multiprocessors), 1,
                             kMostSamplesOfLane * kWarp / call.tiling.samples);
}

namespace {

// The largest piece, of no fewer classes than that, which fits in `bytes`; nothing if none does.
std::optional<Tiling> largest_piece(const Call& call, const Device& device, int bytes, int fewest) {
  constexpr int kMostClasses = 4096;
  for (int piece = static_cast<int>(std::min<int64_t>(call.classes, kMostClasses));;
       piece = round_up(piece / 2, kFewestPieceClasses)) {
    const Tiling tiling = block_tiling(call, device, piece, static_cast<int>(ceil_div(call.classes, piece)));
    if (const auto fits = fitting(call, tiling, bytes, 1)) return fits;
    if (piece <= fewest) return std::nullopt;
  }
}

}  // namespace

std::optional<Tiling> piece_tiling(const Call& call, const Device& device) {
  constexpr int kWorthwhileClasses = 256;  // rather fewer blocks at a time than pieces that are mostly entries
  const int preferred = device.shared_bytes_of_all / kBlocksAtATime - kReserved;
  const auto several = largest_piece(call, device, std::min(preferred, device.shared_bytes), kWorthwhileClasses);
  return several ? several : largest_piece(call, device, device.shared_bytes, kFewestPieceClasses);
}

int most_leads(const Device& device) {
  // In double precision, with a target, in the smallest piece of a pixel: what takes most.
  Tiling tiling;
  tiling.team = kPixels;
  tiling.piece = kFewestPieceClasses;
  tiling.pieces = 2;
  int leads = 0;
  for (int step = kMostLeads; step > 0; step /= 2) {
    if (leads + step > kMostLeads) continue;
    tiling.entries = 1 + leads + step;
    tiling.candidates = candidates_of(leads + step);
    if (regions_of(DType::f64, Layout::pixels, tiling).total <= device.shared_bytes) leads += step;
  }
  return leads;
}

Tiling class_tiling(const Call& call, const Device& device, int sides) {
  constexpr int kFewestColumns = 8;  // whole sectors of a row
  const int64_t classes = call.gradient.data ? call.gradient_classes : call.classes;
  const int64_t units = sides * class_units(classes), pages = ceil_div(call.samples, kPage);
  Tiling tiling;
  if (layout_of(call) == Layout::pixels) {
    tiling.samples = kWarp;
    tiling.pieces = static_cast<int>(ceil_div(units, kClassThreads / kWarp));
    tiling.team = static_cast<int>(ceil_div(units, tiling.pieces));
  } else {
    tiling.team = power_of_two_from(static_cast<int>(std::min<int64_t>(units, kWarp)));
    while (tiling.team > kFewestColumns && ceil_div(units, tiling.team) * pages < device.multiprocessors)
      tiling.team /= 2;
    tiling.samples = kClassThreads / tiling.team;
    tiling.pieces = static_cast<int>(ceil_div(units, tiling.team));
  }
  tiling.piece = tiling.team * kClassesOfThread;
  return tiling;
}

std::optional<Tiling> statistics_tiling(const Call& call) {
  constexpr int kFewestClasses = 64;  // of fewer, half of a warp and more would be idle
  const Objective& objective = call.objective;
  bool ranks = false;
  for (int t = 0; t < objective.terms; ++t) ranks = ranks || objective.term[t].by_rank();
  if (objective.standardize != Standardize::by_class || ranks || layout_of(call) != Layout::rows ||
      call.classes <= kFewestClasses)
    return std::nullopt;
  Tiling tiling;
  tiling.team = kWarp;
  tiling.samples = kClassThreads / kWarp;
  tiling.pieces = static_cast<int>(row_pieces(call));
  tiling.piece = kWarp * kClassesOfThread;
  return tiling;
}

// A lane a sample settles them, after several have added up its pieces.
Tiling settling_tiling(const Call& call, const Device& device) {
  Tiling tiling;
  tiling.samples = kWarp;
  tiling.team = kClassThreads / kWarp;
  while (tiling.samples > 1 && ceil_div(call.samples, tiling.samples) < 2 * device.multiprocessors) {
    tiling.samples /= 2;
    tiling.team *= 2;
  }
  tiling.piece = 0;  // nothing of it is in shared memory
  tiling.entries = call.target_is_entry() ? 1 : 0;
  return tiling;
}

// Blocks enough for a GPU, several times over so that it is full to the end, and few partial sums.
int64_t stretch_of(const Call& call, const Device& device) {
  constexpr int64_t kBlocksOfMultiprocessor = 16, kMostStretches = 1024;
  const int64_t pages = ceil_div(call.samples, kPage);
  const int64_t wanted = kBlocksOfMultiprocessor * device.multiprocessors / call.tiling.pieces;
  return ceil_div(pages, std::clamp<int64_t>(wanted, 1, std::min(pages, kMostStretches)));
}

Tiling merge_tiling(const Call& call) {
  Tiling tiling = call.tiling;
  tiling.samples = 1;
  tiling.team = kWarp;
  return tiling;
}

Launch configure_merge(const char* step, Call& call) {
  const DType type = tile_type(call);
  // Of the tiles and entries nothing is in shared memory.
  Tiling tiling = call.tiling;
  tiling.samples = 1;
  tiling.piece = tiling.entries = tiling.candidates = 0;
  call.regions = regions_of(type, Layout::rows, tiling);
  Launch launch;
  launch.kernel = std::string("kdk_") + step + "_rows_" + name_of(type);
  launch.blocks = std::string(step) == "merge_parts" ? call.samples : ceil_div(call.samples, kWarp);
  launch.threads = kWarp;
  launch.shared_bytes = call.regions.total;
  return launch;
}

// Which of forward's or lanes' kernels serves a call; double precision has one for all.
const char* use_of(const Call& call, DType type) {
  if (type == DType::f64 || call.tiling.pieces > 1 || call.objective.standardize != Standardize::none) return "";
  for (int t = 0; t < call.objective.terms; ++t)
    if (call.objective.term[t].by_rank()) return "_ranked";
  return "_simple";
}

Launch configure_classes(const char* step, const Call& call) {
  Launch launch;
  launch.kernel =
      std::string("kdk_") + step + (layout_of(call) == Layout::rows ? "_rows_" : "_pixels_") + name_of(tile_type(call));
  launch.blocks = ceil_div(ceil_div(call.samples, kPage), call.stretch) * call.tiling.pieces;
  launch.threads = call.tiling.threads();
  return launch;
}

Launch configure(const char* step, Call& call, bool clustered) {
  const Tiling& tiling = call.tiling;
  const DType type = tile_type(call);
  const bool alone = std::string(step).starts_with("lane");  // threads that share no samples
  Launch launch;
  launch.kernel = std::string("kdk_") + step +
                  (std::string(step) == "lanes" || std::string(step) == "forward" ? use_of(call, type) : "") +
                  (layout_of(call) == Layout::rows ? "_rows_" : "_pixels_") + name_of(type);
  constexpr int64_t kMostScalingBlocks = 2048;  // these go through all that there is
  launch.blocks = sample_blocks(call) * tiling.pieces;
  if (std::string(step) == "lane_sums") launch.blocks = ceil_div(launch.blocks, call.stretch);
  if (std::string(step) == "scale") launch.blocks = std::min(launch.blocks, kMostScalingBlocks);
  launch.threads = alone ? kWarp : tiling.threads();
  launch.cluster = clustered ? tiling.pieces : 1;
  call.regions = regions_of(type, layout_of(call), tiling);
  launch.shared_bytes = alone || std::string(step) == "scale" ? 0 : call.regions.total;
  if (std::string(step) == "lane_sums") launch.shared_bytes = lane_sum_bytes(call);
  return launch;
}

}  // namespace kdk::cuda
