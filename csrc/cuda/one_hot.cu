// The hard sample, written once (zeros and a scatter would write it twice).
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace gk::cuda {
namespace {

// No noise here, so pieces begin where 16 bytes of memory do, wherever that is in a row.
constexpr int kMostShift = 7;

struct OneHot {
  OneHotArgs args;
  int64_t pieces;

  template <typename Block>
  GK_KERNEL void operator()(Block& block, int64_t index) const {
    const int64_t i_row = index / pieces, size = element_size(args.dtype);
    void* row = row_at(args.out, i_row, args.vocab, args.dtype);
    const int shift = int(reinterpret_cast<uintptr_t>(row) % sizeof(Quad) / uintptr_t(size));
    const Piece piece(i_row, index % pieces, args.vocab, shift, args.dtype == Dtype::kFloat ? 1 : 2);
    const int64_t hit = args.ids[i_row] - piece.column;
    // A row without a distribution has no sample either.
    const float zero = args.score_max[i_row] - args.score_max[i_row], one = 1.0f + zero;
    block.each([&](int thread) {
      GK_NO_UNROLL
      for (int tile = 0; tile < piece.tiles(); ++tile) {
        Lanes x;
        GK_UNROLL
        for (int i = 0; i < kLanes; ++i) x[i] = piece.offset(tile, thread, i / 4) + i % 4 == hit ? one : zero;
        store_lanes<Block>(piece, tile, thread, row, args.dtype, x);
      }
    });
  }
};

}  // namespace

void one_hot(const OneHotArgs& args, void* stream) {
  const int64_t pieces = (args.vocab + kMostShift + kPiece - 1) / kPiece;
  launch(OneHot{args, pieces}, args.rows * pieces, stream);
}

}  // namespace gk::cuda
