// Large new buffers cost more in page faults than in arithmetic: what the system can be asked for instead.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdk {

// Bytes from which on it pays to ask.
constexpr uint64_t kHugeBuffer = 4 << 20;
constexpr uint64_t kZeroedBuffer = 32 << 20;  // smaller ones are used again: their pages are there

// A hint for memory that was allocated but not touched yet; nothing happens where the system does not take it.
inline void prefer_huge_pages(void* data, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uint64_t kHugePage = 2 << 20;
  const uint64_t begin = (reinterpret_cast<uint64_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uint64_t end = (reinterpret_cast<uint64_t>(data) + bytes) / kHugePage * kHugePage;
  if (end > begin && bytes >= kHugeBuffer) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Makes a large buffer of private memory zero without writing it: its pages are given back, and come anew, as zeros,
// when they are touched. False, and nothing is done, where that cannot be.
inline bool zero_on_demand(void* data, uint64_t bytes) {
#if defined(__linux__)
  constexpr uint64_t kPage = 1 << 16;  // a multiple of any system's
  char* const first = static_cast<char*>(data);
  char* const last = first + bytes;
  const auto address = reinterpret_cast<uint64_t>(data);
  char* const begin = first + ((address + kPage - 1) / kPage * kPage - address);
  char* const end = first + ((address + bytes) / kPage * kPage - address);
  if (bytes < kZeroedBuffer || madvise(begin, end - begin, MADV_DONTNEED) != 0) return false;
  std::memset(first, 0, begin - first);
  std::memset(end, 0, last - end);
  return true;
#else
  (void)data, (void)bytes;
  return false;
#endif
}

}  // namespace kdk
