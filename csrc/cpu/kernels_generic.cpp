// All kernels for generic.
#include <cmath>
#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/gumbel.h"
#include "cpu/gather.h"
#include "cpu/head.h"
#include "cpu/screen.h"

namespace gk::generic {
namespace {
using c10::BFloat16;
using c10::Half;
#include "cpu/simd.h"
#include "cpu/noise.h"
#include "cpu/lane_noise.h"
#include "cpu/rows.inl"
#include "cpu/lanes.inl"
#include "cpu/head.inl"
#include "cpu/gather.inl"
#include "cpu/screen.inl"
}  // namespace
}  // namespace gk::generic

const gk::RowKernels<float> gk::kRowsGeneric = {"generic", gk::generic::sample, gk::generic::softmax,
                                                gk::generic::softmax_backward, gk::generic::relax};
const gk::LaneKernels gk::kLanesGeneric = {gk::generic::kLanes, gk::generic::lanes_gumbel_softmax,
                                           gk::generic::lanes_softmax_backward};
const gk::HeadKernels gk::kHeadGeneric = {gk::generic::head_sample, gk::generic::head_scores,
                                          gk::generic::head_softmax};
const gk::GatherKernels gk::kGatherGeneric = {gk::generic::gather_dot, gk::generic::gather_sum,
                                              gk::generic::few_product, gk::generic::weight_terms};
const gk::ScreenKernels gk::kScreenGeneric = {gk::generic::screen_encode, gk::generic::screen_tokens};
