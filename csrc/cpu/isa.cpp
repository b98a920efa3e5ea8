// Choice of the instruction set at run time.
#include <atomic>
#include <cstdlib>
#include <string>

#include "kernels.h"

namespace kdk {

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas{Isa::baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (avx2) isas.push_back(Isa::avx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    isas.push_back(Isa::avx512);
#endif
  return isas;
}

namespace {

// The best that the CPU has, unless KDKERNELS_CPU_ISA names a supported one.
Isa initial_isa() {
  const std::vector<Isa> isas = supported_isas();
  const char* wanted = std::getenv("KDKERNELS_CPU_ISA");
  static constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  for (const Isa isa : isas)
    if (wanted && std::string(wanted) == kNames[static_cast<int>(isa)]) return isa;
  return isas.back();
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(); }

bool set_isa(int isa) {
  const std::vector<Isa> isas = supported_isas();
  for (const Isa candidate : isas) {
    if (isa != -1 && static_cast<int>(candidate) != isa) continue;
    chosen() = isa == -1 ? isas.back() : candidate;
    return true;
  }
  return false;
}

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (chosen().load()) {
    case Isa::avx512: return avx512::kernels;
    case Isa::avx2: return avx2::kernels;
    case Isa::baseline: break;
  }
#endif
  return baseline::kernels;
}

}  // namespace kdk
