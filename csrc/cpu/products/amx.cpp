// Products on AMX's matrix unit, which multiplies tiles of bfloat16 and adds in float32.
//
// A float32 number is the exact sum of three bfloat16 ones, so a product of two is the sum of nine such products, of
// which the three least are below float32's rounding and left out. Sums come out closer than those of as many float32
// products.
#include "cpu/products/products.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(                                                                       \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#endif

namespace gk {
namespace {

constexpr int64_t kTileBlock = 32;           // rows of the table, and of x, that one round of products covers
constexpr int64_t kTileStep = 32;            // columns that one tile covers
constexpr int kTile = 512;                   // bfloat16 numbers of a tile: 16 rows of 32
constexpr int64_t kPackedAtATime = 1 << 20;  // bytes of packed x that stay in the second-level cache

constexpr int64_t tile_blocks(int64_t rows) { return (rows + kTileBlock - 1) / kTileBlock; }
constexpr int64_t tile_steps(int64_t width) { return (width + kTileStep - 1) / kTileStep; }

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

#include "cpu/products/bf16_split.inl"
#include "cpu/products/transpose.inl"
#include "cpu/products/put_sums.inl"

// The pairs of thirty-two numbers of a row, part by part; those that mask leaves out are zero.
[[gnu::always_inline]] inline void load_pairs(const float* x, uint32_t mask, __m512i out[kTileParts]) {
  split_in_three(_mm512_maskz_loadu_ps(__mmask16(mask), x), _mm512_maskz_loadu_ps(__mmask16(mask >> 16), x + 16), out);
}

// `parts_of`: bfloat16 parts of one number. `step_tiles`: tiles of 32 rows and one step; for each part rows 0 to 15,
// then 16 to 31.
constexpr int parts_of(Dtype dtype) { return dtype == Dtype::kFloat ? kTileParts : 1; }
constexpr int step_tiles(Dtype dtype) { return 2 * parts_of(dtype); }

// uint16 values in packed x's tiles. In float32, one flag per row of x follows the tiles: 1 if all its numbers are
// below kLargest, so splitting is exact.
int64_t packed_numbers(Dtype dtype, int64_t rows, int64_t width) {
  return tile_blocks(rows) * tile_steps(width) * step_tiles(dtype) * kTile;
}
uint32_t mask_of(int64_t columns) { return columns >= kTileStep ? ~0u : (1u << columns) - 1; }

// How `Multiplier` uses the eight tile registers for table @ x.T. A block is 32 rows of the table with 32 of x (with 16
// if not kWide, which spares the right column), and a step covers 32 columns of both:
//
//                              x, rows 0 to 15    x, rows 16 to 31
//                                   TMM6               TMM7
//   table, rows  0 to 15  TMM4      TMM0               TMM1
//   table, rows 16 to 31  TMM5      TMM2               TMM3        TMM0 to TMM3: [16, 16] sums
//
// TMM4 and TMM5 are the table's rows as they lie in memory. TMM6 and TMM7 are x transposed by pairs: row i of a tile
// has the i-th pair of columns of sixteen rows of x, as the instruction wants its second factor.
struct ProductTiles {
  template <bool kWide>
  [[gnu::always_inline]] static void clear() {
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (kWide) {
      _tile_zero(1);
      _tile_zero(3);
    }
  }
  // Sixteen rows from `tiles` on and sixteen from `below` on, `stride` numbers apart.
  [[gnu::always_inline]] static void load_table(const uint16_t* tiles, const uint16_t* below, int64_t stride) {
    _tile_loadd(4, tiles, stride * 2);
    _tile_loadd(5, below, stride * 2);
  }
  template <bool kWide>
  [[gnu::always_inline]] static void load_x(const uint16_t* tiles) {
    _tile_loadd(6, tiles, 64);
    if constexpr (kWide) _tile_loadd(7, tiles + kTile, 64);
  }
  template <bool kWide>
  [[gnu::always_inline]] static void multiply_add() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide) _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kWide) _tile_dpbf16ps(3, 5, 7);
  }
  // As [32, 32] numbers.
  template <bool kWide>
  [[gnu::always_inline]] static void store(float* sums) {
    _tile_stored(0, sums, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    if constexpr (kWide) {
      _tile_stored(1, sums + 16, 128);
      _tile_stored(3, sums + 16 * 32 + 16, 128);
    }
    GK_MEMORY;
  }
};

// How `Summer` uses them for values @ table. A block is 32 rows of values (16 if not kWide, which spares the lower row)
// with 32 columns of the table, and a step covers 32 tokens:
//
//                               table, half of the columns    table, the other half
//                                         TMM4                        TMM5
//   values, rows  0 to 15  TMM6           TMM0                        TMM1
//   values, rows 16 to 31  TMM7           TMM2                        TMM3       TMM0 to TMM3: [16, 16] sums
//
// The factors' registers are the other way round than in ProductTiles: the values, which are the first factor, change
// with every product of parts, the table's tiles stay. Row i of a tile of the table has the i-th pair of its tokens.
struct SumTiles {
  template <bool kWide>
  [[gnu::always_inline]] static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kWide) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  // Sums so far, to be added to.
  template <bool kWide>
  [[gnu::always_inline]] static void resume(const float* sums) {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, sums + 16, 128);
    if constexpr (kWide) {
      _tile_loadd(2, sums + 16 * 32, 128);
      _tile_loadd(3, sums + 16 * 32 + 16, 128);
    }
  }
  [[gnu::always_inline]] static void load_columns(const uint16_t* tiles) {
    _tile_loadd(4, tiles, 64);
    _tile_loadd(5, tiles + kTile, 64);
  }
  template <bool kWide>
  [[gnu::always_inline]] static void load_values(const uint16_t* tiles) {
    _tile_loadd(6, tiles, 64);
    if constexpr (kWide) _tile_loadd(7, tiles + kTile, 64);
  }
  template <bool kWide>
  [[gnu::always_inline]] static void multiply_add() {
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 6, 5);
    if constexpr (kWide) {
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  // As [32, 32] numbers.
  template <bool kWide>
  [[gnu::always_inline]] static void store(float* sums) {
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if constexpr (kWide) {
      _tile_stored(2, sums + 16 * 32, 128);
      _tile_stored(3, sums + 16 * 32 + 16, 128);
    }
    GK_MEMORY;
  }
};

template <Dtype kDtype>
class Multiplier {
 public:
  explicit Multiplier(const Product& args) : args_(args), steps_(tile_steps(args.width)) {}

  // Blocks [begin, end) of the table with blocks [first, last) of x.
  void run(int64_t begin, int64_t end, int64_t first, int64_t last) {
    const int64_t full = std::min(end, args_.tokens / kTileBlock);
    if (begin < full) blocks<true>(begin, full, first, last);
    if (full < end) blocks<false>(std::max(begin, full), end, first, last);
  }

 private:
  static constexpr bool kSplit = kDtype == Dtype::kFloat;
  static constexpr int kStepTiles = step_tiles(kDtype);
  static constexpr int64_t kSegment = kSplit ? 8 : INT64_MAX;  // steps summed in tiles before they join the sum so far
  using Number = std::conditional_t<kSplit, float, uint16_t>;
  using Tiles = ProductTiles;

  const Number* table(int64_t token) const { return static_cast<const Number*>(args_.table) + token * args_.stride; }

  template <bool kFull>
  void blocks(int64_t begin, int64_t end, int64_t first, int64_t last) {
    if constexpr (kSplit) fill<kFull>(panels_[current_], begin, 0, 0, kTileBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t behind =
          std::clamp<int64_t>(args_.tokens - (block + 1) * kTileBlock, 0, block + 1 < end ? kTileBlock : 0);
      for (int64_t group = first; group < last; ++group) {
        // The next block is asked for meanwhile: in float32 all of it while the first block of x is multiplied.
        if constexpr (kSplit) {
          far_ = group == first && behind == kTileBlock ? kTileBlock * args_.stride : 0;
        } else {
          far_ = kTileBlock * args_.stride;
          ask_from_ = behind * (group - first) / (last - first);
          ask_to_ = behind * (group - first + 1) / (last - first);
        }
        const int64_t after = group + 1 < last ? block : std::min(block + 1, end - 1);
        if (args_.rows - group * kTileBlock > 16) {
          multiply_block<kFull, true>(block, group, after);
        } else {
          multiply_block<kFull, false>(block, group, after);
        }
      }
    }
  }

  template <bool kFull, bool kWide>
  [[gnu::always_inline]] void multiply_block(int64_t block, int64_t group, int64_t next) {
    constexpr int64_t kColumns = kWide ? 32 : 16;
    alignas(64) float sums[kTileBlock * 32];
    const uint16_t* x = args_.packed + group * steps_ * kStepTiles * kTile;
    for (int64_t step = 0; step < steps_; ++step, x += kStepTiles * kTile) {
      if (step % kSegment == 0) Tiles::clear<kWide>();
      const bool more = step + 1 < steps_;
      if constexpr (kSplit) {
        multiply_split<kFull, kWide>(x, more ? block : next, more ? step + 1 : 0);
      } else {
        multiply_step<kFull, kWide>(x, block, step);
      }
      if (more && (step + 1) % kSegment) continue;
      if (step < kSegment) {
        Tiles::store<kWide>(sums);
      } else {  // short sums of short sums keep the rounding small
        alignas(64) float latest[kTileBlock * 32];
        Tiles::store<kWide>(latest);
        for (int64_t i = 0; i < kTileBlock * 32; i += kWide ? 16 : 32) {
          _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(latest + i)));
        }
      }
    }
    const int64_t tokens = std::min(kTileBlock, args_.tokens - block * kTileBlock);
    if constexpr (kSplit) {
      __mmask16 unordered = 0;
      for (int64_t i = 0; i < kTileBlock * 32; i += kWide ? 16 : 32) {
        const __m512 found = _mm512_load_ps(sums + i);
        unordered |= _mm512_cmp_ps_mask(found, found, _CMP_UNORD_Q);
      }
      if (__builtin_expect(unordered != 0, 0)) mend(block, tokens, group, sums);
    }
    put_sums<32>(args_, sums, block * kTileBlock, tokens, group * kTileBlock, kColumns);
  }

  // The products of one step. What a block or a step lacks to be whole is zero.
  template <bool kFull, bool kWide>
  [[gnu::always_inline]] void multiply_step(const uint16_t* x, int64_t block, int64_t step) {
    const Number* tiles = table(block * kTileBlock) + step * kTileStep;
    const int64_t columns = args_.width - step * kTileStep;
    Tiles::load_x<kWide>(x);
    if (__builtin_expect(kFull && columns >= kTileStep, 1)) {
      Tiles::load_table(tiles, tiles + 16 * args_.stride, args_.stride);
    } else {
      uint16_t* panel = panels_[0];
      for (int64_t i = 0; i < kTileBlock; ++i) {
        const uint32_t mask = i < args_.tokens - block * kTileBlock ? mask_of(columns) : 0;
        _mm512_store_si512(panel + i * 32, _mm512_maskz_loadu_epi16(mask, tiles + i * args_.stride));
      }
      GK_MEMORY;
      Tiles::load_table(panel, panel + kTile, 32);
    }
    Tiles::multiply_add<kWide>();
    for (int64_t i = ask_from_; i < ask_to_; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(tiles + far_ + i * args_.stride), _MM_HINT_T1);
    }
  }

  // The same in float32, and between the products the panel of the next step: the matrix unit and the vector units
  // overlap.
  template <bool kFull, bool kWide>
  [[gnu::always_inline]] void multiply_split(const uint16_t* x, int64_t block, int64_t step) {
    const uint16_t* panel = panels_[current_];
    current_ ^= 1;
    GK_MEMORY;
#pragma GCC unroll 6
    for (int i = 0; i < kFactorCount; ++i) {
      if (i == 0 || kFactors[i].table != kFactors[i - 1].table) {
        const uint16_t* tiles = panel + kFactors[i].table * 2 * kTile;
        Tiles::load_table(tiles, tiles + kTile, 32);
      }
      if (i == 0 || kFactors[i].x != kFactors[i - 1].x) Tiles::load_x<kWide>(x + kFactors[i].x * 2 * kTile);
      Tiles::multiply_add<kWide>();
      fill<kFull>(panels_[current_], block, step, kTileBlock * i / kFactorCount, kTileBlock * (i + 1) / kFactorCount);
    }
  }

  // Rows [first, last) of a block's columns as tiles.
  template <bool kFull>
  [[gnu::always_inline]] void fill(uint16_t* panel, int64_t block, int64_t step, int64_t first, int64_t last) {
    const uint32_t mask = mask_of(args_.width - step * kTileStep);
    const int64_t tokens = args_.tokens - block * kTileBlock;
#pragma GCC unroll 6
    for (int64_t i = first; i < last; ++i) {
      const float* row = table(block * kTileBlock + (kFull ? i : std::min(i, tokens - 1))) + step * kTileStep;
      _mm_prefetch(reinterpret_cast<const char*>(row + far_), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(row + far_ + 16), _MM_HINT_T1);
      __m512i pairs[kTileParts];
      load_pairs(row, mask, pairs);
      for (int part = 0; part < kTileParts; ++part) {
        _mm512_store_si512(panel + (part * 2 + i / 16) * kTile + i % 16 * 32, pairs[part]);
      }
    }
  }

  // Parts of an infinity are an infinity and NaN, and numbers next to the largest round to an infinity. What such
  // numbers of the table spoiled is taken from them alone; a row of x that holds one stays NaN, as do sums that
  // overflow.
  [[gnu::noinline, gnu::cold]] void mend(int64_t block, int64_t tokens, int64_t group, float* all) const {
    const int64_t rows = std::min(kTileBlock, args_.rows - group * kTileBlock);
    const uint16_t* finite = args_.packed + packed_numbers(kDtype, args_.rows, args_.width) + group * kTileBlock;
    for (int64_t i = 0; i < tokens; ++i) {
      float* sums = all + i * 32;
      bool spoiled = false;
      for (int64_t j = 0; j < rows; ++j) spoiled |= finite[j] && std::isnan(sums[j]);
      if (!spoiled) continue;
      const float* token = table(block * kTileBlock + i);
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

  const Product& args_;
  const int64_t steps_;
  alignas(64) uint16_t panels_[2][kStepTiles * kTile];
  int current_ = 0;
  int64_t far_ = 0, ask_from_ = 0, ask_to_ = 0;
};

// A tile's row is a pair of columns, so that x's rows lie side by side.
template <Dtype kDtype>
void pack(const Packing& args, int64_t block) {
  constexpr bool kSplit = kDtype == Dtype::kFloat;
  using Number = std::conditional_t<kSplit, float, uint16_t>;
  const auto row_of = [&](int64_t row) {
    return static_cast<const Number*>(args.x) + std::min(row, args.rows - 1) * args.stride;
  };
  if constexpr (kSplit) {
    uint16_t* finite = args.packed + packed_numbers(args.dtype, args.rows, args.width);
    for (int64_t row = block * kTileBlock; row < (block + 1) * kTileBlock; ++row) {
      finite[row] = std::all_of(row_of(row), row_of(row) + args.width, [](float x) { return std::abs(x) < kLargest; });
    }
  }
  for (int64_t step = 0; step < tile_steps(args.width); ++step) {
    uint16_t* tiles = args.packed + (block * tile_steps(args.width) + step) * step_tiles(kDtype) * kTile;
    for (int64_t half = 0; half < 2; ++half, tiles += kTile) {
      __m512 pairs[parts_of(kDtype)][16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t row = block * kTileBlock + half * 16 + i;
        const uint32_t mask = row < args.rows ? mask_of(args.width - step * kTileStep) : 0;
        const Number* x = row_of(row) + step * kTileStep;
        if constexpr (kSplit) {
          __m512i parts[kTileParts];
          load_pairs(x, mask, parts);
          for (int part = 0; part < kTileParts; ++part) pairs[part][i] = _mm512_castsi512_ps(parts[part]);
        } else {
          pairs[0][i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x));
        }
      }
      for (int part = 0; part < parts_of(kDtype); ++part) {
        transpose(pairs[part]);
        for (int j = 0; j < 16; ++j) _mm512_storeu_ps(tiles + part * 2 * kTile + j * 32, pairs[part][j]);
      }
    }
  }
}

// values @ table: sums over tokens. Values need no transposition. A tile of the table pairs two tokens per row, which
// `fill` makes by interleaving two of its rows.
template <Dtype kDtype>
class Summer {
 public:
  // Of blocks [begin, end) of the table's columns.
  Summer(const WeightedSum& args, int64_t begin, int64_t end)
      : args_(args),
        begin_(begin),
        end_(end),
        groups_(tile_blocks(args.rows)),
        memory_(new char[size_t(64 + kPanelTiles * kTile * 2 +
                                groups_ * (kSteps * kParts * 2 * kTile * 2 + (end - begin) * kSums * 4 + 4))]) {
    panel_ = reinterpret_cast<uint16_t*>(memory_ + -reinterpret_cast<uintptr_t>(memory_) % 64);
    values_ = panel_ + kPanelTiles * kTile;
    sums_ = reinterpret_cast<float*>(values_ + groups_ * kSteps * kParts * 2 * kTile);
    parts_ = reinterpret_cast<int32_t*>(sums_ + groups_ * (end - begin) * kSums);
  }
  ~Summer() { delete[] memory_; }
  Summer(const Summer&) = delete;

  bool run() {
    for (int64_t token = 0; token < args_.tokens; token += kSteps * kTileStep) {
      const int64_t tokens = std::min(kSteps * kTileStep, args_.tokens - token);
      pack(token, tokens);
      for (int64_t first = begin_; first < end_; first += kPanelBlocks) {
        const int64_t last = std::min(end_, first + kPanelBlocks);
        fill(token, tokens, first, last);
        for (int64_t group = 0; group < groups_; ++group) {
          for (int64_t block = first; block < last; ++block) {
            const uint16_t* tiles = panel_ + (block - first) * kSteps * kTableParts * 2 * kTile;
            float* sums = sums_ + ((block - begin_) * groups_ + group) * kSums;
            if (args_.rows - group * kTileBlock > 16) {
              multiply_block<true>(sums, tiles, token == 0, tile_steps(tokens), group);
            } else {
              multiply_block<false>(sums, tiles, token == 0, tile_steps(tokens), group);
            }
          }
        }
      }
    }
    bool finite = true;
    for (int64_t block = begin_; block < end_; ++block) finite &= put(block);
    return finite;
  }

 private:
  static constexpr bool kSplit = kDtype == Dtype::kFloat;
  static constexpr int kParts = kSplit ? kTileParts : 2;  // bfloat16 numbers for one of the values'
  static constexpr int kTableParts = parts_of(kDtype);
  static constexpr int64_t kSteps = 8;  // of tokens at a time
  static constexpr int64_t kSums = kTileBlock * kTileBlock;
  static constexpr int64_t kPanelBlocks = kSplit ? 8 : 16;  // of columns; a KiB of a row
  static constexpr int64_t kPanelTiles = kPanelBlocks * kSteps * kTableParts * 2;
  using Number = std::conditional_t<kSplit, float, uint16_t>;
  using Tiles = SumTiles;

  const Number* table(int64_t token) const { return static_cast<const Number*>(args_.table) + token * args_.stride; }

  // Values of some tokens, by rows of tiles, steps and parts. In float32 tokens i and i + 16 are a pair, else
  // neighbours.
  void pack(int64_t token, int64_t tokens) {
    const int64_t steps = tile_steps(tokens);
    const bool narrow = args_.values_dtype != Dtype::kFloat;
    __m512i rests = _mm512_setzero_si512();
    for (int64_t row = 0; row < groups_ * kTileBlock; ++row) {
      const int64_t place = std::min(row, args_.rows - 1) * args_.values_stride + token;
      uint16_t* tiles = values_ + row / kTileBlock * kSteps * kParts * 2 * kTile + row % kTileBlock * 32;
      for (int64_t step = 0; step < steps; ++step, tiles += kParts * 2 * kTile) {
        const uint32_t mask = row < args_.rows ? mask_of(tokens - step * kTileStep) : 0;
        const float* x = static_cast<const float*>(args_.values) + place + step * kTileStep;
        if constexpr (kSplit) {
          __m512i pairs[kTileParts];
          load_pairs(x, mask, pairs);
          for (int part = 0; part < kParts; ++part) _mm512_store_si512(tiles + part * 2 * kTile, pairs[part]);
        } else if (narrow) {
          const uint16_t* numbers = static_cast<const uint16_t*>(args_.values) + place + step * kTileStep;
          _mm512_store_si512(tiles, _mm512_maskz_loadu_epi16(mask, numbers));
        } else {
          const __m512 low = _mm512_maskz_loadu_ps(__mmask16(mask), x);
          const __m512 high = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), x + 16);
          const TwoParts split = split_in_two(low, high);
          _mm512_store_si512(tiles, split.nearest);
          _mm512_store_si512(tiles + 2 * kTile, split.rest);
          rests = _mm512_or_si512(rests, split.rest);
        }
      }
      if constexpr (!kSplit) {
        if (row % kTileBlock + 1 < kTileBlock) continue;
        parts_[row / kTileBlock] = _mm512_test_epi32_mask(rests, rests) ? kParts : 1;
        rests = _mm512_setzero_si512();
      }
    }
  }

  // Some tokens' columns as tiles, row by row, as they lie in memory. In bfloat16 two tokens' numbers are brought side
  // by side by unpacklo and unpackhi, which work within the quarters of a vector: of every eight columns the first tile
  // gets the first four (0 to 3, 8 to 11, ...), the second the last four. `put` undoes it.
  void fill(int64_t token, int64_t tokens, int64_t first, int64_t last) {
    for (int64_t step = 0; step < tile_steps(tokens); ++step) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t column = block * kTileBlock;
        const uint32_t mask = mask_of(args_.width - column);
        uint16_t* tiles = panel_ + ((block - first) * kSteps + step) * kTableParts * 2 * kTile;
        for (int64_t i = 0; i < 16; ++i, tiles += 32) {
          const int64_t a = step * kTileStep + (kSplit ? i : 2 * i), b = kSplit ? a + 16 : a + 1;
          const Number* x = table(token + std::min(a, tokens - 1)) + column;
          const Number* y = table(token + std::min(b, tokens - 1)) + column;
          const uint32_t of_x = a < tokens ? mask : 0, of_y = b < tokens ? mask : 0;
          if constexpr (kSplit) {
            for (int half = 0; half < 2; ++half) {
              __m512i pairs[kTileParts];
              split_in_three(_mm512_maskz_loadu_ps(__mmask16(of_x >> 16 * half), x + 16 * half),
                             _mm512_maskz_loadu_ps(__mmask16(of_y >> 16 * half), y + 16 * half), pairs);
              for (int part = 0; part < kTableParts; ++part) {
                _mm512_store_si512(tiles + (part * 2 + half) * kTile, pairs[part]);
              }
            }
          } else {
            const __m512i u = _mm512_maskz_loadu_epi16(of_x, x), v = _mm512_maskz_loadu_epi16(of_y, y);
            _mm512_store_si512(tiles, _mm512_unpacklo_epi16(u, v));
            _mm512_store_si512(tiles + kTile, _mm512_unpackhi_epi16(u, v));
          }
        }
      }
    }
  }

  template <bool kWide>
  [[gnu::always_inline]] void multiply_block(float* sums, const uint16_t* tiles, bool fresh, int64_t steps,
                                             int64_t group) {
    const uint16_t* x = values_ + group * kSteps * kParts * 2 * kTile;
    GK_MEMORY;
    kSplit || fresh ? Tiles::clear<kWide>() : Tiles::resume<kWide>(sums);  // in bfloat16 one long sum is exact enough
    for (int64_t step = 0; step < steps; ++step, x += kParts * 2 * kTile, tiles += kTableParts * 2 * kTile) {
      if constexpr (kSplit) {
#pragma GCC unroll 6
        for (int i = 0; i < kFactorCount; ++i) {
          if (i == 0 || kFactors[i].table != kFactors[i - 1].table)
            Tiles::load_columns(tiles + kFactors[i].table * 2 * kTile);
          if (i == 0 || kFactors[i].x != kFactors[i - 1].x) Tiles::load_values<kWide>(x + kFactors[i].x * 2 * kTile);
          Tiles::multiply_add<kWide>();
        }
      } else {
        Tiles::load_columns(tiles);
        for (int part = parts_[group] - 1; part >= 0; --part) {
          Tiles::load_values<kWide>(x + part * 2 * kTile);
          Tiles::multiply_add<kWide>();
        }
      }
    }
    if (!kSplit || fresh) {
      Tiles::store<kWide>(sums);
      return;
    }
    alignas(64) float latest[kSums];  // short sums of short sums, as in Multiplier
    Tiles::store<kWide>(latest);
    for (int64_t i = 0; i < (kWide ? kSums : kSums / 2); i += 16) {
      _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(latest + i)));
    }
  }

  // A block of columns to where it belongs, in the order that `fill` changed. Returns whether it is finite.
  bool put(int64_t block) const {
    __m512 unlike = _mm512_setzero_ps();  // x - x is 0 or NaN
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const uint32_t mask = mask_of(args_.width - block * kTileBlock);
    const float* sums = sums_ + (block - begin_) * groups_ * kSums;
    for (int64_t row = 0; row < args_.rows; ++row) {
      __m512 low = _mm512_load_ps(sums + row * 32), high = _mm512_load_ps(sums + row * 32 + 16);
      if constexpr (!kSplit) {
        const __m512 of_first = low;
        low = _mm512_permutex2var_ps(of_first, first, high);
        high = _mm512_permutex2var_ps(of_first, second, high);
      }
      float* out = args_.out + row * args_.out_stride + block * kTileBlock;
      _mm512_mask_storeu_ps(out, __mmask16(mask), low);
      _mm512_mask_storeu_ps(out + 16, __mmask16(mask >> 16), high);
      unlike = _mm512_add_ps(unlike, _mm512_add_ps(_mm512_sub_ps(low, low), _mm512_sub_ps(high, high)));
    }
    return _mm512_cmp_ps_mask(unlike, unlike, _CMP_UNORD_Q) == 0;
  }

  const WeightedSum& args_;
  const int64_t begin_, end_, groups_;
  // new[], not std::vector: a member of that compiled here would contain AVX-512 code, and the linker may pick it to
  // serve other files, too.
  char* const memory_;
  uint16_t *panel_, *values_;  // of kSteps steps
  float* sums_;                // by blocks of columns and of rows, for tiles to be side by side
  int32_t* parts_;             // by blocks of rows: 1 if all values of the block are exactly bfloat16, else kParts
};

void pack_tiles(const Packing& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    args.dtype == Dtype::kFloat ? pack<Dtype::kFloat>(args, block) : pack<Dtype::kBFloat16>(args, block);
  }
}

void multiply_tiles(const Product& args, int64_t begin, int64_t end) {
  const int64_t groups = tile_blocks(args.rows), bytes = tile_steps(args.width) * step_tiles(args.dtype) * kTile * 2;
  const int64_t at_a_time = std::max<int64_t>(1, kPackedAtATime / std::max<int64_t>(1, bytes));
  GK_MEMORY;
  _tile_loadconfig(&kShapes);
  for (int64_t first = 0; first < groups; first += at_a_time) {
    const int64_t last = std::min(groups, first + at_a_time);
    if (args.dtype == Dtype::kFloat) {
      Multiplier<Dtype::kFloat>(args).run(begin, end, first, last);
    } else {
      Multiplier<Dtype::kBFloat16>(args).run(begin, end, first, last);
    }
  }
  _tile_release();
}

bool sum_tiles(const WeightedSum& args, int64_t begin, int64_t end) {
  GK_MEMORY;
  _tile_loadconfig(&kShapes);
  const bool finite = args.dtype == Dtype::kFloat ? Summer<Dtype::kFloat>(args, begin, end).run()
                                                  : Summer<Dtype::kBFloat16>(args, begin, end).run();
  _tile_release();
  return finite;
}

int64_t all_packed_numbers(Dtype dtype, int64_t rows, int64_t width) {
  return packed_numbers(dtype, rows, width) + (dtype == Dtype::kFloat ? tile_blocks(rows) * kTileBlock : 0);
}

}  // namespace
}  // namespace gk
#if defined(__clang__)
#pragma clang attribute pop
#endif

const gk::ProductKernels gk::kProductsAmx = {gk::kTileBlock, gk::kTileBlock,     gk::kTileBlock, gk::all_packed_numbers,
                                             gk::pack_tiles, gk::multiply_tiles, gk::sum_tiles};
#endif
