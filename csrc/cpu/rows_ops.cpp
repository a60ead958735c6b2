// Registers the row kernels with torch (stable ABI): unpacks tensors, picks an instruction set, spreads rows over
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "common/online_softmax.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/rows.h"
#include "cpu/tensors.h"
#include "cpu/threads.h"

namespace gk {
namespace {

// Tokens that one piece of a row covers. Fixed, so that a sum does not depend on how many threads there are.
constexpr int64_t kPiece = 1 << 16;

Rows rows_of(const Tensor& logits, const Tensor& seed, const std::optional<Tensor>& row_ids, int64_t vocab_start) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "grade_kernels: the cpu kernels take [N, V] with unit stride along V");
  return {.logits = logits.const_data_ptr(),
          .dtype = dtype_of(logits),
          .rows = logits.size(0),
          .vocab = logits.size(1),
          .stride = logits.stride(0),
          .noise = noise_of(seed, row_ids, vocab_start)};
}

template <typename Real>
const RowKernels<Real>& kernels();
template <>
const RowKernels<double>& kernels() {
  return kRowsDouble;
}
template <>
const RowKernels<float>& kernels() {
  return GK_KERNELS_OF(kRows);
}

template <typename Real>
void sample_rows(const Rows& in, bool logsumexp, int64_t* ids, Real* score_max, Real* logit_max, Real* logit_sum) {
  const int64_t pieces = std::max<int64_t>(1, (in.vocab + kPiece - 1) / kPiece);
  std::vector<SamplePart<Real>> parts(size_t(in.rows * pieces));
  parallel_rows(in.rows * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      parts[size_t(i)] = kernels<Real>().sample(in, i / pieces, first, std::min(in.vocab, first + kPiece), logsumexp);
    }
  });
  for (int64_t row = 0; row < in.rows; ++row) {
    SamplePart<Real> best = parts[size_t(row * pieces)];
    for (int64_t i = 1; i < pieces; ++i) {
      const SamplePart<Real>& part = parts[size_t(row * pieces + i)];
      best.bad |= part.bad;
      if (part.score_max > best.score_max) {  // ties stay with the smaller id
        best.score_max = part.score_max;
        best.id = part.id;
      }
      if (logsumexp) {
        const LogSum<Real> both =
            merged(LogSum<Real>{best.logit_max, best.logit_sum}, LogSum<Real>{part.logit_max, part.logit_sum});
        best.logit_max = both.max;
        best.logit_sum = both.sum;
      }
    }
    ids[row] = best.bad ? -1 : best.id;
    score_max[row] = best.score_max;
    if (logsumexp) {
      logit_max[row] = best.logit_max;
      logit_sum[row] = best.logit_sum;
    }
  }
}

void sample(Tensor logits, Tensor seed, std::optional<Tensor> row_ids, int64_t vocab_start, bool logsumexp, Tensor ids,
            Tensor score_max, Tensor logit_max, Tensor logit_sum) {
  const Rows in = rows_of(logits, seed, row_ids, vocab_start);
  int64_t* out = mutable_data<int64_t>(ids);
  if (in.dtype == Dtype::kDouble) {
    sample_rows(in, logsumexp, out, mutable_data<double>(score_max), mutable_data<double>(logit_max),
                mutable_data<double>(logit_sum));
  } else {
    sample_rows(in, logsumexp, out, mutable_data<float>(score_max), mutable_data<float>(logit_max),
                mutable_data<float>(logit_sum));
  }
}

// Output rows for a kernel that writes all of them.
void* fresh_rows(const Tensor& out) {
  expect_writes(out.mutable_data_ptr(), size_t(out.size(0) * out.stride(0)) * element_size(out));
  return out.mutable_data_ptr();
}

// Runs kernel(args, row, scratch) for every row, with one scratch row per thread.
template <typename Real, typename Kernel, typename Args>
void each_row(Kernel kernel, const Args& args) {
  parallel_rows(args.in.rows, [&](int64_t begin, int64_t end) {
    std::vector<Real> scratch(size_t(args.in.vocab));
    for (int64_t row = begin; row < end; ++row) kernel(args, row, scratch.data());
  });
}

template <typename Real>
void softmax_rows(const Rows& in, const Tensor& tau, const Tensor& score_max, bool normalize, const Tensor& out,
                  const Tensor& total) {
  const SoftmaxArgs<Real> args{.in = in,
                               .tau = data<Real>(tau),
                               .score_max = data<Real>(score_max),
                               .normalize = normalize,
                               .out = fresh_rows(out),
                               .out_dtype = dtype_of(out),
                               .out_stride = out.stride(0),
                               .total = mutable_data<Real>(total)};
  each_row<Real>(kernels<Real>().softmax, args);
}

void softmax(Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids, int64_t vocab_start,
             Tensor score_max, bool normalize, Tensor out, Tensor total) {
  const Rows in = rows_of(logits, seed, row_ids, vocab_start);
  if (in.dtype == Dtype::kDouble) softmax_rows<double>(in, tau, score_max, normalize, out, total);
  else softmax_rows<float>(in, tau, score_max, normalize, out, total);
}

template <typename Real>
void backward_rows(const Rows& in, Estimator estimator, const Tensor& dy, const Tensor& tau, const Tensor& ids,
                   const Tensor& score_max, const Tensor& logit_max, const Tensor& logit_sum,
                   const std::optional<Tensor>& dlogprobs, const Tensor& out, const std::optional<Tensor>& dtau) {
  const BackwardArgs<Real> args{.in = in,
                                .estimator = estimator,
                                .tau = data<Real>(tau),
                                .score_max = data<Real>(score_max),
                                .logit_max = data<Real>(logit_max),
                                .logit_sum = data<Real>(logit_sum),
                                .ids = data<int64_t>(ids),
                                .dlogprobs = dlogprobs ? data<Real>(*dlogprobs) : nullptr,
                                .dy = dy.const_data_ptr(),
                                .dy_stride = dy.stride(0),
                                .out = fresh_rows(out),
                                .out_stride = out.stride(0),
                                .dtau = dtau ? mutable_data<Real>(*dtau) : nullptr};
  each_row<Real>(kernels<Real>().softmax_backward, args);
}

void softmax_backward(Tensor dy, Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids,
                      int64_t vocab_start, int64_t estimator, Tensor ids, Tensor score_max, Tensor logit_max,
                      Tensor logit_sum, std::optional<Tensor> dlogprobs, Tensor out, std::optional<Tensor> dtau) {
  const Rows in = rows_of(logits, seed, row_ids, vocab_start);
  STD_TORCH_CHECK(dtype_of(dy) == in.dtype && dtype_of(out) == in.dtype,
                  "grade_kernels: dy and out have logits' dtype");
  const Estimator rule = static_cast<Estimator>(estimator);
  if (in.dtype == Dtype::kDouble) {
    backward_rows<double>(in, rule, dy, tau, ids, score_max, logit_max, logit_sum, dlogprobs, out, dtau);
  } else {
    backward_rows<float>(in, rule, dy, tau, ids, score_max, logit_max, logit_sum, dlogprobs, out, dtau);
  }
}

}  // namespace
}  // namespace gk

STABLE_TORCH_LIBRARY(grade_kernels_cpu, m) {
  m.def(
      "sample(Tensor logits, Tensor seed, Tensor? row_ids, int vocab_start, bool logsumexp, Tensor(a!) ids, "
      "Tensor(b!) score_max, Tensor(c!) logit_max, Tensor(d!) logit_sum) -> ()");
  m.def(
      "softmax(Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, int vocab_start, Tensor score_max, "
      "bool normalize, Tensor(a!) out, Tensor(b!) total) -> ()");
  m.def(
      "softmax_backward(Tensor dy, Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, int vocab_start, "
      "int estimator, Tensor ids, Tensor score_max, Tensor logit_max, Tensor logit_sum, Tensor? dlogprobs, "
      "Tensor(a!) out, Tensor(b!)? dtau) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(grade_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("sample", TORCH_BOX(&gk::sample));
  m.impl("softmax", TORCH_BOX(&gk::softmax));
  m.impl("softmax_backward", TORCH_BOX(&gk::softmax_backward));
}
