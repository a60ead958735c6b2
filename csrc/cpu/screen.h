// Sampling through an eight-bit copy of a head, which is a quarter of float32's bytes to read.
//
// The copy gives each logit up to an error, which Cauchy and Schwarz bound by the length of what the codes of the
// token's row leave out times the length of the hidden row. The noise is known exactly. So a token whose upper bound,
// with its noise, is below the best lower bound cannot win. The few others are looked at in full.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace gk {

constexpr int kScreenRows = 8;
constexpr int64_t kScreenRoom = 2048;  // contenders of a piece

struct ScreenCodes {
  const void* weight;  // [tokens, width]
  Dtype dtype;
  int64_t width, stride;
  const float* columns;  // [padded], factor of each column before it is rounded; zeros beyond the width
  int64_t padded;
  // A token's weights, times their columns' factors, are scale * codes up to a vector of length `slack` (which has room
  // for float32's rounding).
  int8_t* codes;  // [tokens, padded]
  float *scale, *slack;
};

// A token that may win a row, and an upper bound of its score.
struct Contender {
  int32_t row, token;
  float upper;
};

struct ScreenArgs {
  const float* x;     // [rows, padded], hidden divided by the columns' factors
  const float* norm;  // [rows], its length
  int64_t rows, padded;
  const int8_t* codes;
  const float *scale, *slack;
  const float* bias;
  float softcap;  // 0: none
  Noise noise;
};

struct ScreenPiece {
  float lower[kScreenRows];  // bound of the best score
  int64_t count;             // contenders
  bool bad;                  // a NaN, +inf, or more contenders than there is room for
};

struct ScreenKernels {
  void (*encode)(const ScreenCodes& args, int64_t begin, int64_t end);
  void (*screen)(const ScreenArgs& args, int64_t begin, int64_t end, ScreenPiece& out, Contender* found);
};

extern const ScreenKernels kScreenGeneric;
#if defined(__x86_64__)
extern const ScreenKernels kScreenAvx2, kScreenAvx512;
#endif

}  // namespace gk
