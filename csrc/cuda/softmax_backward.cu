// The gradient of the logits for every estimator, and of tau, given the gradient of the relaxation.
//
// Two passes over the logits and the incoming gradient. The first leaves each piece's share of the sums that the
// softmax's Jacobian needs; the second reads its row's in a fixed order and writes the result, which may take the place
// of the incoming gradient: a thread has read what it overwrites.
#include "common/estimators.h"
#include "common/online_softmax.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace gk::cuda {
namespace {

// What the exponential of a row's relaxation counts from: exp2((x - pivot) * rate), x the score or the logit.
template <bool kNoisy>
GK_KERNEL float pivot_of(const BackwardArgs& args, int64_t row) {
  return kNoisy ? args.score_max[row] - kNoiseShift : args.logit_max[row];
}

template <Estimator kRule>
struct BackwardSums {
  BackwardArgs args;
  static constexpr bool kNoisy = kRule == Estimator::kNoisy, kReinmax = kRule == Estimator::kReinmax;

  struct State {
    float total, dot, untempered;
  };

  template <typename Block>
  GK_KERNEL void operator()(Block& block, int64_t index) const {
    const Rows& in = args.in;
    const Piece piece(in, index / in.pieces, index % in.pieces);
    const RowNoise noise(in, piece.row);
    const void* row = row_at(in.logits, piece.row, in.stride, in.dtype);
    const void* dy_row = row_at(args.dy, piece.row, args.dy_stride, in.dtype);
    const float pivot = pivot_of<kNoisy>(args, piece.row), rate = kLog2E / args.tau[piece.row];
    const auto state = block.each([&](int thread) {
      State state{0.0f, 0.0f, 0.0f};
      GK_NO_UNROLL
      for (int tile = 0; tile < piece.tiles(); ++tile) {
        Lanes x, dy;
        load_lanes<Block>(piece, tile, thread, row, in.dtype, -kInfinity, x);
        load_lanes<Block>(piece, tile, thread, dy_row, in.dtype, 0.0f, dy);
        if constexpr (kReinmax) {
          GK_UNROLL
          for (int i = 0; i < kLanes; ++i) state.untempered += product(natural_exp(x[i] - pivot), dy[i]);
        }
        if constexpr (kNoisy) add_noise(piece, tile, thread, noise, x);
        GK_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          const float weight = fast_exp2((x[i] - pivot) * rate);
          state.total += weight;
          state.dot += product(weight, dy[i]);
        }
      }
      return state;
    });
    const float total = reduced(block, block.each([](int, const State& s) { return s.total; }, state), Plus{});
    const float dot = reduced(block, block.each([](int, const State& s) { return s.dot; }, state), Plus{});
    float untempered = 0.0f;
    if constexpr (kReinmax) {
      untempered = reduced(block, block.each([](int, const State& s) { return s.untempered; }, state), Plus{});
    }
    block.once([&] {
      const int64_t plane = in.rows * in.pieces;
      args.partial[index] = total;
      args.partial[plane + index] = dot;
      if constexpr (kReinmax) {
        args.partial[2 * plane + index] = untempered;
        // Read before the second pass may overwrite it.
        if (index % in.pieces == 0) args.chosen[piece.row] = element<Block>(dy_row, args.ids[piece.row], in.dtype);
      }
    });
  }
};

// kExtras: there is more than the relaxation's gradient to look after, that of log-probabilities or of tau.
template <Estimator kRule, bool kExtras>
struct BackwardApply {
  BackwardArgs args;
  static constexpr bool kNoisy = kRule == Estimator::kNoisy, kReinmax = kRule == Estimator::kReinmax;

  template <typename Block>
  GK_KERNEL void operator()(Block& block, int64_t index) const {
    const Rows& in = args.in;
    const Piece piece(in, index / in.pieces, index % in.pieces);
    const RowNoise noise(in, piece.row);
    const void* row = row_at(in.logits, piece.row, in.stride, in.dtype);
    const void* dy_row = row_at(args.dy, piece.row, args.dy_stride, in.dtype);
    void* out = row_at(args.out, piece.row, args.out_stride, in.dtype);
    const float tau = args.tau[piece.row], rate = kLog2E / tau, pivot = pivot_of<kNoisy>(args, piece.row);

    const int64_t plane = in.rows * in.pieces;
    const float total = row_sum(block, args.partial, piece.row, in.pieces);
    const float dot = row_sum(block, args.partial + plane, piece.row, in.pieces);
    const bool logprobs = kExtras && args.dlogprobs, dtau = kExtras && args.partial_dtau;
    float top = 0.0f, untempered_factor = 0.0f, untempered_mean = 0.0f, chosen = 0.0f, dlogprob = 0.0f;
    int64_t hit = -1;
    if (kReinmax || logprobs) {
      top = args.logit_max[piece.row];
      untempered_factor = 1.0f / args.logit_sum[piece.row];
      hit = args.ids[piece.row] - piece.column;
    }
    if constexpr (kReinmax) {
      untempered_mean = row_sum(block, args.partial + 2 * plane, piece.row, in.pieces) * untempered_factor;
      chosen = args.chosen[piece.row];
    }
    if (logprobs) dlogprob = args.dlogprobs[piece.row];
    const Means<float> means = means_of<kRule>(dot / total, untempered_mean, chosen);
    const float factor = kReinmax ? 1.0f / total : 1.0f / total / tau;

    const auto moments = block.each([&](int thread) {
      float moment = 0.0f;
      GK_NO_UNROLL
      for (int tile = 0; tile < piece.tiles(); ++tile) {
        Lanes x, dy, untempered;
        load_lanes<Block>(piece, tile, thread, row, in.dtype, -kInfinity, x);
        load_lanes<Block>(piece, tile, thread, dy_row, in.dtype, 0.0f, dy);
        if (kReinmax || logprobs) {
          GK_UNROLL
          for (int i = 0; i < kLanes; ++i) untempered[i] = natural_exp(x[i] - top) * untempered_factor;
        }
        // A masked token receives nothing, be it the given one.
        const auto is_hit = [&](int i) {
          return piece.offset(tile, thread, i / 4) + i % 4 == hit && x[i] > -kInfinity;
        };
        if constexpr (kNoisy) add_noise(piece, tile, thread, noise, x);
        GK_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          const float distance = x[i] - pivot, weight = fast_exp2(distance * rate);
          float dl = relaxation_gradient<kRule>(weight * factor, kReinmax ? untempered[i] : 0.0f, dy[i],
                                                kReinmax && is_hit(i), means);
          if constexpr (kExtras && !kReinmax) {
            if (dtau && weight != 0.0f) moment += dl * distance;
          }
          if constexpr (kExtras) {
            if (logprobs) dl += logprob_gradient(untempered[i], is_hit(i), dlogprob);
          }
          dy[i] = dl;
        }
        store_lanes<Block>(piece, tile, thread, out, in.dtype, dy);
      }
      return moment;
    });
    if constexpr (kExtras && !kReinmax) {
      // d/dtau of exp(s / tau) is -s / tau^2, and the pivot drops out, since dl sums to zero.
      const float moment = reduced(block, moments, Plus{});
      if (dtau) block.once([&] { args.partial_dtau[index] = -moment / tau; });
    }
  }
};

template <Estimator kRule>
void run(const BackwardArgs& args, void* stream) {
  const int64_t pieces = args.in.rows * args.in.pieces;
  launch(BackwardSums<kRule>{args}, pieces, stream);
  // The noisy rule is the one that training spends its time in.
  if (kRule == Estimator::kNoisy && !args.dlogprobs && !args.partial_dtau) {
    launch(BackwardApply<Estimator::kNoisy, false>{args}, pieces, stream);
  } else {
    launch(BackwardApply<kRule, true>{args}, pieces, stream);
  }
}

}  // namespace

void softmax_backward(const BackwardArgs& args, void* stream) {
  switch (args.estimator) {
    case Estimator::kNoisy: run<Estimator::kNoisy>(args, stream); break;
    case Estimator::kNoiseless: run<Estimator::kNoiseless>(args, stream); break;
    case Estimator::kReinmax: run<Estimator::kReinmax>(args, stream); break;
  }
  if (args.partial_dtau) launch(SumPieces{args.partial_dtau, args.in.pieces, args.dtau}, args.in.rows, stream);
}

}  // namespace gk::cuda
