// All kernels for avx512.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#define GK_AVX512 1  // what the headers below may use; a compiler macro would not follow clang's pragma

namespace gk::avx512 {
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
}  // namespace gk::avx512
#if defined(__clang__)
#pragma clang attribute pop
#endif

const gk::RowKernels<float> gk::kRowsAvx512 = {"avx512", gk::avx512::sample, gk::avx512::softmax,
                                               gk::avx512::softmax_backward, gk::avx512::relax};
const gk::LaneKernels gk::kLanesAvx512 = {gk::avx512::kLanes, gk::avx512::lanes_gumbel_softmax,
                                          gk::avx512::lanes_softmax_backward};
const gk::HeadKernels gk::kHeadAvx512 = {gk::avx512::head_sample, gk::avx512::head_scores, gk::avx512::head_softmax};
const gk::GatherKernels gk::kGatherAvx512 = {gk::avx512::gather_dot, gk::avx512::gather_sum, gk::avx512::few_product,
                                             gk::avx512::weight_terms};
const gk::ScreenKernels gk::kScreenAvx512 = {gk::avx512::screen_encode, gk::avx512::screen_tokens};
#endif
