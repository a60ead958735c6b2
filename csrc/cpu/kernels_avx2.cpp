// All kernels for avx2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/gumbel.h"
#include "cpu/gather.h"
#include "cpu/head.h"
#include "cpu/screen.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define GK_AVX2 1  // what the headers below may use; a compiler macro would not follow clang's pragma

namespace gk::avx2 {
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
}  // namespace gk::avx2
#if defined(__clang__)
#pragma clang attribute pop
#endif

const gk::RowKernels<float> gk::kRowsAvx2 = {"avx2", gk::avx2::sample, gk::avx2::softmax, gk::avx2::softmax_backward,
                                             gk::avx2::relax};
const gk::LaneKernels gk::kLanesAvx2 = {gk::avx2::kLanes, gk::avx2::lanes_gumbel_softmax,
                                        gk::avx2::lanes_softmax_backward};
const gk::HeadKernels gk::kHeadAvx2 = {gk::avx2::head_sample, gk::avx2::head_scores, gk::avx2::head_softmax};
const gk::GatherKernels gk::kGatherAvx2 = {gk::avx2::gather_dot, gk::avx2::gather_sum, gk::avx2::few_product,
                                           gk::avx2::weight_terms};
const gk::ScreenKernels gk::kScreenAvx2 = {gk::avx2::screen_encode, gk::avx2::screen_tokens};
#endif
