// The running maximum and sum of exponentials of a row, and how those of two parts become one. Host and device.
#pragma once

#include <cmath>

#include "common/math.h"

namespace gk {

// exp(x - max) summed over a part; sum 0 where the part has nothing above -inf.
template <typename Real>
struct LogSum {
  Real max, sum;
};

GK_HOST_DEVICE inline double natural_exp(double x) { return std::exp(x); }
GK_HOST_DEVICE inline float natural_exp(float x) { return fast_exp2(x * kLog2E); }

// What a part contributes to a sum whose maximum is `top`. A part without a sum may have the maximum -inf.
template <typename Real>
GK_HOST_DEVICE inline Real rescaled(LogSum<Real> part, Real top) {
  return part.sum > Real(0) ? part.sum * natural_exp(part.max - top) : Real(0);
}

template <typename Real>
GK_HOST_DEVICE inline LogSum<Real> merged(LogSum<Real> a, LogSum<Real> b) {
  const Real top = a.max > b.max ? a.max : b.max;
  return {top, rescaled(a, top) + rescaled(b, top)};
}

}  // namespace gk
