// Operations on rows of given logits: arguments, and one table of kernels per instruction set.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/estimators.h"

namespace gk {

struct Noise {
  uint64_t seed;
  const int64_t* row_ids;  // null: the row index
  int64_t vocab_start;
  int64_t row(int64_t i) const { return row_ids ? row_ids[i] : i; }
};

// The tokens that won, for posterior noise, and the domain of its words.
struct Given {
  const int64_t* ids = nullptr;  // [rows]; null: the noise is prior
  uint32_t domain = 0;
};

// Where the rows of a tensor [A, V, B] lie: row a * B + b is x[a, :, b]. Strides are in elements.
struct View {
  void* data;  // of an input, never written
  Dtype dtype;
  int64_t outer_stride, token_stride, inner, inner_stride;  // inner: B

  template <typename T>
  [[gnu::always_inline]] T* row(int64_t i) const {
    const int64_t a = inner == 1 ? i : i / inner;
    return static_cast<T*>(data) + a * outer_stride + (i - a * inner) * inner_stride;
  }
};

struct Rows {
  View logits;
  int64_t rows, vocab;
  Noise noise;
  Given given = {};  // read where score_max is known, which then is T
};

// One piece of a row's vocabulary, in natural units; pieces merge in order.
template <typename Real>
struct SamplePart {
  Real score_max, logit_max, logit_sum;
  int64_t id;  // -1: nothing above -inf, or NaN or +inf seen
  bool bad;
};

template <typename Real>
struct SoftmaxArgs {
  Rows in;
  const Real *tau, *score_max;
  bool normalize;
  View out;
  Real* total;
};

template <typename Real>
struct BackwardArgs {
  Rows in;
  Estimator estimator;
  const Real *tau, *score_max, *logit_max, *logit_sum;
  const int64_t* ids;
  const Real* dlogprobs;  // null: none
  View dy, out;           // out may be dy
  Real* dtau;             // null: not wanted
};

template <typename Real>
struct RelaxArgs {
  Rows in;
  const Real* tau;
  bool hard, zeroed;  // zeroed: where hard, out is all zeros already
  View out;           // of logits' dtype
  Real* score_max;    // NaN of a row that holds NaN, +inf or only -inf
};

// Each takes one row; scratch has room for a row in Real. Those of float take rows whose tokens lie side by side.
template <typename Real>
struct RowKernels {
  const char* name;
  SamplePart<Real> (*sample)(const Rows& in, int64_t row, int64_t begin, int64_t end, bool logsumexp);
  void (*softmax)(const SoftmaxArgs<Real>& args, int64_t row, Real* scratch);
  void (*softmax_backward)(const BackwardArgs<Real>& args, int64_t row, Real* scratch);
  // softmax((l + g) / tau) and score_max, the noise drawn once. What args say of hard rows is not read.
  void (*relax)(const RelaxArgs<Real>& args, int64_t row, Real* scratch);
};

// Rows [begin, end), of any strides, several in the lanes of a vector. begin is a multiple of lanes; scratch has room
// for lane_scratch(vocab) vectors.
struct LaneKernels {
  int lanes;
  void (*gumbel_softmax)(const RelaxArgs<float>& args, int64_t begin, int64_t end, float* scratch);
  // Of the relaxation with noise, without dlogprobs.
  void (*softmax_backward)(const BackwardArgs<float>& args, int64_t begin, int64_t end, float* scratch);
};

// Vectors of a tile, which lives in the first-level cache.
constexpr int kTile = 64;

// Groups of rows that share a tile where a vocabulary is larger than it, at most. Their rows are neighbours in memory
// where tokens are not, and a page is visited once for all of them.
constexpr int kWideGroups = 4;
inline int wide_groups(int64_t vocab) { return vocab > 1 << 14 ? 1 : kWideGroups; }  // scratch of megabytes is slow

// Vectors that hold all tokens of such groups, and a tile more, since steps may write beyond the last.
inline int64_t lane_room(int64_t vocab) { return wide_groups(vocab) * vocab + kTile; }
inline int64_t lane_scratch(int64_t vocab) { return vocab > kTile ? 2 * lane_room(vocab) : 0; }

extern const RowKernels<double> kRowsDouble;
extern const RowKernels<float> kRowsGeneric;
extern const LaneKernels kLanesGeneric;
#if defined(__x86_64__)
extern const RowKernels<float> kRowsAvx2, kRowsAvx512;
extern const LaneKernels kLanesAvx2, kLanesAvx512;
#endif

}  // namespace gk
