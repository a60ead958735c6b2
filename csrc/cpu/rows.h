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

struct Rows {
  const void* logits;
  Dtype dtype;
  int64_t rows, vocab, stride;  // stride between rows, in elements
  Noise noise;
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
  void* out;
  Dtype out_dtype;
  int64_t out_stride;
  Real* total;
};

template <typename Real>
struct BackwardArgs {
  Rows in;
  Estimator estimator;
  const Real *tau, *score_max, *logit_max, *logit_sum;
  const int64_t* ids;
  const Real* dlogprobs;  // null: none
  const void* dy;
  int64_t dy_stride;
  void* out;  // may be dy
  int64_t out_stride;
  Real* dtau;  // null: not wanted
};

// Each takes one row; scratch has room for a row in Real.
template <typename Real>
struct RowKernels {
  const char* name;
  SamplePart<Real> (*sample)(const Rows& in, int64_t row, int64_t begin, int64_t end, bool logsumexp);
  void (*softmax)(const SoftmaxArgs<Real>& args, int64_t row, Real* scratch);
  void (*softmax_backward)(const BackwardArgs<Real>& args, int64_t row, Real* scratch);
};

extern const RowKernels<double> kRowsDouble;
extern const RowKernels<float> kRowsGeneric;
#if defined(__x86_64__)
extern const RowKernels<float> kRowsAvx2, kRowsAvx512;
#endif

}  // namespace gk
