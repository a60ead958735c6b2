// All kernels for AMX.
#include "cpu/tiles.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16,prefer-vector-width=512")
#endif

namespace gk {
namespace {

constexpr int kTile = 512;                      // bfloat16 numbers of a tile: 16 rows of 32
constexpr int kStepTiles = 2 * kTileParts;      // of 32 rows: part by part, the first sixteen and the others
constexpr int64_t kPackedAtATime = 1 << 20;     // bytes of packed x that stay in the second-level cache
constexpr float kLargest = 0x1.ffp127f;          // and beyond: rounds to an infinity in bfloat16
constexpr int64_t kSegment = 8;                 // steps summed in tiles before they join the sum so far

// GCC's tile intrinsics do not say that they read or write memory.
#define GK_MEMORY asm volatile("" ::: "memory")

// Which parts are multiplied, the greatest product last; each shares a part with the one before it.
struct Factors {
  int table, x;
};
constexpr Factors kFactors[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};
constexpr int kFactorCount = 6;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kShapes;

// Thirty-two numbers as sixteen pairs of bfloat16, by part: pair i is numbers i and i + 16, whose upper halves meet by a
// shift and a select. A part is the nearest to what those before it leave (halves away from zero), so that the next is
// small; what is left is exact, and the last part leaves nothing.
[[gnu::always_inline]] inline void split(__m512 low, __m512 high, __m512i out[kTileParts]) {
  const __m512i upper = _mm512_set1_epi32(int(0xFFFF0000u)), half = _mm512_set1_epi32(0x8000);
  for (int part = 0; part < kTileParts; ++part) {
    const bool last = part + 1 == kTileParts;
    const __m512i a = last ? _mm512_castps_si512(low) : _mm512_add_epi32(_mm512_castps_si512(low), half);
    const __m512i b = last ? _mm512_castps_si512(high) : _mm512_add_epi32(_mm512_castps_si512(high), half);
    out[part] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, upper, 0xF8);  // (a >> 16) | (b & upper)
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(a, upper)));
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
  }
}

[[gnu::always_inline]] inline void load_pairs(const float* x, uint32_t mask, __m512i out[kTileParts]) {
  split(_mm512_maskz_loadu_ps(__mmask16(mask), x), _mm512_maskz_loadu_ps(__mmask16(mask >> 16), x + 16), out);
}

// Numbers of x's tiles. Behind them stands for each row of x whether it can be split.
int64_t packed_numbers(int64_t rows, int64_t width) { return tile_blocks(rows) * tile_steps(width) * kStepTiles * kTile; }
uint32_t mask_of(int64_t columns) { return columns >= kTileStep ? ~0u : (1u << columns) - 1; }

// Tiles 0 to 3 are sums: of the table's first and last sixteen rows with x's first and, if kWide, last sixteen.
template <bool kWide>
[[gnu::always_inline]] inline void clear() {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (kWide) {
    _tile_zero(1);
    _tile_zero(3);
  }
}
[[gnu::always_inline]] inline void load_table(const uint16_t* tiles) {
  _tile_loadd(4, tiles, 64);
  _tile_loadd(5, tiles + kTile, 64);
}
template <bool kWide>
[[gnu::always_inline]] inline void load_x(const uint16_t* tiles) {
  _tile_loadd(6, tiles, 64);
  if constexpr (kWide) _tile_loadd(7, tiles + kTile, 64);
}
template <bool kWide>
[[gnu::always_inline]] inline void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kWide) _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  if constexpr (kWide) _tile_dpbf16ps(3, 5, 7);
}
template <bool kWide>
[[gnu::always_inline]] inline void store(float* out, int64_t stride) {
  _tile_stored(0, out, stride * 4);
  _tile_stored(2, out + 16 * stride, stride * 4);
  if constexpr (kWide) {
    _tile_stored(1, out + 16, stride * 4);
    _tile_stored(3, out + 16 * stride + 16, stride * 4);
  }
  GK_MEMORY;
}

class Multiplier {
 public:
  explicit Multiplier(const TileProduct& args) : args_(args), steps_(tile_steps(args.width)) {}

  // Blocks [begin, end) of the table with blocks [first, last) of x.
  void run(int64_t begin, int64_t end, int64_t first, int64_t last) {
    const int64_t full = std::min(end, args_.tokens / kTileBlock);
    if (begin < full) blocks<true>(begin, full, first, last);
    if (full < end) blocks<false>(std::max(begin, full), end, first, last);
  }

 private:
  template <bool kFull>
  void blocks(int64_t begin, int64_t end, int64_t first, int64_t last) {
    fill<kFull>(panels_[current_], begin, 0, 0, 0, kTileBlock);
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t group = first; group < last; ++group) {
        const int64_t next = group + 1 < last ? block : std::min(block + 1, end - 1);
        // While a block is visited for the first time, the one behind it is asked for.
        const int64_t ahead = group == first && block + 1 < end ? kTileBlock * args_.stride : 0;
        if (args_.rows - group * kTileBlock > 16) {
          multiply_block<kFull, true>(block, group, next, ahead);
        } else {
          multiply_block<kFull, false>(block, group, next, ahead);
        }
      }
    }
  }

  template <bool kFull, bool kWide>
  [[gnu::always_inline]] void multiply_block(int64_t block, int64_t group, int64_t next, int64_t ahead) {
    constexpr int64_t kColumns = kWide ? 32 : 16;
    alignas(64) float edge[kTileBlock * 32];
    const bool in_place = kFull && !args_.by_row;
    float* out = in_place ? args_.out + block * kTileBlock * args_.out_stride + group * kTileBlock : edge;
    const int64_t out_stride = in_place ? args_.out_stride : 32;
    const uint16_t* x = args_.packed + group * steps_ * kStepTiles * kTile;
    for (int64_t step = 0; step < steps_; ++step, x += kStepTiles * kTile) {
      if (step % kSegment == 0) clear<kWide>();
      const bool more = step + 1 < steps_;
      multiply_step<kFull, kWide>(x, more ? block : next, more ? step + 1 : 0, ahead);
      if (more && (step + 1) % kSegment) continue;
      if (step < kSegment) {
        store<kWide>(out, out_stride);
      } else {  // short sums of short sums keep the rounding small
        alignas(64) float sums[kTileBlock * 32];
        store<kWide>(sums, 32);
        for (int64_t i = 0; i < kTileBlock; ++i) {
          for (int64_t j = 0; j < kColumns; j += 16) {
            float* to = out + i * out_stride + j;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(sums + i * 32 + j)));
          }
        }
      }
    }
    __mmask16 unordered = 0;
    for (int64_t i = 0; i < kTileBlock; ++i) {
      for (int64_t j = 0; j < kColumns; j += 16) {
        const __m512 sums = _mm512_loadu_ps(out + i * out_stride + j);
        unordered |= _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
      }
    }
    const int64_t tokens = std::min(kTileBlock, args_.tokens - block * kTileBlock);
    if (__builtin_expect(unordered != 0, 0)) mend(block, tokens, group, out, out_stride);
    if (!in_place) copy(edge, block * kTileBlock, tokens, group * kTileBlock, kColumns);
  }

  // A block of sums, 32 wide, to where they belong.
  void copy(const float* sums, int64_t token, int64_t tokens, int64_t row, int64_t columns) const {
    if (!args_.by_row) {
      for (int64_t i = 0; i < tokens; ++i) {
        std::memcpy(args_.out + (token + i) * args_.out_stride + row, sums + i * 32, size_t(columns) * sizeof(float));
      }
      return;
    }
    const __m512i down = _mm512_mullo_epi32(_mm512_set1_epi32(32), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int64_t j = 0; j < std::min(columns, args_.rows - row); ++j) {
      for (int64_t i = 0; i < tokens; i += 16) {
        const __mmask16 mask = __mmask16(mask_of(tokens - i));
        const __m512 column = _mm512_i32gather_ps(down, sums + i * 32 + j, 4);
        _mm512_mask_storeu_ps(args_.out + (row + j) * args_.out_stride + token + i, mask, column);
      }
    }
  }

  // The products of one step, and between them the panel of the next: the matrix unit and the vector units overlap.
  template <bool kFull, bool kWide>
  [[gnu::always_inline]] void multiply_step(const uint16_t* x, int64_t block, int64_t step, int64_t ahead) {
    const uint16_t* panel = panels_[current_];
    current_ ^= 1;
    GK_MEMORY;
#pragma GCC unroll 6
    for (int i = 0; i < kFactorCount; ++i) {
      if (i == 0 || kFactors[i].table != kFactors[i - 1].table) load_table(panel + kFactors[i].table * 2 * kTile);
      if (i == 0 || kFactors[i].x != kFactors[i - 1].x) load_x<kWide>(x + kFactors[i].x * 2 * kTile);
      multiply<kWide>();
      fill<kFull>(panels_[current_], block, step, ahead, kTileBlock * i / kFactorCount, kTileBlock * (i + 1) / kFactorCount);
    }
  }

  // Rows [first, last) of a block's columns as tiles.
  template <bool kFull>
  [[gnu::always_inline]] void fill(uint16_t* panel, int64_t block, int64_t step, int64_t ahead, int64_t first, int64_t last) {
    const float* table = args_.table + block * kTileBlock * args_.stride + step * kTileStep;
    const uint32_t mask = mask_of(args_.width - step * kTileStep);
    const int64_t tokens = args_.tokens - block * kTileBlock;
#pragma GCC unroll 6
    for (int64_t i = first; i < last; ++i) {
      const float* row = table + (kFull ? i : std::min(i, tokens - 1)) * args_.stride;
      _mm_prefetch(reinterpret_cast<const char*>(row + ahead), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(row + ahead + 16), _MM_HINT_T1);
      __m512i pairs[kTileParts];
      load_pairs(row, mask, pairs);
      for (int part = 0; part < kTileParts; ++part) {
        _mm512_store_si512(panel + (part * 2 + i / 16) * kTile + i % 16 * 32, pairs[part]);
      }
    }
  }

  // Parts of an infinity are an infinity and NaN, and numbers next to the largest round to an infinity. What such numbers
  // of the table spoiled is taken from them alone; a row of x that holds one stays NaN, as do sums that overflow.
  [[gnu::noinline, gnu::cold]] void mend(int64_t block, int64_t tokens, int64_t group, float* out, int64_t out_stride) const {
    const int64_t rows = std::min(kTileBlock, args_.rows - group * kTileBlock);
    const uint16_t* finite = args_.packed + packed_numbers(args_.rows, args_.width) + group * kTileBlock;
    for (int64_t i = 0; i < tokens; ++i) {
      float* sums = out + i * out_stride;
      bool spoiled = false;
      for (int64_t j = 0; j < rows; ++j) spoiled |= finite[j] && std::isnan(sums[j]);
      if (!spoiled) continue;
      const float* token = args_.table + (block * kTileBlock + i) * args_.stride;
      bool nan = false, large = false, infinite = false;
      for (int64_t k = 0; k < args_.width; ++k) {
        nan |= std::isnan(token[k]);
        large |= std::abs(token[k]) >= kLargest;
        infinite |= std::isinf(token[k]);
      }
      if (nan || !large) continue;
      for (int64_t j = 0; j < rows; ++j) {
        if (!finite[j] || !std::isnan(sums[j])) continue;
        double sum = 0.0;
        for (int64_t k = 0; k < args_.width && !std::isnan(sum); ++k) {
          if (!infinite || std::isinf(token[k])) sum += double(token[k]) * x_at(group, j, k);
        }
        sums[j] = float(sum);
      }
    }
  }

  // A number of x, from its parts.
  double x_at(int64_t group, int64_t row, int64_t column) const {
    const uint16_t* tiles = args_.packed + ((group * steps_ + column / kTileStep) * kStepTiles + row / 16) * kTile;
    const int64_t pair = column % 16, place = pair * 32 + row % 16 * 2 + column % kTileStep / 16;
    double sum = 0.0;
    for (int part = 0; part < kTileParts; ++part) {
      const uint32_t bits = uint32_t(tiles[part * 2 * kTile + place]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      sum += value;
    }
    return sum;
  }

  const TileProduct& args_;
  const int64_t steps_;
  alignas(64) uint16_t panels_[2][kStepTiles * kTile];
  int current_ = 0;
};

}  // namespace

void pack_tiles(const TilePacking& args, int64_t begin, int64_t end) {
  uint16_t* finite = args.packed + packed_numbers(args.rows, args.width);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t row = block * kTileBlock; row < (block + 1) * kTileBlock; ++row) {
      const float* x = args.x + std::min(row, args.rows - 1) * args.stride;
      finite[row] = std::all_of(x, x + args.width, [](float number) { return std::abs(number) < kLargest; });
    }
    for (int64_t step = 0; step < tile_steps(args.width); ++step) {
      // A tile's row is a pair of columns, so that x's rows lie side by side.
      uint16_t* tiles = args.packed + (block * tile_steps(args.width) + step) * kStepTiles * kTile;
      for (int64_t i = 0; i < kTileBlock; ++i) {
        const int64_t row = block * kTileBlock + i;
        const float* x = args.x + std::min(row, args.rows - 1) * args.stride + step * kTileStep;
        __m512i pairs[kTileParts];
        load_pairs(x, row < args.rows ? mask_of(args.width - step * kTileStep) : 0, pairs);
        for (int part = 0; part < kTileParts; ++part) {
          alignas(64) uint32_t values[16];
          _mm512_store_si512(values, pairs[part]);
          uint16_t* column = tiles + (part * 2 + i / 16) * kTile + i % 16 * 2;
          for (int j = 0; j < 16; ++j) std::memcpy(column + j * 32, values + j, sizeof *values);
        }
      }
    }
  }
}

void multiply_tiles(const TileProduct& args, int64_t begin, int64_t end) {
  const int64_t groups = tile_blocks(args.rows), bytes = tile_steps(args.width) * kStepTiles * kTile * 2;
  const int64_t at_a_time = std::max<int64_t>(1, kPackedAtATime / std::max<int64_t>(1, bytes));
  GK_MEMORY;
  _tile_loadconfig(&kShapes);
  for (int64_t first = 0; first < groups; first += at_a_time) {
    Multiplier(args).run(begin, end, first, std::min(groups, first + at_a_time));
  }
  _tile_release();
}

}  // namespace gk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace gk {
void pack_tiles(const TilePacking&, int64_t, int64_t) {}
void multiply_tiles(const TileProduct&, int64_t, int64_t) {}
}  // namespace gk
#endif
