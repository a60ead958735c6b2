// From a 32-bit word to exponential and Gumbel noise: g = -log(E), E = -log1p(-u), u = (w + 0.5) / 2^32. Host and device.
#pragma once

#include <cmath>

#include "common/philox.h"

namespace gk {

// Below this word (six in 10^8) the noise takes 32 more bits, so that its tail reaches 45 instead of 23.
constexpr uint32_t kRefineBelow = 256;

// E for word w; `refinement` is the token's word of kDomainRefine and read only when w < kRefineBelow.
template <typename Real>
GK_HOST_DEVICE inline Real exponential_from_word(uint32_t w, uint32_t refinement) {
  constexpr Real scale = Real(1) / Real(4294967296.0);
  if (w < kRefineBelow) {
    const uint64_t fine = (uint64_t(w) << 32) | refinement;
    return -std::log1p(-((Real(fine) + Real(0.5)) * scale * scale));
  }
  if (w < 0x80000000u) return -std::log1p(-((Real(w) + Real(0.5)) * scale));
  return -std::log((Real(~w) + Real(0.5)) * scale);  // the complement is exact where 1 - u is not
}

// Gumbel noise of one token, refinement included.
template <typename Real>
GK_HOST_DEVICE inline Real token_gumbel(uint64_t seed, int64_t row, int64_t token) {
  const uint32_t w = token_word(seed, row, token, kDomainGumbel);
  const uint32_t refinement = w < kRefineBelow ? token_word(seed, row, token, kDomainRefine) : 0;
  return -std::log(exponential_from_word<Real>(w, refinement));
}

}  // namespace gk
