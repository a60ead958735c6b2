// Elementary functions of float32 as a GPU has them, and what stands for them on the host. Host and device.
#pragma once

#include <cmath>

#include "common/philox.h"

namespace gk {

constexpr float kLn2 = 0.6931471805599453f, kLog2E = 1.4426950408889634f;

// Base-2 logarithm of normal numbers, NaN for negative ones. On a GPU one instruction, whose error is 2^-22 absolute in
// (0.5, 2) and 2^-22 relative elsewhere.
GK_HOST_DEVICE inline float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::log2(x);
#endif
}

// 2^x; on a GPU one instruction with a relative error of 2^-22, and zero for results below 2^-126.
GK_HOST_DEVICE inline float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

// The larger number; NaN if either is.
GK_HOST_DEVICE inline float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

}  // namespace gk
