// How a row is cut up, and what a thread does with its share of a tile: load, add noise, store.
//
// A piece of a row (one block's work) is walked in tiles of kTile columns. A thread has kLanes tokens of a tile, in
// groups of four that share a Philox call. Which groups depends on the logits' dtype: one or two neighbouring ones fill
// the 16 bytes that a thread loads at once, so that a warp's loads are always contiguous.
#pragma once

#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/gumbel.h"
#include "cuda/block.h"
#include "cuda/rows.h"

namespace gk::cuda {

constexpr int kLanes = 16, kTile = kThreads * kLanes;
static_assert(kPiece % kTile == 0);
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLowest = -3.402823466e38f;  // the most negative finite number

using Lanes = float[kLanes];

struct Piece {
  int64_t row, column;  // column of offset 0; negative where a row's first piece is shifted
  int begin, end;       // the offsets in [0, kPiece) that exist; none if end <= begin
  uint32_t group;       // Philox counter of the first four tokens
  int width;            // groups that a thread loads at once

  // Piece `index` of a row whose columns are shifted right.
  GK_KERNEL Piece(int64_t row_, int64_t index, int64_t vocab, int shift, int width_)
      : row(row_), column(index * kPiece - shift), begin(index == 0 ? shift : 0), group(0), width(width_) {
    const int64_t rest = vocab - column;
    end = rest < kPiece ? int(rest) : int(kPiece);
  }

  // Piece `index` of a row of logits.
  GK_KERNEL Piece(const Rows& in, int64_t row_, int64_t index)
      : Piece(row_, index, in.vocab, int(in.vocab_start & 3), in.dtype == Dtype::kFloat ? 1 : 2) {
    group = uint32_t(uint64_t(in.vocab_start) >> 2) + uint32_t(index * (kPiece / 4));
  }

  GK_KERNEL int tiles() const { return (end + kTile - 1) / kTile; }
  GK_KERNEL bool whole(int tile) const { return begin <= tile * kTile && (tile + 1) * kTile <= end; }
  // Offset of a thread's first token of its k-th group in a tile, k in [0, 4).
  GK_KERNEL int offset(int tile, int thread, int k) const {
    const int groups = thread * width + (k & 1) * (width == 1 ? kThreads : 1) + (k >> 1) * 2 * kThreads;
    return tile * kTile + 4 * groups;
  }
};

template <typename T>
struct Bits {
  using type = uint16_t;
};
template <>
struct Bits<float> {
  using type = uint32_t;
};

template <typename T>
GK_KERNEL float widened(typename Bits<T>::type bits) {
  if constexpr (sizeof(T) == 2) return static_cast<float>(T(bits, T::from_bits()));
  float x;
  memcpy(&x, &bits, sizeof(bits));
  return x;
}

template <typename T>
GK_KERNEL typename Bits<T>::type narrowed(float x) {
  if constexpr (sizeof(T) == 2) return T(x).x;
  typename Bits<T>::type bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

GK_KERNEL bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Quad) == 0; }

template <typename Block, typename T>
GK_KERNEL void load_as(const Piece& piece, int tile, int thread, const void* row, float fill, Lanes& x) {
  using Word = typename Bits<T>::type;
  constexpr int kQuad = sizeof(Quad) / sizeof(T), kWords = kQuad / 4;
  const char* base = static_cast<const char*>(row) + piece.column * int64_t(sizeof(T));
  const auto at = [&](int i) { return base + (piece.offset(tile, thread, i / 4) + i % 4) * int(sizeof(T)); };
  if (!piece.whole(tile)) {
    GK_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const int offset = piece.offset(tile, thread, i / 4) + i % 4;
      x[i] = fill;
      if (piece.begin <= offset && offset < piece.end) x[i] = widened<T>(Block::template load<Word>(at(i)));
    }
  } else if (!is_aligned(base)) {
    GK_UNROLL
    for (int i = 0; i < kLanes; ++i) x[i] = widened<T>(Block::template load<Word>(at(i)));
  } else {
    Quad quads[kLanes / kQuad];
    GK_UNROLL
    for (int i = 0; i < kLanes / kQuad; ++i) quads[i] = Block::template load<Quad>(at(i * kQuad));
    GK_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t word = quads[i / kQuad].word[i % kQuad / kWords];
      x[i] = widened<T>(Word(word >> (i % kWords * 16)));
    }
  }
}

// A thread's tokens of a tile; `fill` where there is none. `row` is the row's column 0.
template <typename Block>
GK_KERNEL void load_lanes(const Piece& piece, int tile, int thread, const void* row, Dtype dtype, float fill,
                          Lanes& x) {
  if (dtype == Dtype::kFloat) load_as<Block, float>(piece, tile, thread, row, fill, x);
  else if (dtype == Dtype::kBFloat16) load_as<Block, c10::BFloat16>(piece, tile, thread, row, fill, x);
  else load_as<Block, c10::Half>(piece, tile, thread, row, fill, x);
}

template <typename Block, typename T>
GK_KERNEL void store_as(const Piece& piece, int tile, int thread, void* row, const Lanes& x) {
  constexpr int kQuad = sizeof(Quad) / sizeof(T), kWords = kQuad / 4;
  char* base = static_cast<char*>(row) + piece.column * int64_t(sizeof(T));
  const auto at = [&](int i) { return base + (piece.offset(tile, thread, i / 4) + i % 4) * int(sizeof(T)); };
  if (piece.whole(tile) && is_aligned(base)) {
    GK_UNROLL
    for (int i = 0; i < kLanes; i += kQuad) {
      Quad quad;
      GK_UNROLL
      for (int j = 0; j < 4; ++j) {
        quad.word[j] = narrowed<T>(x[i + j * kWords]);
        if constexpr (kWords == 2) quad.word[j] |= uint32_t(narrowed<T>(x[i + j * kWords + 1])) << 16;
      }
      Block::store(at(i), quad);
    }
  } else {
    GK_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const int offset = piece.offset(tile, thread, i / 4) + i % 4;
      if (piece.begin <= offset && offset < piece.end) Block::store(at(i), narrowed<T>(x[i]));
    }
  }
}

// Writes those of a thread's tokens that exist. A 16-bit dtype asks for a piece of width 2.
template <typename Block>
GK_KERNEL void store_lanes(const Piece& piece, int tile, int thread, void* row, Dtype dtype, const Lanes& x) {
  if (dtype == Dtype::kFloat) store_as<Block, float>(piece, tile, thread, row, x);
  else if (dtype == Dtype::kBFloat16) store_as<Block, c10::BFloat16>(piece, tile, thread, row, x);
  else store_as<Block, c10::Half>(piece, tile, thread, row, x);
}

GK_KERNEL int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

GK_KERNEL const void* row_at(const void* x, int64_t row, int64_t stride, Dtype dtype) {
  return static_cast<const char*>(x) + row * stride * element_size(dtype);
}
GK_KERNEL void* row_at(void* x, int64_t row, int64_t stride, Dtype dtype) {
  return static_cast<char*>(x) + row * stride * element_size(dtype);
}

// One number of a row.
template <typename Block>
GK_KERNEL float element(const void* row, int64_t column, Dtype dtype) {
  const char* p = static_cast<const char*>(row) + column * element_size(dtype);
  if (dtype == Dtype::kFloat) return Block::template load<float>(p);
  const uint16_t bits = Block::template load<uint16_t>(p);
  return dtype == Dtype::kBFloat16 ? widened<c10::BFloat16>(bits) : widened<c10::Half>(bits);
}

// What a row's Philox calls have in common.
struct RowNoise {
  uint32_t key0, key1, row0, row1;

  // Of one row of Rows or PlacedRows.
  template <typename AnyRows>
  GK_KERNEL RowNoise(const AnyRows& in, int64_t row) {
    const uint64_t seed = uint64_t(in.seed ? *in.seed : in.seed_value);
    const uint64_t id = uint64_t(in.row_ids ? in.row_ids[row] : row);
    key0 = uint32_t(seed);
    key1 = uint32_t(seed >> 32);
    row0 = uint32_t(id);
    row1 = uint32_t(id >> 32);
  }
  GK_KERNEL Words4 words(uint32_t group, uint32_t domain) const {
    return philox(group, row0, row1, domain, key0, key1);
  }
};

// Turns a thread's logits into scores l + g, but for the shift that all noise shares (kNoiseShift).
GK_KERNEL void add_noise(const Piece& piece, int tile, int thread, const RowNoise& noise, Lanes& x) {
  Lanes y;
  uint32_t least = 0xFFFFFFFFu;
  const auto group = [&](int k) { return piece.group + uint32_t(piece.offset(tile, thread, k)) / 4; };
  GK_UNROLL
  for (int k = 0; k < kLanes / 4; ++k) {
    const Words4 words = noise.words(group(k), kDomainGumbel);
    GK_UNROLL
    for (int j = 0; j < 4; ++j) {
      least = words.w[j] < least ? words.w[j] : least;
      y[4 * k + j] = noise_argument(words.w[j]);
    }
  }
  if (least < kRefineBelow) {  // one thread's tile in a million
    GK_NO_UNROLL
    for (int k = 0; k < kLanes / 4; ++k) {
      const Words4 fine = noise.words(group(k), kDomainRefine);
      GK_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (i / 4 == k && needs_refinement(y[i])) y[i] = refined_argument(y[i], fine.w[i % 4]);
      }
    }
  }
  GK_UNROLL
  for (int i = 0; i < kLanes; ++i) x[i] = std::fma(scaled_noise(y[i]), -kLn2, x[i]);
}

struct Plus {
  template <typename T>
  GK_KERNEL T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  template <typename T>
  GK_KERNEL T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Largest {
  GK_KERNEL float operator()(float a, float b) const { return a > b ? a : b; }
};
struct LargestOrNaN {
  GK_KERNEL float operator()(float a, float b) const { return max_or_nan(a, b); }
};

// value(i) of all i in [0, count), merged; the same on every run.
template <typename Block, typename T, typename Value, typename Merge>
GK_KERNEL T merged_over(Block& block, int64_t count, T start, Merge merge, const Value& value) {
  const auto mine = block.each([&](int thread) {
    T all = start;
    for (int64_t i = thread; i < count; i += kThreads) all = merge(all, T(value(i)));
    return all;
  });
  return reduced(block, mine, merge);
}

// The sum of a row's partial results [rows, pieces].
template <typename Block>
GK_KERNEL float row_sum(Block& block, const float* partial, int64_t row, int64_t pieces) {
  return merged_over(block, pieces, 0.0f, Plus{}, [&](int64_t i) { return partial[row * pieces + i]; });
}

// One block per row: partial [rows, pieces] to total [rows].
struct SumPieces {
  const float* partial;
  int64_t pieces;
  float* total;

  template <typename Block>
  GK_KERNEL void operator()(Block& block, int64_t row) const {
    const float sum = row_sum(block, partial, row, pieces);
    block.once([&] { total[row] = sum; });
  }
};

}  // namespace gk::cuda
