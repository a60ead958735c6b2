// Products on AVX2's vector units, by float32 multiply-adds. Numbers of 16 bits are widened first, which is exact.
#include "cpu/products/products.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace gk {
namespace {

#include "cpu/products/ahead.inl"

// The micro-kernel keeps kTall x 2 vectors of sums in registers, which with two vectors of a line and one number of a
// row are fifteen of the sixteen there are.
constexpr int64_t kLanes = 8;
constexpr int kTall = 6;
constexpr int64_t kLine = 2 * kLanes;      // numbers of a line
constexpr int64_t kRound = 4;              // lines that share what is in the first-level cache
constexpr int64_t kNearby = 256;           // numbers from one row of sums to the next, at most, if they grow in place
constexpr int64_t kTokens = 4 * kTall;     // rows of the table at a time
constexpr int64_t kSegment = 64;           // steps whose sum is taken in registers, so that rounding stays small
constexpr int64_t kStrip = 16;             // rounds of the table's columns that a panel has at most
constexpr int64_t kSumsAtATime = 1 << 17;  // numbers that stay in the second-level cache
constexpr int64_t kStepsBetween = 16;      // calls of Ahead::ask()

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }
int64_t lines_of(int64_t numbers) { return (numbers + kLine - 1) / kLine; }

// Eight numbers as float32.
template <Dtype kDtype>
[[gnu::always_inline]] inline __m256 load(const char* x) {
  if constexpr (kDtype == Dtype::kFloat) return _mm256_loadu_ps(reinterpret_cast<const float*>(x));
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  if constexpr (kDtype == Dtype::kHalf) return _mm256_cvtph_ps(narrow);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
// The first `left` of them, and zeros.
template <Dtype kDtype>
[[gnu::always_inline]] inline __m256 load(const char* x, int64_t left) {
  if (__builtin_expect(left >= kLanes, 1)) return load<kDtype>(x);
  char some[kLanes * 4] = {};
  if (left > 0) std::memcpy(some, x, size_t(left * bytes_of(kDtype)));
  return load<kDtype>(some);
}

// Rounds to nearest, ties to even. Returns where the numbers end.
[[gnu::always_inline]] inline char* convert(__m256 x, Dtype dtype, char* out) {
  if (dtype == Dtype::kFloat) {
    _mm256_storeu_ps(reinterpret_cast<float*>(out), x);
    return out + 32;
  }
  __m128i narrow;
  if (dtype == Dtype::kHalf) {
    narrow = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
    narrow = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow);
  return out + 16;
}

// x[i][j] and x[j][i] change places.
[[gnu::always_inline]] inline void transpose(__m256 x[8]) {
  __m256 y[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // x[i + k]: number k of each half, of rows i to i + 3
    for (int k = 0; k < 2; ++k) {
      const __m256d a = _mm256_castps_pd(y[i + k]), b = _mm256_castps_pd(y[i + k + 2]);
      x[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      x[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int k = 0; k < 4; ++k) {
    const __m256 a = x[k], b = x[k + 4];
    x[k] = _mm256_permute2f128_ps(a, b, 0x20);
    x[k + 4] = _mm256_permute2f128_ps(a, b, 0x31);
  }
}

// sums[kRows][kLine] of `steps` steps, rows of sums `stride` apart; they replace what is there or are added to it.
template <int kRows>
[[gnu::noinline]] void multiply(const BroadcastRows& rows, const float* line, int64_t steps, bool fresh, float* sums,
                                int64_t stride, Ahead& ahead) {
  __m256 sum[kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
  const char* place = rows.first;
  const int64_t apart = rows.stride;
  while (steps > 0) {
    ahead.ask();
    const int64_t now = std::min(steps, kStepsBetween);
    steps -= now;
#pragma GCC unroll 4
    for (int64_t k = 0; k < now; ++k) {
      const __m256 low = _mm256_loadu_ps(line), high = _mm256_loadu_ps(line + kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m256 x = _mm256_broadcast_ss(reinterpret_cast<const float*>(place + i * apart));
        sum[i][0] = _mm256_fmadd_ps(x, low, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(x, high, sum[i][1]);
      }
      place += 4;
      line += kLine;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* out = sums + i * stride + j * kLanes;
      _mm256_storeu_ps(out, fresh ? sum[i][j] : _mm256_add_ps(_mm256_loadu_ps(out), sum[i][j]));
    }
  }
}

// The same for any number of rows and lines, `next` numbers from one line to the other.
void multiply_rows(BroadcastRows rows, int64_t count, const float* lines, int64_t count_lines, int64_t next,
                   int64_t steps, bool fresh, float* sums, int64_t stride, Ahead& ahead) {
  const auto some = [&]<int kRows>() {
    for (; count >= kRows; count -= kRows) {
      for (int64_t i = 0; i < count_lines; ++i)
        multiply<kRows>(rows, lines + i * next, steps, fresh, sums + i * kLine, stride, ahead);
      rows.first += kRows * rows.stride;
      sums += kRows * stride;
    }
  };
  some.template operator()<kTall>();
  some.template operator()<4>();
  some.template operator()<2>();
  some.template operator()<1>();
}
int64_t calls_of(int64_t rows, int64_t lines, int64_t steps) { return rows / kTall * lines * (steps / kStepsBetween); }

// x's rows in lines, a line's steps one after the other.
int64_t packed_numbers(Dtype, int64_t rows, int64_t width) { return 2 * lines_of(rows) * kLine * width; }

template <Dtype kDtype>
void pack_lines(const Packing& args, int64_t begin, int64_t end) {
  for (int64_t vector = 2 * begin; vector < 2 * end; ++vector) {
    float* line = reinterpret_cast<float*>(args.packed) + vector / 2 * kLine * args.width + vector % 2 * kLanes;
    for (int64_t column = 0; column < args.width; column += kLanes) {
      __m256 block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t row = vector * kLanes + i, place = std::min(row, args.rows - 1) * args.stride + column;
        const char* x = static_cast<const char*>(args.x) + place * bytes_of(kDtype);
        block[i] = load<kDtype>(x, row < args.rows ? args.width - column : 0);
      }
      transpose(block);
      for (int64_t i = 0; i < std::min(kLanes, args.width - column); ++i)
        _mm256_storeu_ps(line + (column + i) * kLine, block[i]);
    }
  }
}

// Writes sums of `tokens` rows of the table with `lines` lines of x, from `row` on, where they belong.
void put(const Product& args, const float* sums, int64_t token, int64_t tokens, int64_t row, int64_t lines) {
  const int64_t bytes = bytes_of(args.out_dtype), columns = lines * kLine;
  char* out = static_cast<char*>(args.out);
  if (!args.by_row) {
    for (int64_t i = 0; i < tokens; ++i) {
      char* to = out + ((token + i) * args.out_stride + row) * bytes;
      for (int64_t j = 0; j < columns; j += kLanes)
        to = convert(_mm256_loadu_ps(sums + i * kRound * kLine + j), args.out_dtype, to);
    }
    return;
  }
  for (int64_t j = 0; j < std::min(columns, args.rows - row); j += kLanes) {
    const int64_t rows = std::min(kLanes, args.rows - row - j);
    for (int64_t i = 0; i < tokens; i += kLanes) {
      __m256 block[kLanes];
      for (int k = 0; k < kLanes; ++k) block[k] = _mm256_loadu_ps(sums + (i + k) * kRound * kLine + j);
      transpose(block);
      for (int64_t k = 0; k < rows; ++k) {
        char* to = out + ((row + j + k) * args.out_stride + token + i) * bytes;
        if (tokens - i >= kLanes) {
          convert(block[k], args.out_dtype, to);
        } else {
          char some[kLanes * 4];
          convert(block[k], args.out_dtype, some);
          std::memcpy(to, some, size_t((tokens - i) * bytes));
        }
      }
    }
  }
}

template <Dtype kDtype>
void multiply_blocks(const Product& args, int64_t begin, int64_t end) {
  static_assert(kTokens % kLanes == 0);
  alignas(64) float sums[kTokens * kRound * kLine], wider[kDtype == Dtype::kFloat ? 1 : kTokens * kSegment];
  const int64_t stride = args.stride * bytes_of(kDtype), lines = lines_of(args.rows);
  // Sums that are wanted as they are grow where they belong, unless their rows lie so far apart that these would
  // compete for the same places of the first-level cache.
  const bool in_place = args.out_dtype == Dtype::kFloat && !args.by_row && args.out_stride <= kNearby;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t token = block * kTokens, tokens = std::min(kTokens, args.tokens - token);
    const char* table = static_cast<const char*>(args.table) + token * stride;
    const int64_t behind = block + 1 < end ? std::min(kTokens, args.tokens - token - tokens) : 0;
    Ahead ahead(table + tokens * stride, stride, behind, args.width * bytes_of(kDtype),
                calls_of(tokens, lines, args.width));
    for (int64_t first = 0; first < lines; first += kRound) {
      const int64_t now_lines = std::min(kRound, lines - first);
      const float* packed = reinterpret_cast<const float*>(args.packed) + first * kLine * args.width;
      float* const to = in_place ? static_cast<float*>(args.out) + token * args.out_stride + first * kLine : sums;
      const int64_t to_stride = in_place ? args.out_stride : kRound * kLine;
      for (int64_t step = 0; step < args.width; step += kSegment) {
        const int64_t now = std::min(kSegment, args.width - step);
        BroadcastRows rows{table + 4 * step, stride, false};
        if constexpr (kDtype != Dtype::kFloat) {
          rows = {reinterpret_cast<const char*>(wider), kSegment * 4, false};
          for (int64_t i = 0; i < tokens; ++i) {
            for (int64_t k = 0; k < now; k += kLanes) {
              _mm256_store_ps(wider + i * kSegment + k, load<kDtype>(table + i * stride + 2 * (step + k), now - k));
            }
          }
        }
        multiply_rows(rows, tokens, packed + step * kLine, now_lines, kLine * args.width, now, step == 0, to, to_stride,
                      ahead);
      }
      if (!in_place) put(args, sums, token, tokens, first * kLine, now_lines);
    }
  }
}

// values @ table: lines are pieces of the table's own rows.
template <Dtype kDtype>
class Summer {
 public:
  explicit Summer(const WeightedSum& args)
      : args_(args),
        strip_(std::clamp<int64_t>(kSumsAtATime / (kRound * kLine * args.rows), 1, kStrip) * kRound),
        memory_(new float[size_t(strip_ * kLine * (kAtATime + args.rows) + kAtATime * args.rows)]),
        panel_(memory_),
        sums_(panel_ + strip_ * kAtATime * kLine),
        values_(sums_ + strip_ * args.rows * kLine) {}
  ~Summer() { delete[] memory_; }
  Summer(const Summer&) = delete;

  // Lines [begin, end) of the table's columns.
  void run(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += strip_) {
      const int64_t lines = std::min(strip_, end - first);
      for (int64_t token = 0; token < args_.tokens; token += kAtATime) {
        const int64_t tokens = std::min(kAtATime, args_.tokens - token),
                      behind = std::min(kAtATime, args_.tokens - token - tokens);
        fill(token, tokens, first, lines);
        copy(token, tokens);
        const int64_t bytes = bytes_of(kDtype), columns = std::min(lines * kLine, args_.width - first * kLine);
        Ahead ahead(table(token + tokens) + first * kLine * bytes, args_.stride * bytes, behind, columns * bytes,
                    calls_of(args_.rows, lines, tokens));
        const BroadcastRows rows{reinterpret_cast<const char*>(values_), kAtATime * 4, false};
        // One line with all rows after the other: a line's steps stay in the first-level cache.
        for (int64_t i = 0; i < lines; ++i) {
          multiply_rows(rows, args_.rows, panel_ + i * kAtATime * kLine, 1, 0, tokens, token == 0,
                        sums_ + i * args_.rows * kLine, kLine, ahead);
        }
      }
      for (int64_t i = 0; i < lines; ++i) put_line(first + i, sums_ + i * args_.rows * kLine);
    }
  }

 private:
  static constexpr int64_t kAtATime = 64;  // tokens

  const char* table(int64_t token) const {
    return static_cast<const char*>(args_.table) + token * args_.stride * bytes_of(kDtype);
  }
  const char* values(int64_t token) const {
    return static_cast<const char*>(args_.values) + token * bytes_of(args_.values_dtype);
  }

  // Some tokens' columns, by lines, then by tokens.
  void fill(int64_t token, int64_t tokens, int64_t first, int64_t lines) {
    for (int64_t step = 0; step < tokens; ++step) {
      for (int64_t i = 0; i < lines; ++i) {
        const int64_t column = (first + i) * kLine;
        const char* x = table(token + step) + column * bytes_of(kDtype);
        for (int64_t j = 0; j < kLine; j += kLanes) {
          _mm256_storeu_ps(panel_ + (i * kAtATime + step) * kLine + j,
                           load<kDtype>(x + j * bytes_of(kDtype), args_.width - column - j));
        }
      }
    }
  }

  // Copies the values of some tokens, so that they lie side by side: in the tensor, rows that are a power of two apart
  // would compete for the same places of the cache.
  void copy(int64_t token, int64_t tokens) {
    const int64_t bytes = bytes_of(args_.values_dtype);
    for (int64_t row = 0; row < args_.rows; ++row) {
      for (int64_t i = 0; i < tokens; i += kLanes) {
        const char* x = values(token + i) + row * args_.values_stride * bytes;
        _mm256_storeu_ps(values_ + row * kAtATime + i, args_.values_dtype == Dtype::kFloat
                                                           ? load<Dtype::kFloat>(x, tokens - i)
                                                           : load<kDtype>(x, tokens - i));
      }
    }
  }

  // A line of columns to where it belongs.
  void put_line(int64_t line, const float* sums) const {
    const int64_t columns = std::min(kLine, args_.width - line * kLine);
    for (int64_t row = 0; row < args_.rows; ++row)
      std::memcpy(args_.out + row * args_.out_stride + line * kLine, sums + row * kLine, size_t(columns) * 4);
  }

  const WeightedSum& args_;
  const int64_t strip_;  // lines
  // new[], not std::vector: a member of that compiled here would contain AVX2 code, and the linker may pick it to serve
  // other files, too.
  float* const memory_;
  float *const panel_, *const sums_, *const values_;
};

void pack(const Packing& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&]<Dtype kDtype>() { pack_lines<kDtype>(args, begin, end); });
}

void multiply_table(const Product& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&]<Dtype kDtype>() { multiply_blocks<kDtype>(args, begin, end); });
}

// Blocks [begin, end) of kRound lines.
bool sum_table(const WeightedSum& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&]<Dtype kDtype>() {
    Summer<kDtype>(args).run(begin * kRound, std::min(end * kRound, lines_of(args.width)));
  });
  return true;
}

}  // namespace
}  // namespace gk
#if defined(__clang__)
#pragma clang attribute pop
#endif

const gk::ProductKernels gk::kProductsAvx2 = {gk::kLine, gk::kTokens,        gk::kRound * gk::kLine, gk::packed_numbers,
                                              gk::pack,  gk::multiply_table, gk::sum_table};
#endif
