// Products on AVX-512's vector units: float32 by multiply-adds, bfloat16 by its own instruction for pairs
// (AVX512_BF16), float16 as float32.
#include "cpu/products/products.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16,prefer-vector-width=512")
#endif

namespace gk {
namespace {

#include "cpu/products/ahead.inl"
#include "cpu/products/bf16_split.inl"
#include "cpu/products/transpose.inl"
#include "cpu/products/put_sums.inl"

constexpr int64_t kLanes = 16;
constexpr int kWidest = 4;                   // vectors side by side that one round of products covers
constexpr int64_t kLine = kWidest * kLanes;  // numbers from one row of sums to the next
constexpr int64_t kTokens = 48;              // rows of the table at a time: any kTall divides it
constexpr int64_t kRowsAhead = 16;           // of the table, that are asked for while others are copied
constexpr int64_t kStrip = 8;                // lines of the table's columns that a panel has at most
constexpr int64_t kSumsAtATime = 1 << 17;    // numbers that stay in the second-level cache

// Rows of sums that fill the registers beside so many vectors.
constexpr int tall(int wide) { return wide == 4 ? 6 : wide == 3 ? 8 : 12; }

// What numbers are multiplied as.
constexpr Dtype computed(Dtype dtype) { return dtype == Dtype::kHalf ? Dtype::kFloat : dtype; }
// A step is one column of float32 or two of bfloat16: 32 bits.
constexpr int64_t steps_of(Dtype dtype, int64_t width) { return dtype == Dtype::kBFloat16 ? (width + 1) / 2 : width; }
// Steps whose sum is taken in registers before it joins the sum so far: short sums of short sums keep the rounding
// small, which beside bfloat16's own matters less.
constexpr int64_t segment_of(Dtype dtype) { return dtype == Dtype::kBFloat16 ? 128 : 64; }
constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

__mmask16 mask_of(int64_t left) { return left >= kLanes ? __mmask16(0xFFFF) : __mmask16((1u << left) - 1); }

// Up to sixteen numbers as float32.
template <Dtype kDtype>
[[gnu::always_inline]] inline __m512 load(const char* x, int64_t left) {
  if constexpr (kDtype == Dtype::kHalf) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(left), x));
  return _mm512_maskz_loadu_ps(mask_of(left), x);
}

template <Dtype kDtype>
[[gnu::always_inline]] inline __m512 multiply_add(__m512 sum, __m512 a, __m512 b) {
  if constexpr (kDtype == Dtype::kFloat) return _mm512_fmadd_ps(a, b, sum);
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

constexpr int64_t kStepsBetween = 16;  // calls of Ahead::ask()
// Calls of it by multiply_rows.
constexpr int64_t calls_of(int wide, int64_t rows, int64_t steps) {
  return rows / tall(wide) * (steps / kStepsBetween);
}

// sums[kTall][kWide] of `steps` steps, in lines of kLine numbers; they replace what is there or are added to it.
template <Dtype kDtype, int kTall, int kWide>
[[gnu::noinline]] void multiply(const BroadcastRows& rows, const float* lines, int64_t steps, bool fresh, float* sums,
                                Ahead& ahead) {
  __m512 sum[kTall][kWide];
#pragma GCC unroll 12
  for (int i = 0; i < kTall; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  const auto step = [&](const auto& number) __attribute__((always_inline)) {
    __m512 line[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) line[j] = _mm512_loadu_ps(lines + j * kLanes);
    lines += kWide * kLanes;
#pragma GCC unroll 12
    for (int i = 0; i < kTall; ++i) {
      const __m512 x = number(i);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sum[i][j] = multiply_add<kDtype>(sum[i][j], x, line[j]);
    }
  };
  const char* place = rows.first;
  const auto whole = [&](int i) __attribute__((always_inline)) {
    float number;
    std::memcpy(&number, place + i * rows.stride, sizeof number);
    return _mm512_set1_ps(number);
  };
  int64_t left = rows.half ? steps - 1 : steps;
  while (left > 0) {
    ahead.ask();
    const int64_t now = std::min(left, kStepsBetween);
    left -= now;
#pragma GCC unroll 4
    for (int64_t k = 0; k < now; ++k) {
      step(whole);
      place += 4;
    }
  }
  if (rows.half) {
    step([&](int i) __attribute__((always_inline)) {
      uint16_t number;
      std::memcpy(&number, place + i * rows.stride, sizeof number);
      return _mm512_castsi512_ps(_mm512_set1_epi32(number));
    });
  }
#pragma GCC unroll 12
  for (int i = 0; i < kTall; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      float* out = sums + i * kLine + j * kLanes;
      _mm512_store_ps(out, fresh ? sum[i][j] : _mm512_add_ps(_mm512_load_ps(out), sum[i][j]));
    }
  }
}

// The same for any number of rows.
template <Dtype kDtype, int kWide>
void multiply_rows(BroadcastRows rows, int64_t count, const float* lines, int64_t steps, bool fresh, float* sums,
                   Ahead& ahead) {
  const auto some = [&]<int kTall>() {
    for (; count >= kTall; count -= kTall) {
      multiply<kDtype, kTall, kWide>(rows, lines, steps, fresh, sums, ahead);
      rows.first += kTall * rows.stride;
      sums += kTall * kLine;
    }
  };
  some.template operator()<tall(kWide)>();
  some.template operator()<4>();
  some.template operator()<2>();
  some.template operator()<1>();
}

template <Dtype kDtype>
void multiply_any(int wide, const BroadcastRows& rows, int64_t count, const float* lines, int64_t steps, bool fresh,
                  float* sums, Ahead& ahead) {
  switch (wide) {
    case 1: return multiply_rows<kDtype, 1>(rows, count, lines, steps, fresh, sums, ahead);
    case 2: return multiply_rows<kDtype, 2>(rows, count, lines, steps, fresh, sums, ahead);
    case 3: return multiply_rows<kDtype, 3>(rows, count, lines, steps, fresh, sums, ahead);
    default: return multiply_rows<kDtype, 4>(rows, count, lines, steps, fresh, sums, ahead);
  }
}

// x's rows in passes of up to kWidest vectors, as equal as can be; steps of a pass one after the other.
struct Pass {
  int64_t first;  // vector
  int wide;
};
int64_t vectors_of(int64_t rows) { return (rows + kLanes - 1) / kLanes; }
int64_t passes_of(int64_t rows) { return (vectors_of(rows) + kWidest - 1) / kWidest; }
Pass pass_of(int64_t rows, int64_t pass) {
  const int64_t least = vectors_of(rows) / passes_of(rows), more = vectors_of(rows) % passes_of(rows);
  return {pass * least + std::min(pass, more), int(least + (pass < more))};
}

int64_t packed_numbers(Dtype dtype, int64_t rows, int64_t width) {
  return 2 * vectors_of(rows) * kLanes * steps_of(dtype, width);
}

template <Dtype kDtype>
void pack_passes(const Packing& args, int64_t begin, int64_t end) {
  const int64_t steps = steps_of(kDtype, args.width), bytes = bytes_of(kDtype);
  for (int64_t index = begin; index < end; ++index) {
    const Pass pass = pass_of(args.rows, index);
    float* lines = reinterpret_cast<float*>(args.packed) + pass.first * kLanes * steps;
    for (int j = 0; j < pass.wide; ++j) {
      for (int64_t step = 0; step < steps; step += kLanes) {
        __m512 block[16];
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t row = (pass.first + j) * kLanes + i, column = kDtype == Dtype::kBFloat16 ? 2 * step : step;
          const char* x =
              static_cast<const char*>(args.x) + (std::min(row, args.rows - 1) * args.stride + column) * bytes;
          const int64_t left = row < args.rows ? args.width - column : 0;
          if constexpr (kDtype == Dtype::kBFloat16) {
            const __mmask32 mask = left >= 2 * kLanes ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
            block[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x));
          } else {
            block[i] = load<kDtype>(x, left);
          }
        }
        transpose(block);
        for (int64_t i = 0; i < std::min(kLanes, steps - step); ++i) {
          _mm512_storeu_ps(lines + ((step + i) * pass.wide + j) * kLanes, block[i]);
        }
      }
    }
  }
}

template <Dtype kDtype>
void multiply_blocks(const Product& args, int64_t begin, int64_t end) {
  alignas(64) float sums[kTokens * kLine], wider[kDtype == Dtype::kHalf ? kTokens * segment_of(kDtype) : 1];
  const int64_t steps = steps_of(kDtype, args.width), stride = args.stride * bytes_of(kDtype);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t token = block * kTokens, tokens = std::min(kTokens, args.tokens - token);
    const char* table = static_cast<const char*>(args.table) + token * stride;
    int64_t calls = 0;
    for (int64_t index = 0; index < passes_of(args.rows); ++index)
      calls += calls_of(pass_of(args.rows, index).wide, tokens, steps);
    const int64_t behind = block + 1 < end ? std::min(kTokens, args.tokens - token - tokens) : 0;
    Ahead ahead(table + tokens * stride, stride, behind, args.width * bytes_of(kDtype), calls);
    for (int64_t index = 0; index < passes_of(args.rows); ++index) {
      const Pass pass = pass_of(args.rows, index);
      const float* lines = reinterpret_cast<const float*>(args.packed) + pass.first * kLanes * steps;
      for (int64_t step = 0; step < steps; step += segment_of(kDtype)) {
        const int64_t now = std::min(segment_of(kDtype), steps - step);
        BroadcastRows rows{table + 4 * step, stride,
                           kDtype == Dtype::kBFloat16 && args.width % 2 && step + now == steps};
        if constexpr (kDtype == Dtype::kHalf) {
          rows = {reinterpret_cast<const char*>(wider), segment_of(kDtype) * 4, false};
          for (int64_t i = 0; i < tokens; ++i) {
            for (int64_t k = 0; k < now; k += kLanes) {
              _mm512_store_ps(wider + i * segment_of(kDtype) + k,
                              load<kDtype>(table + i * stride + 2 * (step + k), now - k));
            }
          }
        }
        multiply_any<computed(kDtype)>(pass.wide, rows, tokens, lines + step * pass.wide * kLanes, now, step == 0, sums,
                                       ahead);
      }
      put_sums<kLine>(args, sums, token, tokens, pass.first * kLanes, pass.wide * kLanes);
    }
  }
}

// values @ table: lines are the table's own rows, in bfloat16 two of them side by side.
template <Dtype kDtype>
class Summer {
 public:
  explicit Summer(const WeightedSum& args)
      : args_(args),
        strip_(std::clamp<int64_t>(kSumsAtATime / (kLine * args.rows), 1, kStrip)),
        memory_(new char[size_t(
            64 + 4 * (strip_ * kSegment * kLine + strip_ * args.rows * kLine + kParts * args.rows * kSegment))]) {
    panel_ = reinterpret_cast<float*>(memory_ + -reinterpret_cast<uintptr_t>(memory_) % 64);
    sums_ = panel_ + strip_ * kSegment * kLine;
    values_ = sums_ + strip_ * args.rows * kLine;
  }
  ~Summer() { delete[] memory_; }
  Summer(const Summer&) = delete;

  // Lines [begin, end) of the table's columns.
  bool run(int64_t begin, int64_t end) {
    bool exact = true;
    for (int64_t first = begin; first < end; first += strip_) {
      const int64_t last = std::min(end, first + strip_);
      for (int64_t token = 0; token < args_.tokens; token += kAtATime) {
        const int64_t tokens = std::min(kAtATime, args_.tokens - token),
                      behind = std::min(kAtATime, args_.tokens - token - tokens);
        fill(token, tokens, first, last);
        const int parts = copy(token, tokens);
        const int64_t calls = parts * (last - first) * calls_of(kWidest, args_.rows, steps_of(kDtype, tokens));
        const int64_t bytes = bytes_of(args_.values_dtype);
        Ahead ahead(values(token + tokens), args_.values_stride * bytes, behind > 0 ? args_.rows : 0, behind * bytes,
                    calls);
        for (int part = 0; part < parts; ++part) {
          const BroadcastRows rows{reinterpret_cast<const char*>(values_ + part * args_.rows * kSegment), kSegment * 4,
                                   false};
          for (int64_t block = first; block < last; ++block) {
            multiply_any<computed(kDtype)>(wide(block), rows, args_.rows, panel_ + (block - first) * kSegment * kLine,
                                           steps_of(kDtype, tokens), token == 0 && part == 0,
                                           sums_ + (block - first) * args_.rows * kLine, ahead);
          }
        }
      }
      for (int64_t block = first; block < last; ++block)
        exact &= put(block, sums_ + (block - first) * args_.rows * kLine);
    }
    return exact;
  }

 private:
  static constexpr int64_t kSegment = 128;  // steps at a time
  static constexpr bool kPairs = kDtype == Dtype::kBFloat16;
  static constexpr int64_t kAtATime = kPairs ? 2 * kSegment : kSegment;  // tokens
  static constexpr int kParts = kPairs ? 2 : 1;                          // of a value

  int64_t columns(int64_t block) const { return std::min(kLine, args_.width - block * kLine); }
  int wide(int64_t block) const { return int(vectors_of(columns(block))); }

  const char* table(int64_t token) const {
    return static_cast<const char*>(args_.table) + token * args_.stride * bytes_of(kDtype);
  }

  const char* values(int64_t token) const {
    return static_cast<const char*>(args_.values) + token * bytes_of(args_.values_dtype);
  }

  // Some tokens' columns, by lines of these, then by steps.
  void fill(int64_t token, int64_t tokens, int64_t first, int64_t last) {
    for (int64_t step = 0; step < steps_of(kDtype, tokens); ++step) {
      const int64_t i = kDtype == Dtype::kBFloat16 ? 2 * step : step;
      const char* row = table(token + i);
      for (int64_t block = first; block < last; ++block) {
        float* line = panel_ + (block - first) * kSegment * kLine + step * wide(block) * kLanes;
        for (int j = 0; j < wide(block); ++j) {
          const int64_t column = block * kLine + j * kLanes, left = args_.width - column;
          const char* x = row + column * bytes_of(kDtype);
          if (kDtype == Dtype::kFloat || j % 2 == 0)
            _mm_prefetch(x + kRowsAhead * args_.stride * bytes_of(kDtype), _MM_HINT_T0);
          if constexpr (kDtype != Dtype::kBFloat16) {
            _mm512_store_ps(line + j * kLanes, load<kDtype>(x, left));
          } else {
            if (j % 2 == 0) _mm_prefetch(x + (kRowsAhead + 1) * args_.stride * 2, _MM_HINT_T0);
            const __mmask16 mask = mask_of(left);
            const __m256i below =
                _mm256_maskz_loadu_epi16(i + 1 < tokens ? mask : 0, i + 1 < tokens ? x + args_.stride * 2 : x);
            const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)),
                                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(below), 16));
            _mm512_store_si512(line + j * kLanes, pair);
          }
        }
      }
    }
  }

  // Copies the values of some tokens, so that they lie side by side: in the tensor, rows that are a power of two apart
  // would compete for the same places of the cache. In bfloat16 a pair of tokens is one step, and a float32 value
  // becomes two parts, [parts, rows, steps]. Returns how many parts there are: values that are bfloat16 already have
  // but one.
  int copy(int64_t token, int64_t tokens) {
    constexpr int64_t kAtOnce = kPairs ? 2 * kLanes : kLanes;
    __m512i rests = _mm512_setzero_si512();
    for (int64_t row = 0; row < args_.rows; ++row) {
      for (int64_t i = 0; i < tokens; i += kAtOnce) {
        const int64_t bytes = bytes_of(args_.values_dtype), left = tokens - i;
        const char* x = values(token + i) + row * args_.values_stride * bytes;
        float* out = values_ + row * kSegment + steps_of(kDtype, i);
        if constexpr (!kPairs) {
          _mm512_storeu_ps(
              out, args_.values_dtype == Dtype::kHalf ? load<Dtype::kHalf>(x, left) : load<Dtype::kFloat>(x, left));
        } else if (args_.values_dtype == kDtype) {
          const __mmask32 mask = left >= 2 * kLanes ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
          _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(mask, x));
        } else {
          const __m512 low = load<Dtype::kFloat>(x, left),
                       high = load<Dtype::kFloat>(x + 64, std::max<int64_t>(0, left - kLanes));
          const TwoParts split = split_in_two(low, high);
          _mm512_storeu_si512(out, split.nearest);
          _mm512_storeu_si512(out + args_.rows * kSegment, split.rest);
          rests = _mm512_or_si512(rests, split.rest);
        }
      }
    }
    return _mm512_test_epi32_mask(rests, rests) ? 2 : 1;
  }

  // A line of columns to where it belongs. False if a sum of bfloat16 parts is not finite: an infinity's second part is
  // NaN.
  bool put(int64_t block, const float* sums) const {
    __m512 unlike = _mm512_setzero_ps();  // x - x is 0 or NaN
    for (int64_t row = 0; row < args_.rows; ++row) {
      for (int64_t j = 0; j < columns(block); j += kLanes) {
        const __m512 x = _mm512_load_ps(sums + row * kLine + j);
        _mm512_mask_storeu_ps(args_.out + row * args_.out_stride + block * kLine + j, mask_of(columns(block) - j), x);
        unlike = _mm512_add_ps(unlike, _mm512_sub_ps(x, x));
      }
    }
    return !kPairs || _mm512_cmp_ps_mask(unlike, unlike, _CMP_UNORD_Q) == 0;
  }

  const WeightedSum& args_;
  const int64_t strip_;
  // new[], not std::vector: a member of that compiled here would contain AVX-512 code, and the linker may pick it to
  // serve other files, too.
  char* const memory_;
  float *panel_, *sums_, *values_;
};

void pack(const Packing& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&]<Dtype kDtype>() { pack_passes<kDtype>(args, begin, end); });
}

void multiply_table(const Product& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&]<Dtype kDtype>() { multiply_blocks<kDtype>(args, begin, end); });
}

bool sum_table(const WeightedSum& args, int64_t begin, int64_t end) {
  return with_dtype(args.dtype, [&]<Dtype kDtype>() { return Summer<kDtype>(args).run(begin, end); });
}

}  // namespace
}  // namespace gk
#if defined(__clang__)
#pragma clang attribute pop
#endif

const gk::ProductKernels gk::kProductsAvx512 = {
    gk::kWidest * gk::kLanes, gk::kTokens, gk::kLine, gk::packed_numbers, gk::pack, gk::multiply_table, gk::sum_table};
#endif
