// Which instruction set's kernels serve this machine.
#pragma once

#include <cstdlib>
#include <cstring>

namespace gk {

enum class Isa { kGeneric, kAvx2, kAvx512 };

// The best that the processor has; GRADE_KERNELS_CPU_ISA (generic, avx2) asks for less, so that each can be tested.
inline Isa machine_isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const char* wanted = std::getenv("GRADE_KERNELS_CPU_ISA");
    const auto allowed = [wanted](const char* name) { return !wanted || !std::strcmp(wanted, name); };
    __builtin_cpu_init();
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return Isa::kAvx512;
    }
    if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      return Isa::kAvx2;
    }
#endif
    return Isa::kGeneric;
  }();
  return chosen;
}

#if defined(__x86_64__)
#define GK_KERNELS_OF(name) \
  (::gk::machine_isa() == ::gk::Isa::kAvx512 ? name##Avx512 : ::gk::machine_isa() == ::gk::Isa::kAvx2 ? name##Avx2 : name##Generic)
#else
#define GK_KERNELS_OF(name) name##Generic
#endif

}  // namespace gk
