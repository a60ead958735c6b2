// Registers the kernels of screen.h with torch (stable ABI).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/gumbel.h"
#include "cpu/gather.h"
#include "cpu/isa.h"
#include "cpu/screen.h"
#include "cpu/tensors.h"
#include "cpu/threads.h"

namespace gk {
namespace {

constexpr int64_t kPieces = 16;

void screen_encode(Tensor weight, Tensor columns, Tensor codes, Tensor scale, Tensor slack) {
  const ScreenCodes args{.weight = weight.const_data_ptr(),
                         .dtype = dtype_of(weight),
                         .width = weight.size(1),
                         .stride = weight.stride(0),
                         .columns = data<float>(columns),
                         .padded = columns.numel(),
                         .codes = static_cast<int8_t*>(codes.mutable_data_ptr()),
                         .scale = mutable_data<float>(scale),
                         .slack = mutable_data<float>(slack)};
  parallel_rows(weight.size(0), [&](int64_t begin, int64_t end) { GK_KERNELS_OF(kScreen).encode(args, begin, end); });
}

// With room for the rounding of scores.
float below(float score) { return score - (1e-4f + std::abs(score) * 0x1p-21f); }

// Samples of hidden's rows, in `ids`; x is hidden in units of the columns. Returns how many tokens were looked at in
// full, or -1 if a row has no distribution, or if the codes rule out too little.
int64_t screen_sample(Tensor hidden, Tensor weight, Tensor x, Tensor norm, Tensor codes, Tensor scale, Tensor slack,
                      std::optional<Tensor> bias_, double softcap, Tensor seed, std::optional<Tensor> row_ids,
                      int64_t vocab_start, Tensor ids_) {
  const Dtype dtype = dtype_of(weight);
  const float *bias = data<float>(bias_), cap = float(softcap);
  const int64_t rows = x.size(0), vocab = weight.size(0), piece_tokens = (vocab + kPieces - 1) / kPieces;
  const ScreenArgs args{.x = data<float>(x),
                        .norm = data<float>(norm),
                        .rows = rows,
                        .padded = x.size(1),
                        .codes = static_cast<const int8_t*>(codes.const_data_ptr()),
                        .scale = data<float>(scale),
                        .slack = data<float>(slack),
                        .bias = bias,
                        .softcap = cap,
                        .noise = noise_of(seed, row_ids, vocab_start)};
  std::vector<ScreenPiece> pieces(kPieces, ScreenPiece{});
  const std::unique_ptr<Contender[]> found(new Contender[kPieces * kScreenRoom]);
  parallel_rows(kPieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      GK_KERNELS_OF(kScreen).screen(args, std::min(vocab, i * piece_tokens), std::min(vocab, (i + 1) * piece_tokens),
                                    pieces[size_t(i)], found.get() + i * kScreenRoom);
    }
  });
  float lower[kScreenRows];
  std::fill(lower, lower + kScreenRows, -INFINITY);
  for (const ScreenPiece& piece : pieces) {
    if (piece.bad) return -1;
    for (int64_t row = 0; row < rows; ++row) lower[row] = std::max(lower[row], piece.lower[row]);
  }
  std::vector<int64_t> at_rows, tokens;
  for (int64_t i = 0; i < kPieces; ++i) {
    for (int64_t k = 0; k < pieces[size_t(i)].count; ++k) {
      const Contender& contender = found[size_t(i * kScreenRoom + k)];
      if (contender.upper < below(lower[contender.row])) continue;
      at_rows.push_back(contender.row);
      tokens.push_back(contender.token);
    }
  }
  const int64_t count = int64_t(tokens.size());
  std::vector<float> products(tokens.size());
  const GatherArgs gather{.x = hidden.const_data_ptr(),
                          .x_dtype = dtype,
                          .x_stride = hidden.stride(0),
                          .table = weight.const_data_ptr(),
                          .table_dtype = dtype,
                          .table_stride = weight.stride(0),
                          .width = weight.size(1),
                          .rows = at_rows.data(),
                          .tokens = tokens.data(),
                          .offsets = nullptr,
                          .values = nullptr,
                          .out = products.data()};
  GK_KERNELS_OF(kGather).dot(gather, 0, count);
  int64_t* ids = mutable_data<int64_t>(ids_);
  double best[kScreenRows];
  std::fill(best, best + kScreenRows, -INFINITY);
  std::fill(ids, ids + rows, -1);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t row = at_rows[size_t(k)], token = tokens[size_t(k)];
    double logit = products[size_t(k)];
    if (bias) logit += bias[token];
    if (cap > 0) logit = cap * std::tanh(logit / cap);
    const double score = logit + token_gumbel<double>(args.noise.seed, args.noise.row(row), vocab_start + token);
    if (!(score > best[row])) continue;
    best[row] = score;
    ids[row] = token;
  }
  return std::any_of(ids, ids + rows, [](int64_t id) { return id < 0; }) ? -1 : count;
}

}  // namespace
}  // namespace gk

STABLE_TORCH_LIBRARY_FRAGMENT(grade_kernels_cpu, m) {
  m.def("screen_encode(Tensor weight, Tensor columns, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) slack) -> ()");
  m.def(
      "screen_sample(Tensor hidden, Tensor weight, Tensor x, Tensor norm, Tensor codes, Tensor scale, Tensor slack, "
      "Tensor? bias, float softcap, Tensor seed, Tensor? row_ids, int vocab_start, Tensor(a!) ids) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(grade_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("screen_encode", TORCH_BOX(&gk::screen_encode));
  m.impl("screen_sample", TORCH_BOX(&gk::screen_sample));
}
