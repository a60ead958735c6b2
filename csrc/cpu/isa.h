// Which instruction set's kernels serve this machine.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gk {

enum class Isa { kGeneric, kAvx2, kAvx512, kAmx };  // kAmx: AVX-512 and the matrix unit

#if defined(__x86_64__)
// Whether the processor has AVX-512's instructions for bfloat16.
inline bool multiplies_bfloat16() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}
#endif

// Whether the processor has AMX for bfloat16 and the system lends it to this process, which has to ask.
inline bool lends_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBFloat16 | kTiles)) != (kBFloat16 | kTiles)) return false;
  constexpr unsigned kRounding = 1u << 5;  // of leaf 7, 1: AVX-512's conversion to bfloat16
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kRounding)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, and the state component of tiles
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The best that the processor has. GRADE_KERNELS_CPU_ISA (generic, avx2, avx512) asks for less, so that each can be
// tested.
inline Isa machine_isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const char* wanted = std::getenv("GRADE_KERNELS_CPU_ISA");
    const auto allowed = [wanted](const char* name) { return !wanted || !std::strcmp(wanted, name); };
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (allowed("amx") && avx512 && lends_tiles()) return Isa::kAmx;
    if (allowed("avx512") && avx512) return Isa::kAvx512;
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
#define GK_KERNELS_OF(name)                                 \
  (::gk::machine_isa() >= ::gk::Isa::kAvx512 ? name##Avx512 \
   : ::gk::machine_isa() == ::gk::Isa::kAvx2 ? name##Avx2   \
                                             : name##Generic)
#else
#define GK_KERNELS_OF(name) name##Generic
#endif

}  // namespace gk
