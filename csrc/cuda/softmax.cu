// The relaxation: weights exp((l + g - score_max) / tau) and their sum.
//
// Weights that are divided by their sum take two passes: the first adds up each piece, the second computes the weights
// again. Writing them in the first and dividing them in the second would round them twice.
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace gk::cuda {
namespace {

enum class Pass { kSum, kWrite, kSumAndWrite };

template <Pass kPass>
struct Softmax {
  SoftmaxArgs args;

  template <typename Block>
  GK_KERNEL void operator()(Block& block, int64_t index) const {
    const Rows& in = args.in;
    const Piece piece(in, index / in.pieces, index % in.pieces);
    const RowNoise noise(in, piece.row);
    const void* row = row_at(in.logits, piece.row, in.stride, in.dtype);
    void* out = row_at(args.out, piece.row, args.out_stride, args.out_dtype);
    const float pivot = args.score_max[piece.row] - kNoiseShift, rate = kLog2E / args.tau[piece.row];
    float factor = 1.0f;
    if constexpr (kPass == Pass::kWrite) {
      const float total = row_sum(block, args.partial, piece.row, in.pieces);
      factor = 1.0f / total;
      if (index % in.pieces == 0) block.once([&] { args.total[piece.row] = total; });
    }
    const auto sums = block.each([&](int thread) {
      float sum = 0.0f;
      GK_NO_UNROLL
      for (int tile = 0; tile < piece.tiles(); ++tile) {
        Lanes x;
        load_lanes<Block>(piece, tile, thread, row, in.dtype, -kInfinity, x);
        add_noise(piece, tile, thread, noise, x);
        GK_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          x[i] = fast_exp2((x[i] - pivot) * rate);  // the difference first: scaled scores could overflow
          if constexpr (kPass != Pass::kWrite) sum += x[i];
          if constexpr (kPass == Pass::kWrite) x[i] *= factor;
        }
        if constexpr (kPass != Pass::kSum) store_lanes<Block>(piece, tile, thread, out, args.out_dtype, x);
      }
      return sum;
    });
    if constexpr (kPass != Pass::kWrite) {
      const float sum = reduced(block, sums, Plus{});
      block.once([&] { args.partial[index] = sum; });
    }
  }
};

}  // namespace

void softmax(const SoftmaxArgs& args, void* stream) {
  const int64_t pieces = args.in.rows * args.in.pieces;
  if (args.normalize) {
    launch(Softmax<Pass::kSum>{args}, pieces, stream);
    launch(Softmax<Pass::kWrite>{args}, pieces, stream);
  } else {
    launch(Softmax<Pass::kSumAndWrite>{args}, pieces, stream);
    launch(SumPieces{args.partial, args.in.pieces, args.total}, args.in.rows, stream);
  }
}

}  // namespace gk::cuda
