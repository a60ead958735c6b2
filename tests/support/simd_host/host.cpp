// The SIMD functions of csrc/cpu, called from tests. Compiled once per instruction set, which GK_TEST_AVX512,
// GK_TEST_AVX2 or neither of them says.
#if defined(GK_TEST_AVX512) || defined(GK_TEST_AVX2)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/dtype.h"
#include "common/gumbel.h"
#include "cpu/products/products.h"

#if defined(GK_TEST_AVX512)
#define GK_AVX512 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512bf16,prefer-vector-width=512")
#endif
#elif defined(GK_TEST_AVX2)
#define GK_AVX2 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#endif

namespace gk {
namespace {
using c10::BFloat16;
using c10::Half;
#include "cpu/simd.h"
#include "cpu/noise.h"
#ifdef GK_AVX512
#include "cpu/products/bf16_split.inl"
#endif

// out[i] = f(in[i]) for vectors in and packs of them. n is a multiple of 64.
template <typename In, typename F>
void each_vector(const void* in, void* out, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes) f(static_cast<const In*>(in) + i, static_cast<float*>(out) + i);
}
template <typename V, typename F>
void each_pack(const void* in, void* out, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes * kPack) {
    Packed<V> x;
    std::memcpy(&x, static_cast<const char*>(in) + 4 * i, sizeof x);
    const f32p y = f(x);
    std::memcpy(static_cast<float*>(out) + i, &y, sizeof y);
  }
}

u32 words_at(const uint32_t* p) {
  u32 w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

}  // namespace
}  // namespace gk

// `parameter` is the softcap of `softcapped`. Returns whether there is such a function.
extern "C" __attribute__((visibility("default"))) bool apply(const char* name, const void* in, void* out, int64_t n,
                                                             float parameter) {
  using namespace gk;
  const auto is = [name](const char* other) { return !std::strcmp(name, other); };
  if (is("reciprocal")) {
    each_vector<float>(in, out, n, [](const float* x, float* y) { store(y, reciprocal(load(x))); });
  } else if (is("to_float")) {
    each_vector<uint32_t>(in, out, n, [](const uint32_t* x, float* y) { store(y, to_float(words_at(x))); });
  } else if (is("gumbel_bound")) {
    each_vector<uint32_t>(in, out, n, [](const uint32_t* x, float* y) { store(y, gumbel_bound(words_at(x))); });
  } else if (is("softcapped")) {
    each_vector<float>(in, out, n, [&](const float* x, float* y) { store(y, softcapped(load(x), parameter)); });
  } else if (is("log1p_core")) {
    each_pack<f32>(in, out, n, [](f32p x) { return log1p_core(x); });
  } else if (is("vlog")) {
    each_pack<f32>(in, out, n, [](f32p x) { return vlog(x); });
  } else if (is("vexp2")) {
    each_pack<f32>(in, out, n, [](f32p x) { return vexp2(x); });
  } else if (is("exponential_unrefined")) {
    each_pack<u32>(in, out, n, [](u32p w) { return exponential_unrefined(w); });
  } else if (is("reduce_sum")) {
    for (int64_t i = 0; i < n / kLanes; ++i) {
      static_cast<float*>(out)[i] = reduce_sum(load(static_cast<const float*>(in) + i * kLanes));
    }
  } else if (is("load bfloat16")) {
    each_vector<BFloat16>(in, out, n, [](const BFloat16* x, float* y) { store(y, load(x)); });
  } else if (is("load float16")) {
    each_vector<Half>(in, out, n, [](const Half* x, float* y) { store(y, load(x)); });
  } else if (is("load int8")) {
    each_vector<int8_t>(in, out, n, [](const int8_t* x, float* y) { store(y, load(x)); });
  } else if (is("store bfloat16")) {
    for (int64_t i = 0; i < n; i += kLanes)
      store(static_cast<BFloat16*>(out) + i, load(static_cast<const float*>(in) + i));
  } else if (is("store float16")) {
    for (int64_t i = 0; i < n; i += kLanes) store(static_cast<Half*>(out) + i, load(static_cast<const float*>(in) + i));
  } else if (is("store int8")) {
    for (int64_t i = 0; i < n; i += kLanes)
      store(static_cast<int8_t*>(out) + i, load(static_cast<const float*>(in) + i));
#ifdef GK_AVX512
  } else if (is("split_in_two")) {  // out is [n, 2] bfloat16 numbers
    for (int64_t i = 0; i < n; i += 32) {
      const float* x = static_cast<const float*>(in) + i;
      const TwoParts parts = split_in_two((__m512)load(x), (__m512)load(x + 16));
      uint16_t both[64];
      std::memcpy(both, &parts, sizeof both);
      for (int k = 0; k < 32; ++k) {
        for (int part = 0; part < 2; ++part) static_cast<uint16_t*>(out)[(i + k) * 2 + part] = both[32 * part + k];
      }
    }
  } else if (is("split_in_three")) {  // out is [n, 3]
    for (int64_t i = 0; i < n; i += 32) {
      const float* x = static_cast<const float*>(in) + i;
      __m512i parts[kTileParts];
      split_in_three((__m512)load(x), (__m512)load(x + 16), parts);
      uint16_t all[32 * kTileParts];
      std::memcpy(all, parts, sizeof all);
      for (int k = 0; k < 32; ++k) {
        for (int part = 0; part < kTileParts; ++part) {
          static_cast<uint16_t*>(out)[(i + k) * kTileParts + part] = all[32 * part + k % 16 * 2 + k / 16];
        }
      }
    }
#endif
  } else {
    return false;
  }
  return true;
}
#if defined(__clang__) && (defined(GK_AVX512) || defined(GK_AVX2))
#pragma clang attribute pop
#endif
