// From a 32-bit word to exponential and Gumbel noise: g = -log(E), E = -log1p(-u), u = (w + 0.5) / 2^32.
// Host and device.
#pragma once

#include <cmath>

#include "common/math.h"
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

// ---- The same in float32 for the price of few instructions ----------------------------------------------------------
//
// Noise comes in a scaled form, n = log2(E / ln 2), of which Gumbel noise is g = kNoiseShift - ln 2 * n: the factor is
// absorbed by the multiply-add with the logit, and the shift, the same for all tokens, is added once a row. What is one
// rounding is written as fma, so that no compiler's habits change a number.

constexpr float kNoiseShift = 0.36651292058166435f;  // -ln(ln 2)

// A word as its distance from the nearer end: -u for words below 2^31, 1 - u for the others, at full relative accuracy.
GK_HOST_DEVICE inline float noise_argument(uint32_t w) { return std::fma(float(int32_t(w)), -0x1p-32f, -0x1p-33f); }

// Whether an argument is that of a word below kRefineBelow.
GK_HOST_DEVICE inline bool needs_refinement(float y) { return y < 0.0f && y > -float(kRefineBelow) * 0x1p-32f; }

// The argument of such a word with its 32 further bits: y + 2^-33 is the word itself, exactly.
GK_HOST_DEVICE inline float refined_argument(float y, uint32_t refinement) {
  return std::fma(float(refinement) + 0.5f, -0x1p-64f, y + 0x1p-33f);
}

// n of an argument. Never infinite or NaN.
GK_HOST_DEVICE inline float scaled_noise(float y) {
  // For y < 0, E / ln 2 = y p(y); relative error 7e-8 near 0, where winners are, and 2e-7 at most.
  float p = std::fma(y, 1.578389196529861f, 1.333184071297368f);
  p = std::fma(p, y, 0.9788293455245592f);
  p = std::fma(p, y, -0.10669454257452884f);
  p = std::fma(p, y, 0.3838636089568017f);
  p = std::fma(p, y, -0.4795022625729261f);
  p = std::fma(p, y, 0.721378239005198f);
  p = std::fma(p, y, -1.44269493566251f);
  // Of the two, the one that does not apply is NaN, which fmax ignores, or negative.
  return fast_log2(std::fmax(y * p, -fast_log2(y)));
}

}  // namespace gk
