// How long the kernels' exp2 takes where nothing else does: built and called by roofline.py, with the flags and macros
// of one instruction set.
#include <chrono>

#include "../csrc/cpu/kernel_includes.h"

namespace kdk {
namespace {
#include "../csrc/cpu/simd.h"

// Nanoseconds an exponential, of enough vectors side by side that none waits for another.
template <class T>
double nanoseconds() {
  constexpr int kVectors = 12, kRounds = 20000;
  Vec<T> x[kVectors];
  for (int i = 0; i < kVectors; ++i) x[i] = broadcast(T(-0.1) * (i + 1));
  double best = INFINITY;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; ++round)
      for (Vec<T>& v : x) v = exp2(-v);  // stays within (1/2, 1): no exponent is special
    const std::chrono::duration<double, std::nano> passed = std::chrono::steady_clock::now() - start;
    best = std::min(best, passed.count() / (double(kRounds) * kVectors * kLanes<T>));
  }
  volatile T keep = 0;
  for (const Vec<T>& v : x) keep = keep + v[0];
  return best;
}
}  // namespace
}  // namespace kdk

extern "C" double exp2_nanoseconds(int is_double) {
  return is_double ? kdk::nanoseconds<double>() : kdk::nanoseconds<float>();
}
