// Statistics and stochastic support of a head's logits, one chunk of the vocabulary at a time.
//
// A chunk is the product weight[chunk] @ hidden.T: tokens along its rows, hidden rows along its lanes. Each lane keeps the
// statistics of its own hidden row, so nothing is reduced across lanes, and a Philox call makes four tokens' words.
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

// A token that may be in the support: kept if word's uniform < p / eps, with p = exp((score - max) / tau) / total.
struct Candidate {
  int32_t token;
  uint32_t word;
  float score;
};

// One that a piece of a chunk found: place is its token in the chunk times kHeadLanes, and its lane.
struct Found {
  int32_t place;
  uint32_t word;
  float score;
};

// Statistics of one piece of a chunk (some tokens, kHeadLanes hidden rows). Sums are relative to their own maxima.
struct HeadPiece {
  float score_max[kHeadLanes], score_sum[kHeadLanes];  // sum of exp((score - score_max) / tau)
  float logit_max[kHeadLanes], logit_sum[kHeadLanes];  // of a reference's logits in head_softmax
  float moment[kHeadLanes];                            // sum of weight * (l - score_max) / tau, or * (l - r) / tau
  int32_t id[kHeadLanes];
  int32_t bad[kHeadLanes];  // 1: a logit is NaN or +inf; 2: one of the reference is
  int32_t found;            // candidates
};

struct HeadArgs {
  HeadChunk in;
  const void* ref;        // head_softmax: logits of a reference, laid out alike, or null
  const float* ref_bias;
  const float* tau;       // [rows]
  const float *max, *sum; // [rows] of all chunks before this one
  float eps;              // 0: no candidates
};

struct HeadKernels {
  // argmax of the scores and the logits' log-sum-exp.
  void (*sample)(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out, Found* found);
  // The same, and the normaliser and candidates of softmax(score / tau).
  void (*scores)(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out, Found* found);
  // Normaliser, moment and candidates of softmax(l / tau).
  void (*softmax)(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out, Found* found);
};

extern const HeadKernels kHeadGeneric;
#if defined(__x86_64__)
extern const HeadKernels kHeadAvx2, kHeadAvx512;
#endif

}  // namespace gk
