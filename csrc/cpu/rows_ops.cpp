// Registers the row kernels with torch (stable ABI): unpacks tensors, picks an instruction set, spreads rows over
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <type_traits>
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

// Tokens that are worth waking a thread for.
constexpr int64_t kGrain = 1 << 14;

// Up to so large a vocabulary rows go into the lanes of vectors, whatever their layout. Larger ones do where their
// tokens do not lie side by side.
constexpr int64_t kMostInLanes = 64;

// [N, V] or [A, V, B], whose row a * B + b is x[a, :, b].
View view_of(const Tensor& x, void* data) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "grade_kernels: rows are [N, V] or [A, V, B]");
  View view{.data = data,
            .dtype = dtype_of(x),
            .outer_stride = x.stride(0),
            .token_stride = x.size(1) > 1 ? x.stride(1) : 1,
            .inner = 1,
            .inner_stride = 0};
  if (x.dim() == 2 || x.size(2) == 1) return view;
  view.inner = x.size(2);
  view.inner_stride = x.stride(2);
  // Rows at one distance are [N, V].
  if (x.size(0) == 1 || view.outer_stride == view.inner * view.inner_stride) {
    view.inner = 1;
    view.outer_stride = view.inner_stride;
  }
  return view;
}
View input_view(const Tensor& x) { return view_of(x, const_cast<void*>(x.const_data_ptr())); }

// The view of rows for a kernel that writes all of them.
View output_view(const Tensor& x) {
  if (x.is_contiguous()) expect_writes(x.mutable_data_ptr(), size_t(x.numel()) * element_size(x));
  return view_of(x, x.mutable_data_ptr());
}

int64_t rows_in(const Tensor& x) { return x.size(0) * (x.dim() == 3 ? x.size(2) : 1); }

// `given` [rows] are the tokens that won, for posterior noise with words of `domain`. Kernels of float alone take them.
Rows rows_of(const Tensor& logits, const Tensor& seed, const std::optional<Tensor>& row_ids, int64_t vocab_start,
             const std::optional<Tensor>& given = std::nullopt, int64_t domain = 0) {
  STD_TORCH_CHECK(!given || dtype_of(logits) != Dtype::kDouble,
                  "grade_kernels: no kernels in float64 take posterior noise");
  return {.logits = input_view(logits),
          .rows = rows_in(logits),
          .vocab = logits.size(1),
          .noise = noise_of(seed, row_ids, vocab_start),
          .given = {.ids = data<int64_t>(given), .domain = uint32_t(domain)}};
}

// Whether the tokens of a row lie side by side, and rows at one distance: what the kernels for one row at a time take.
bool has_plain_rows(const View& x) { return x.token_stride == 1 && x.inner == 1; }
void check_plain_rows(const View& x) {
  STD_TORCH_CHECK(x.dtype == Dtype::kDouble || has_plain_rows(x),
                  "grade_kernels: this kernel takes rows whose tokens lie side by side");
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

// Rows or, where they are short, some of them, that are worth a thread.
int64_t grain_of(int64_t vocab) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, vocab)); }

// Samples every row, and calls finish(row, part) with what was found; part.id is -1 in a bad row.
template <typename Real, typename Finish>
void sample_each(const Rows& in, bool logsumexp, const Finish& finish) {
  const int64_t pieces = std::max<int64_t>(1, (in.vocab + kPiece - 1) / kPiece);
  const auto settle = [&](int64_t row, SamplePart<Real> best) {
    if (best.bad) best.id = -1;
    finish(row, best);
  };
  if (pieces == 1) {
    parallel_rows(in.rows, grain_of(in.vocab), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        settle(row, kernels<Real>().sample(in, row, 0, in.vocab, logsumexp));
      }
    });
    return;
  }
  std::vector<SamplePart<Real>> parts(size_t(in.rows * pieces));
  parallel_rows(in.rows * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      parts[size_t(i)] = kernels<Real>().sample(in, i / pieces, first, std::min(in.vocab, first + kPiece), logsumexp);
    }
  });
  parallel_rows(in.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
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
      settle(row, best);
    }
  });
}

template <typename Real>
void sample_rows(const Rows& in, bool logsumexp, int64_t* ids, Real* score_max, Real* logit_max, Real* logit_sum) {
  check_plain_rows(in.logits);
  sample_each<Real>(in, logsumexp, [&](int64_t row, const SamplePart<Real>& best) {
    ids[row] = best.id;
    score_max[row] = best.score_max;
    if (logsumexp) {
      logit_max[row] = best.logit_max;
      logit_sum[row] = best.logit_sum;
    }
  });
}

void sample(Tensor logits, Tensor seed, std::optional<Tensor> row_ids, int64_t vocab_start, bool logsumexp, Tensor ids,
            Tensor score_max, Tensor logit_max, Tensor logit_sum) {
  const Rows in = rows_of(logits, seed, row_ids, vocab_start);
  int64_t* out = mutable_data<int64_t>(ids);
  if (in.logits.dtype == Dtype::kDouble) {
    sample_rows(in, logsumexp, out, mutable_data<double>(score_max), mutable_data<double>(logit_max),
                mutable_data<double>(logit_sum));
  } else {
    sample_rows(in, logsumexp, out, mutable_data<float>(score_max), mutable_data<float>(logit_max),
                mutable_data<float>(logit_sum));
  }
}

// Runs kernel(args, row, scratch) for every row, with one scratch row per thread.
template <typename Real, typename Kernel, typename Args>
void each_row(Kernel kernel, const Args& args) {
  parallel_rows(args.in.rows, grain_of(args.in.vocab), [&](int64_t begin, int64_t end) {
    std::vector<Real> scratch(size_t(args.in.vocab));
    for (int64_t row = begin; row < end; ++row) kernel(args, row, scratch.data());
  });
}

// Scratch whose vectors are aligned.
class LaneScratch {
 public:
  explicit LaneScratch(int64_t numbers)
      : data_(numbers ? static_cast<float*>(::operator new(size_t(numbers) * 4, kAlignment)) : nullptr) {}
  ~LaneScratch() {
    if (data_) ::operator delete(data_, kAlignment);
  }
  LaneScratch(const LaneScratch&) = delete;
  LaneScratch& operator=(const LaneScratch&) = delete;
  float* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

// Runs kernel(args, begin, end, scratch) for all rows, as LaneKernels takes them.
template <typename Kernel, typename Args>
void each_group(Kernel kernel, const Args& args) {
  const int64_t lanes = GK_KERNELS_OF(kLanes).lanes, rows = args.in.rows, vocab = args.in.vocab;
  parallel_rows((rows + lanes - 1) / lanes, grain_of(vocab * lanes), [&](int64_t begin, int64_t end) {
    const LaneScratch scratch(lane_scratch(vocab) * lanes);
    kernel(args, begin * lanes, std::min(end * lanes, rows), scratch.get());
  });
}

// Whether rows in lanes serve a call.
template <typename... Views>
bool in_lanes(int64_t vocab, const Views&... views) {
  return vocab <= kMostInLanes || !(has_plain_rows(views) && ...);
}

template <typename Real>
void softmax_rows(const Rows& in, const Tensor& tau, const Tensor& score_max, bool normalize, const Tensor& out,
                  const Tensor& total) {
  check_plain_rows(in.logits);
  const SoftmaxArgs<Real> args{.in = in,
                               .tau = data<Real>(tau),
                               .score_max = data<Real>(score_max),
                               .normalize = normalize,
                               .out = output_view(out),
                               .total = mutable_data<Real>(total)};
  check_plain_rows(args.out);
  each_row<Real>(kernels<Real>().softmax, args);
}

void softmax(Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids, int64_t vocab_start,
             Tensor score_max, bool normalize, Tensor out, Tensor total, std::optional<Tensor> given, int64_t domain) {
  const Rows in = rows_of(logits, seed, row_ids, vocab_start, given, domain);
  if (in.logits.dtype == Dtype::kDouble) softmax_rows<double>(in, tau, score_max, normalize, out, total);
  else softmax_rows<float>(in, tau, score_max, normalize, out, total);
}

// one_hot(argmax(l + g)) or softmax((l + g) / tau), a row at a time.
template <typename Out, typename Real>
void relax_each(const RelaxArgs<Real>& args) {
  if (!args.hard) return each_row<Real>(kernels<Real>().relax, args);
  sample_each<Real>(args.in, false, [&](int64_t row, const SamplePart<Real>& best) {
    args.score_max[row] = best.id < 0 ? std::numeric_limits<Real>::quiet_NaN() : best.score_max;
    Out* y = args.out.template row<Out>(row);
    const int64_t stride = args.out.token_stride;
    if (!args.zeroed && stride == 1) std::fill(y, y + args.in.vocab, Out(0.0f));
    else if (!args.zeroed)
      for (int64_t v = 0; v < args.in.vocab; ++v) y[v * stride] = Out(0.0f);
    if (best.id >= 0) y[best.id * stride] = Out(1.0f);
  });
}

void gumbel_softmax(Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids, int64_t vocab_start,
                    bool hard, bool zeroed, Tensor out, Tensor score_max) {
  const Rows in = rows_of(logits, seed, row_ids, vocab_start);
  STD_TORCH_CHECK(dtype_of(out) == in.logits.dtype && out.size(1) == in.vocab && rows_in(out) == in.rows,
                  "grade_kernels: out has logits' dtype and shape");
  if (in.rows == 0) return;
  const View y = hard && zeroed ? view_of(out, out.mutable_data_ptr()) : output_view(out);
  const auto args = [&]<typename Real>(Real) {
    return RelaxArgs<Real>{.in = in,
                           .tau = data<Real>(tau),
                           .hard = hard,
                           .zeroed = zeroed,
                           .out = y,
                           .score_max = mutable_data<Real>(score_max)};
  };
  if (in.logits.dtype == Dtype::kDouble) return relax_each<double>(args(double{}));
  if (in_lanes(in.vocab, in.logits, y)) return each_group(GK_KERNELS_OF(kLanes).gumbel_softmax, args(float{}));
  switch (in.logits.dtype) {
    case Dtype::kBFloat16: return relax_each<c10::BFloat16>(args(float{}));
    case Dtype::kHalf: return relax_each<c10::Half>(args(float{}));
    default: return relax_each<float>(args(float{}));
  }
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
                                .dy = input_view(dy),
                                .out = output_view(out),
                                .dtau = dtau ? mutable_data<Real>(*dtau) : nullptr};
  if constexpr (std::is_same_v<Real, float>) {
    if (estimator == Estimator::kNoisy && !dlogprobs && !in.given.ids &&
        in_lanes(in.vocab, in.logits, args.dy, args.out)) {
      return each_group(GK_KERNELS_OF(kLanes).softmax_backward, args);
    }
  }
  check_plain_rows(in.logits);
  check_plain_rows(args.dy);
  check_plain_rows(args.out);
  each_row<Real>(kernels<Real>().softmax_backward, args);
}

void softmax_backward(Tensor dy, Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids,
                      int64_t vocab_start, int64_t estimator, Tensor ids, Tensor score_max, Tensor logit_max,
                      Tensor logit_sum, std::optional<Tensor> dlogprobs, Tensor out, std::optional<Tensor> dtau,
                      std::optional<Tensor> given, int64_t domain) {
  const Rows in = rows_of(logits, seed, row_ids, vocab_start, given, domain);
  STD_TORCH_CHECK(dtype_of(dy) == in.logits.dtype && dtype_of(out) == in.logits.dtype,
                  "grade_kernels: dy and out have logits' dtype");
  const Estimator rule = static_cast<Estimator>(estimator);
  if (in.logits.dtype == Dtype::kDouble) {
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
      "bool normalize, Tensor(a!) out, Tensor(b!) total, Tensor? given, int domain) -> ()");
  m.def(
      "gumbel_softmax(Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, int vocab_start, bool hard, bool zeroed, "
      "Tensor(a!) out, Tensor(b!) score_max) -> ()");
  m.def(
      "softmax_backward(Tensor dy, Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, int vocab_start, "
      "int estimator, Tensor ids, Tensor score_max, Tensor logit_max, Tensor logit_sum, Tensor? dlogprobs, "
      "Tensor(a!) out, Tensor(b!)? dtau, Tensor? given, int domain) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(grade_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("sample", TORCH_BOX(&gk::sample));
  m.impl("softmax", TORCH_BOX(&gk::softmax));
  m.impl("gumbel_softmax", TORCH_BOX(&gk::gumbel_softmax));
  m.impl("softmax_backward", TORCH_BOX(&gk::softmax_backward));
}
