// The Gumbel-max token of each row, and the statistics of its distribution, in one pass over the logits.
//
// Scan: a block per piece keeps, thread by thread, the best score and the tile in which it rose; an index per logit
// would cost two instructions more. Pick: a block per row merges the pieces and looks at the winning tile again.
#include "common/online_softmax.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace gk::cuda {
namespace {

template <bool kLogSumExp>
struct SampleScan {
  SampleArgs args;

  struct State {
    float best;
    int tile;
    LogSum<float> logits;
  };

  template <typename Block>
  GK_KERNEL void operator()(Block& block, int64_t index) const {
    const Rows& in = args.in;
    const Piece piece(in, index / in.pieces, index % in.pieces);
    const RowNoise noise(in, piece.row);
    const void* row = row_at(in.logits, piece.row, in.stride, in.dtype);
    const auto state = block.each([&](int thread) {
      // The maximum starts at a finite number: a lane that has seen only -inf must not compute inf - inf.
      State state{-kInfinity, 0, {kLowest, 0.0f}};
      GK_NO_UNROLL
      for (int tile = 0; tile < piece.tiles(); ++tile) {
        Lanes x;
        load_lanes<Block>(piece, tile, thread, row, in.dtype, -kInfinity, x);
        if constexpr (kLogSumExp) fold(state.logits, x);
        add_noise(piece, tile, thread, noise, x);
        float peak = x[0];
        GK_UNROLL
        for (int i = 1; i < kLanes; ++i) peak = max_or_nan(peak, x[i]);  // NaN wins: it is how a bad row is known
        if (peak > state.best) state.tile = tile;
        state.best = max_or_nan(state.best, peak);
      }
      return state;
    });
    const float best = reduced(block, block.each([](int, const State& s) { return s.best; }, state), LargestOrNaN{});
    const int tile = reduced(
        block, block.each([&](int, const State& s) { return s.best == best ? s.tile : INT32_MAX; }, state), Least{});
    float top = 0.0f, total = 0.0f;
    if constexpr (kLogSumExp) {
      top = reduced(block, block.each([](int, const State& s) { return s.logits.max; }, state), Largest{});
      total = reduced(block, block.each([&](int, const State& s) { return rescaled(s.logits, top); }, state), Plus{});
    }
    block.once([&] {
      args.best[index] = best;
      args.tile[index] = tile;
      if constexpr (kLogSumExp) {
        args.top[index] = top;
        args.total[index] = total;
      }
    });
  }

  static GK_KERNEL void fold(LogSum<float>& logits, const Lanes& l) {
    float top = logits.max;
    GK_UNROLL
    for (int i = 0; i < kLanes; ++i) top = Largest{}(l[i], top);
    float sum = rescaled(logits, top);
    GK_UNROLL
    for (int i = 0; i < kLanes; ++i) sum += natural_exp(l[i] - top);
    logits = {top, sum};
  }
};

struct SamplePick {
  SampleArgs args;

  template <typename Block>
  GK_KERNEL void operator()(Block& block, int64_t row) const {
    const Rows& in = args.in;
    const int64_t first = row * in.pieces;
    const float best =
        merged_over(block, in.pieces, -kInfinity, LargestOrNaN{}, [&](int64_t i) { return args.best[first + i]; });
    const bool bad = !(best > -kInfinity && best < kInfinity);
    // The first tile that holds the best score. A bad row still looks somewhere.
    constexpr int kTiles = kPiece / kTile;
    int64_t where = merged_over(block, in.pieces, INT64_MAX, Least{}, [&](int64_t i) {
      return args.best[first + i] == best ? i * kTiles + args.tile[first + i] : INT64_MAX;
    });
    if (bad) where = 0;
    const Piece piece(in, row, where / kTiles);
    const int tile = int(where % kTiles);
    const RowNoise noise(in, row);
    struct Found {
      float score;
      int offset;
    };
    const auto found = block.each([&](int thread) {
      Lanes x;
      load_lanes<Block>(piece, tile, thread, row_at(in.logits, row, in.stride, in.dtype), in.dtype, -kInfinity, x);
      add_noise(piece, tile, thread, noise, x);
      Found found{-kInfinity, INT32_MAX};
      GK_UNROLL
      for (int i = 0; i < kLanes; ++i) {  // a thread's offsets rise with i
        if (x[i] > found.score) found = {x[i], piece.offset(tile, thread, i / 4) + i % 4};
      }
      return found;
    });
    const float peak = reduced(block, block.each([](int, const Found& f) { return f.score; }, found), Largest{});
    const int offset = reduced(
        block, block.each([&](int, const Found& f) { return f.score == peak ? f.offset : INT32_MAX; }, found), Least{});
    const float top =
        args.top ? merged_over(block, in.pieces, -kInfinity, Largest{}, [&](int64_t i) { return args.top[first + i]; })
                 : 0.0f;
    const auto share = [&](int64_t i) {
      return rescaled(LogSum<float>{args.top[first + i], args.total[first + i]}, top);
    };
    const float total = args.top ? merged_over(block, in.pieces, 0.0f, Plus{}, share) : 0.0f;
    block.once([&] {
      const float nan = kInfinity - kInfinity;
      args.ids[row] = bad ? 0 : piece.column + offset;
      args.score_max[row] = bad ? nan : best + kNoiseShift;
      if (args.top) {
        args.logit_max[row] = bad ? nan : top;
        args.logit_sum[row] = bad ? nan : total;
      }
    });
  }
};

}  // namespace

void sample(const SampleArgs& args, void* stream) {
  const int64_t pieces = args.in.rows * args.in.pieces;
  if (args.top) launch(SampleScan<true>{args}, pieces, stream);
  else launch(SampleScan<false>{args}, pieces, stream);
  launch(SamplePick{args}, args.in.rows, stream);
}

}  // namespace gk::cuda
