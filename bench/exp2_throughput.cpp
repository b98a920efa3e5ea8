// How long the kernels' exp2 takes where nothing else does: built and called by roofline.py, with the flags and macros
// of one instruction set.
#include <chrono>

#define KDK_NAMESPACE kdk::bench
#include "../csrc/cpu/simd.h"

namespace kdk::bench {
namespace {

// Nanoseconds an exponential, of enough vectors side by side that none waits for another.
double nanoseconds() {
  constexpr int kVectors = 12, kRounds = 20000;
  Vec x[kVectors];
  for (int i = 0; i < kVectors; ++i) x[i] = broadcast(-0.1f * (i + 1));
  double best = INFINITY;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; ++round)
      for (Vec& v : x) v = exp2(-v);  // stays within (1/2, 1): no exponent is special
    const std::chrono::duration<double, std::nano> passed = std::chrono::steady_clock::now() - start;
    best = std::min(best, passed.count() / (double(kRounds) * kVectors * kLanes));
  }
  volatile float keep = 0;
  for (const Vec& v : x) keep = keep + v[0];
  return best;
}

}  // namespace
}  // namespace kdk::bench

extern "C" double exp2_nanoseconds() { return kdk::bench::nanoseconds(); }
