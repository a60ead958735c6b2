// Products on AMX's matrix unit, which multiplies tiles of bfloat16 and adds in float32.
//
// A float32 number is the exact sum of three bfloat16 ones, so a product of two is the sum of nine such products, of
// which the three least are below float32's rounding and left out. Sums come out closer than those of as many float32
// products, in about half the time.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace gk {

constexpr int64_t kTileBlock = 32;  // rows of the table, and of x, that one round of products covers
constexpr int64_t kTileStep = 32;   // columns that one tile covers
constexpr int kTileParts = 3;       // bfloat16 numbers that one of float32 is the sum of

static constexpr int64_t tile_blocks(int64_t rows) { return (rows + kTileBlock - 1) / kTileBlock; }
static constexpr int64_t tile_steps(int64_t width) { return (width + kTileStep - 1) / kTileStep; }

struct TilePacking {
  const void* x;  // [rows, width]
  Dtype dtype;    // kFloat or kBFloat16
  int64_t rows, width, stride;
  // Three numbers (kFloat) or one for each of x, zeros up to whole blocks and steps; then, if kFloat, one for each row.
  uint16_t* packed;
};

struct TileProduct {
  const uint16_t* packed;  // x
  int64_t rows;
  const void* table;  // [tokens, width], of x's dtype
  Dtype dtype;
  int64_t tokens, width, stride;
  // table @ x.T, [tokens, out_stride], of which columns up to the next multiple of 16 are written; or, if by_row,
  // x @ table.T, [rows, out_stride]. Rounded to kBFloat16 only if that is its dtype.
  void* out;
  Dtype out_dtype;
  int64_t out_stride;
  bool by_row;
};

struct TileSum {
  const void* values;  // [rows, tokens]
  Dtype values_dtype;  // kFloat or the table's
  int64_t rows, values_stride;
  const void* table;  // [tokens, width]
  Dtype dtype;        // the table's: kFloat or kBFloat16
  int64_t tokens, width, stride;
  // values @ table, [rows, out_stride]. Values are not rounded to kBFloat16 but split into two such numbers.
  float* out;
  int64_t out_stride;
};

// Where machine_isa() is kAmx. Blocks [begin, end) of kTileBlock rows: of x, and of the table.
void pack_tiles(const TilePacking& args, int64_t begin, int64_t end);
void multiply_tiles(const TileProduct& args, int64_t begin, int64_t end);
// Blocks [begin, end) of kTileBlock columns of the table. Returns whether all sums are finite.
bool sum_tiles(const TileSum& args, int64_t begin, int64_t end);

}  // namespace gk
