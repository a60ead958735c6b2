// Fresh output pages: a large tensor straight from the allocator costs more in page faults than in arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gk {

// Asks for huge pages under a large output that is about to be written whole; a hint, ignored where it is not known.
inline void expect_writes(void* begin, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + huge - 1) & ~(huge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(huge - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace gk
