// Statistics and stochastic support of a head's logits, one chunk of the vocabulary at a time.
//
// A chunk is the product weight[chunk] @ hidden.T: tokens along its rows, hidden rows along its lanes. Each lane keeps
// the statistics of its own hidden row, so nothing is reduced across lanes, and a Philox call makes four tokens' words.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace gk {

constexpr int kHeadLanes = 16;

struct HeadChunk {
  const void* logits;  // [tokens, stride], stride a multiple of kHeadLanes that covers the hidden rows
  Dtype dtype;
  int64_t tokens, stride, rows;
  int64_t first_token;  // local id of the chunk's first token; the noise's vocab_start counts from before it
  const float* bias;    // of the chunk's tokens, or null
  float softcap;        // 0: none
  Noise noise;
};

// What one call of a kernel covers: tokens [begin, end) of the chunk, and kHeadLanes hidden rows from group *
// kHeadLanes on.
struct Span {
  int64_t group, begin, end;
};

// A token that may be in the support: it is if p > eps * uniform(word), p = exp((score - max) / tau) / sum.
struct Candidate {
  int32_t token;
  uint32_t word;
  float score;
};

// A candidate as a piece of a chunk found it.
struct Hit {
  int32_t place;  // its token in the chunk times kHeadLanes, plus its lane
  uint32_t word;
  float score;
};

// What a kernel has to say of a span, lane by lane. A sum is relative to the maximum of the same name, which is the
// most negative number or -inf, and the sum 0, where a lane has nothing above -inf.
struct Piece {
  int32_t bad[kHeadLanes];  // 1: a logit is NaN or +inf; 2: one of the reference's is
  int32_t hits;
};
struct SamplePiece : Piece {
  float score_max[kHeadLanes];                         // of l + g
  float logit_max[kHeadLanes], logit_sum[kHeadLanes];  // of exp(l - logit_max)
  int32_t id[kHeadLanes];                              // of the token with score_max, in the chunk
};
struct ScoresPiece : SamplePiece {
  float score_sum[kHeadLanes];  // of exp((l + g - score_max) / tau)
};
struct SoftmaxPiece : Piece {
  float max[kHeadLanes], sum[kHeadLanes];          // of exp((l - max) / tau)
  float ref_max[kHeadLanes], ref_sum[kHeadLanes];  // of the reference's logits r: exp((r - ref_max) / tau)
  float
      moment[kHeadLanes];  // sum of exp((l - max) / tau) * x, x = (l - max) / tau or, with a reference, that minus r's
};

struct HeadArgs {
  HeadChunk in;
  Given given;                // read by scores only
  const float* given_scores;  // [rows], T
  const void* ref;            // softmax: logits of a reference, laid out alike, or null
  const float* ref_bias;
  const float* tau;  // [rows]
  const float *max,
      *sum;   // [rows], normaliser of all chunks before this one: of the scores, or in softmax of the logits
  float eps;  // 0: no candidates
};

struct HeadKernels {
  // argmax of the scores and the logits' log-sum-exp. Finds no candidates.
  void (*sample)(const HeadArgs& args, const Span& span, SamplePiece& out);
  // The same, and normaliser and candidates of softmax(score / tau). With posterior noise scores count from T: the
  // maximum is 0, and no token is searched for.
  void (*scores)(const HeadArgs& args, const Span& span, ScoresPiece& out, Hit* hits);
  // Normaliser, moment and candidates of softmax(l / tau).
  void (*softmax)(const HeadArgs& args, const Span& span, SoftmaxPiece& out, Hit* hits);
};

extern const HeadKernels kHeadGeneric;
#if defined(__x86_64__)
extern const HeadKernels kHeadAvx2, kHeadAvx512;
#endif

}  // namespace gk
