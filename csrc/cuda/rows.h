// Operations on rows of given logits: arguments, and the functions that launch them. Pointers are the device's.
//
// Rows [rows, vocab] are cut into pieces of kPiece columns, one block each, so that few rows fill a device too. Rows of
// any layout have a team of threads each. Pieces and teams depend on the vocabulary and the strides alone: results
// depend on neither the batch nor the device, and there are no atomics.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/estimators.h"

namespace gk::cuda {

constexpr int64_t kPiece = 8192;

// A piece begins at a group of four global token ids, which share a Philox call. A shard of a vocabulary that starts
// inside such a group is shifted right: its first piece begins with up to three columns that do not exist.
inline int64_t pieces_of(int64_t vocab, int64_t vocab_start) {
  return (vocab + (vocab_start & 3) + kPiece - 1) / kPiece;
}

// Logits [rows, vocab] with unit stride along the vocabulary, and the noise of their scores.
struct Rows {
  const void* logits;
  Dtype dtype;  // not kDouble
  int64_t rows, vocab, stride, pieces;
  const int64_t* seed;  // null: it is seed_value
  int64_t seed_value;
  const int64_t* row_ids;  // null: the row index
  int64_t vocab_start;
};

// Partial results [rows, pieces] and the results [rows].
struct SampleArgs {
  Rows in;
  float *best, *top, *total;  // best score, largest logit, sum of exp(logit - top); the last two may be null
  int32_t* tile;              // of the best score
  int64_t* ids;
  float *score_max, *logit_max, *logit_sum;
};
void sample(const SampleArgs& args, void* stream);

struct OneHotArgs {
  const int64_t* ids;
  const float* score_max;
  void* out;  // [rows, vocab], contiguous
  Dtype dtype;
  int64_t rows, vocab;
};
void one_hot(const OneHotArgs& args, void* stream);

struct SoftmaxArgs {
  Rows in;
  const float *tau, *score_max;
  bool normalize;
  float* partial;  // [rows, pieces]
  void* out;
  Dtype out_dtype;
  int64_t out_stride;
  float* total;
};
void softmax(const SoftmaxArgs& args, void* stream);

struct BackwardArgs {
  Rows in;
  Estimator estimator;
  const float *tau, *score_max, *logit_max, *logit_sum;
  const int64_t* ids;
  const float* dlogprobs;  // null: none
  const void* dy;          // of the logits' dtype, as is out
  int64_t dy_stride;
  void* out;  // may be dy
  int64_t out_stride;
  float* partial;       // [3, rows, pieces]: sums of w, w dy and exp(l - max) dy
  float* chosen;        // [rows]: dy of the sampled token, for reinmax
  float* partial_dtau;  // [rows, pieces], null: not wanted
  float* dtau;
};
void softmax_backward(const BackwardArgs& args, void* stream);

// Rows of any layout: row a * beside + b is [a, :, b] of a tensor, whose strides are in elements.
struct Place {
  int64_t a, v, b;
};

struct PlacedRows {
  const void* logits;
  Place place;
  Dtype dtype;  // not kDouble
  int64_t planes, vocab, beside, rows;
  const int64_t* seed;  // null: it is seed_value
  int64_t seed_value;
  const int64_t* row_ids;  // null: the row index
  int64_t vocab_start;
};

struct RelaxArgs {
  PlacedRows in;
  const float* tau;
  bool hard;
  void* out;  // of the logits' dtype
  Place out_place;
  float* score_max;
};
void relax(const RelaxArgs& args, void* stream);

struct RelaxBackwardArgs {
  PlacedRows in;
  const float *tau, *score_max;
  const void* dy;  // of the logits' dtype, as is out
  Place dy_place;
  void* out;  // may be dy
  Place out_place;
  float* dtau;  // null: not wanted
};
void relax_backward(const RelaxBackwardArgs& args, void* stream);

}  // namespace gk::cuda
