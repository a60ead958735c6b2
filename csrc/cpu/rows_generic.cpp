// Row kernels for generic.
#include <cmath>
#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/gumbel.h"
#include "cpu/rows.h"

namespace gk::generic {
namespace {
using c10::BFloat16;
using c10::Half;
#include "cpu/simd.h"
#include "cpu/noise.h"
#include "cpu/rows.inl"
}  // namespace
}  // namespace gk::generic

const gk::RowKernels<float> gk::kRowsGeneric = {"generic", gk::generic::sample, gk::generic::softmax,
                                                 gk::generic::softmax_backward};
