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
#include <tuple>
#include <type_traits>
#include <utility>
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

// The view of [A, V, B], whose row a * B + b is x[a, :, b].
View view_of_rows(void* data, Dtype dtype, int64_t outer, int64_t vocab, int64_t inner, int64_t outer_stride,
                  int64_t token_stride, int64_t inner_stride) {
  View view{.data = data,
            .dtype = dtype,
            .outer_stride = outer_stride,
            .token_stride = vocab > 1 ? token_stride : 1,
            .inner = 1,
            .inner_stride = 0};
  if (inner == 1) return view;
  if (outer == 1 || outer_stride == inner * inner_stride) {  // rows at one distance are [N, V]
    view.outer_stride = inner_stride;
    return view;
  }
  view.inner = inner;
  view.inner_stride = inner_stride;
  return view;
}

// Of [N, V] or [A, V, B].
View view_of(const Tensor& x, void* data) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "grade_kernels: rows are [N, V] or [A, V, B]");
  const bool flat = x.dim() == 2;
  return view_of_rows(data, dtype_of(x), x.size(0), x.size(1), flat ? 1 : x.size(2), x.stride(0), x.stride(1),
                      flat ? 0 : x.stride(2));
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

// call(Real{}), where Real is what numbers of a dtype are computed in.
template <typename Call>
auto with_real(Dtype dtype, const Call& call) {
  return dtype == Dtype::kDouble ? call(double{}) : call(float{});
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

// softmax((l + g) / tau) or one_hot(argmax(l + g)) of all rows.
template <typename Real>
void relax(const RelaxArgs<Real>& args) {
  if constexpr (std::is_same_v<Real, float>) {
    if (in_lanes(args.in.vocab, args.in.logits, args.out))
      return each_group(GK_KERNELS_OF(kLanes).gumbel_softmax, args);
    switch (args.in.logits.dtype) {
      case Dtype::kBFloat16: return relax_each<c10::BFloat16>(args);
      case Dtype::kHalf: return relax_each<c10::Half>(args);
      default: return relax_each<float>(args);
    }
  } else {
    relax_each<double>(args);
  }
}

void gumbel_softmax(Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids, int64_t vocab_start,
                    bool hard, bool zeroed, Tensor out, Tensor score_max) {
  const Rows in = rows_of(logits, seed, row_ids, vocab_start);
  STD_TORCH_CHECK(dtype_of(out) == in.logits.dtype && out.size(1) == in.vocab && rows_in(out) == in.rows,
                  "grade_kernels: out has logits' dtype and shape");
  if (in.rows == 0) return;
  const View y = hard && zeroed ? view_of(out, out.mutable_data_ptr()) : output_view(out);
  with_real(in.logits.dtype, [&]<typename Real>(Real) {
    relax<Real>({.in = in,
                 .tau = data<Real>(tau),
                 .hard = hard,
                 .zeroed = zeroed,
                 .out = y,
                 .score_max = mutable_data<Real>(score_max)});
  });
}

template <typename Real>
void backward_rows(const BackwardArgs<Real>& args) {
  if constexpr (std::is_same_v<Real, float>) {
    if (args.estimator == Estimator::kNoisy && !args.dlogprobs && !args.in.given.ids &&
        in_lanes(args.in.vocab, args.in.logits, args.dy, args.out)) {
      return each_group(GK_KERNELS_OF(kLanes).softmax_backward, args);
    }
  }
  check_plain_rows(args.in.logits);
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
  with_real(in.logits.dtype, [&]<typename Real>(Real) {
    backward_rows<Real>({.in = in,
                         .estimator = static_cast<Estimator>(estimator),
                         .tau = data<Real>(tau),
                         .score_max = data<Real>(score_max),
                         .logit_max = data<Real>(logit_max),
                         .logit_sum = data<Real>(logit_sum),
                         .ids = data<int64_t>(ids),
                         .dlogprobs = dlogprobs ? data<Real>(*dlogprobs) : nullptr,
                         .dy = input_view(dy),
                         .out = output_view(out),
                         .dtau = dtau ? mutable_data<Real>(*dtau) : nullptr});
  });
}

// ---- The two above in one call each ---------------------------------------------------------------------------------
//
// For a few small rows the arithmetic takes less time than the views and the tensors that the operations above want. So
// these take tensors of any shape with the vocabulary at dim, and one tau for all rows, and make their results. They
// return none where that is more than they can do, or an error, which the caller finds.

// Joins dimensions [begin, end) of x into one of `size` numbers; returns their stride, or nothing where they have none.
std::optional<int64_t> joined_stride(const Tensor& x, int64_t begin, int64_t end, int64_t& size) {
  int64_t stride = 1, next = 0;  // next: the stride at which the next dimension outwards continues
  size = 1;
  for (int64_t d = end - 1; d >= begin; --d) {
    const int64_t count = x.size(d);
    if (count == 1) continue;
    if (size == 1) stride = x.stride(d);
    else if (x.stride(d) != next) return std::nullopt;
    size *= count;
    next = x.stride(d) * count;
  }
  return stride;
}

// The rows of x, with the vocabulary at dim.
struct Planes {
  View view;
  int64_t rows, vocab;
};

// Nothing where x is not on the CPU, not dense, of another dtype, empty, or has no such dim, or where its rows are no
// [A, V, B] of its own memory.
std::optional<Planes> planes_of(const Tensor& x, int64_t dim, void* data) {
  const int64_t dims = x.dim();
  if (dim < 0) dim += dims;
  if (dim < 0 || dim >= dims || x.numel() == 0) return std::nullopt;
  int64_t outer = 0, inner = 0;
  const std::optional<int64_t> outer_stride = joined_stride(x, 0, dim, outer);
  const std::optional<int64_t> inner_stride = joined_stride(x, dim + 1, dims, inner);
  if (!outer_stride || !inner_stride) return std::nullopt;
  const int64_t vocab = x.size(dim);
  return Planes{view_of_rows(data, dtype_of(x), outer, vocab, inner, *outer_stride, x.stride(dim), *inner_stride),
                outer * inner, vocab};
}
std::optional<Planes> planes_of(const Tensor& x, int64_t dim) {
  if (!x.is_cpu() || x.layout() != torch::headeronly::Layout::Strided || !has_dtype(x)) return std::nullopt;
  return planes_of(x, dim, const_cast<void*>(x.const_data_ptr()));
}

// A contiguous tensor of memory that holds anything. torch's own operation costs as much as all else here.
Tensor blank(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t kUsual = 8;  // dimensions
  int64_t few[kUsual];
  std::vector<int64_t> many(sizes.size() > kUsual ? sizes.size() : 0);
  int64_t* strides = many.empty() ? few : many.data();
  int64_t next = 1;
  for (size_t d = sizes.size(); d-- > 0; next *= std::max<int64_t>(1, sizes[d])) strides[d] = next;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// The result and, where `keeps`, max(l + g) [N].
std::tuple<std::optional<Tensor>, std::optional<Tensor>> relax_at(Tensor logits, int64_t dim, double tau, int64_t seed,
                                                                  bool hard, bool keeps) {
  const std::optional<Planes> x = planes_of(logits, dim);
  if (!x) return {};
  return with_real(x->view.dtype, [&]<typename Real>(Real) -> std::tuple<std::optional<Tensor>, std::optional<Tensor>> {
    const Real t = Real(tau);
    if (!(t >= std::numeric_limits<Real>::min() && tau <= double(std::numeric_limits<Real>::max()))) return {};
    Tensor y = blank(logits.sizes(), logits.scalar_type());
    const std::optional<Planes> to = planes_of(y, dim, y.mutable_data_ptr());
    const size_t rows = size_t(x->rows);
    const std::vector<Real> taus(rows, t);
    std::vector<Real> own(keeps ? 0 : rows);
    std::optional<Tensor> score_max;
    if (keeps) {
      score_max = blank({&x->rows, 1}, std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float);
    }
    Real* found = keeps ? static_cast<Real*>(score_max->mutable_data_ptr()) : own.data();
    relax<Real>({.in = {x->view, x->rows, x->vocab, Noise{uint64_t(seed), nullptr, 0}},
                 .tau = taus.data(),
                 .hard = hard,
                 .zeroed = false,
                 .out = to->view,
                 .score_max = found});
    if (std::any_of(found, found + rows, [](Real score) { return std::isnan(score); })) return {};
    return {std::move(y), std::move(score_max)};
  });
}

// The gradient of the logits.
std::optional<Tensor> relax_at_backward(Tensor dy, Tensor logits, int64_t dim, double tau, int64_t seed,
                                        Tensor score_max) {
  const std::optional<Planes> x = planes_of(logits, dim), from = planes_of(dy, dim);
  if (!x || !from) return std::nullopt;
  // What was saved comes back as hooks for saved tensors make it.
  STD_TORCH_CHECK(from->view.dtype == x->view.dtype && std::ranges::equal(dy.sizes(), logits.sizes()),
                  "grade_kernels: dy has logits' dtype and shape");
  STD_TORCH_CHECK(score_max.numel() == x->rows && score_max.is_contiguous(),
                  "grade_kernels: score_max has a number for each row");
  Tensor dlogits = blank(logits.sizes(), logits.scalar_type());
  with_real(x->view.dtype, [&]<typename Real>(Real) {
    const std::vector<Real> taus(size_t(x->rows), Real(tau));
    backward_rows<Real>({.in = {x->view, x->rows, x->vocab, Noise{uint64_t(seed), nullptr, 0}},
                         .estimator = Estimator::kNoisy,
                         .tau = taus.data(),
                         .score_max = data<Real>(score_max),
                         .logit_max = nullptr,
                         .logit_sum = nullptr,
                         .ids = nullptr,
                         .dlogprobs = nullptr,
                         .dy = from->view,
                         .out = planes_of(dlogits, dim, dlogits.mutable_data_ptr())->view,
                         .dtau = nullptr});
  });
  return dlogits;
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
  m.def("relax_at(Tensor logits, int dim, float tau, int seed, bool hard, bool keeps) -> (Tensor?, Tensor?)");
  m.def("relax_at_backward(Tensor dy, Tensor logits, int dim, float tau, int seed, Tensor score_max) -> Tensor?");
}

STABLE_TORCH_LIBRARY_IMPL(grade_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("sample", TORCH_BOX(&gk::sample));
  m.impl("softmax", TORCH_BOX(&gk::softmax));
  m.impl("gumbel_softmax", TORCH_BOX(&gk::gumbel_softmax));
  m.impl("softmax_backward", TORCH_BOX(&gk::softmax_backward));
  m.impl("relax_at", TORCH_BOX(&gk::relax_at));
  m.impl("relax_at_backward", TORCH_BOX(&gk::relax_at_backward));
}
