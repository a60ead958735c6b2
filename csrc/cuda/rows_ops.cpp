// Registers the CUDA row kernels with torch (stable ABI): unpacks tensors, launches on their device's current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/tensors.h"
#include "cuda/rows.h"

#if !defined(USE_CUDA)
// The header declares it only under torch's own name for a CUDA build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace gk::cuda {
namespace {

// The device of a call's tensors, current while this lives, and the stream that is torch's current one there.
class Launching {
 public:
  explicit Launching(const Tensor& x) {
    if (!x.is_cuda()) return;  // the kernels as tests run them, on the host
    guard_.emplace(x.get_device_index());
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

void expect_rows(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1),
                  "grade_kernels: the cuda kernels take [N, V] with unit stride along V");
  STD_TORCH_CHECK(dtype_of(x) != Dtype::kDouble, "grade_kernels: the cuda kernels compute in float32");
}

Rows rows_of(const Tensor& logits, const Tensor& seed, const std::optional<Tensor>& row_ids, int64_t vocab_start) {
  expect_rows(logits);
  // A seed that the host can read costs no copy; one on the device costs no synchronisation.
  const bool on_device = seed.is_cuda() == logits.is_cuda();
  return {logits.const_data_ptr(),
          dtype_of(logits),
          logits.size(0),
          logits.size(1),
          logits.stride(0),
          pieces_of(logits.size(1), vocab_start),
          on_device ? seed.const_data_ptr<int64_t>() : nullptr,
          on_device ? 0 : *seed.const_data_ptr<int64_t>(),
          data<int64_t>(row_ids),
          vocab_start};
}

void sample_rows(Tensor logits, Tensor seed, std::optional<Tensor> row_ids, int64_t vocab_start, Tensor best,
                 Tensor tile, std::optional<Tensor> top, std::optional<Tensor> total, Tensor ids, Tensor score_max,
                 Tensor logit_max, Tensor logit_sum) {
  const SampleArgs args{rows_of(logits, seed, row_ids, vocab_start),
                        mutable_data<float>(best),
                        top ? mutable_data<float>(*top) : nullptr,
                        total ? mutable_data<float>(*total) : nullptr,
                        mutable_data<int32_t>(tile),
                        mutable_data<int64_t>(ids),
                        mutable_data<float>(score_max),
                        mutable_data<float>(logit_max),
                        mutable_data<float>(logit_sum)};
  sample(args, Launching(logits).stream());
}

void one_hot_rows(Tensor ids, Tensor score_max, Tensor out) {
  expect_rows(out);
  const OneHotArgs args{data<int64_t>(ids), data<float>(score_max), out.mutable_data_ptr(), dtype_of(out), out.size(0),
                        out.size(1)};
  one_hot(args, Launching(out).stream());
}

void softmax_rows(Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids, int64_t vocab_start,
                  Tensor score_max, bool normalize, Tensor partial, Tensor out, Tensor total) {
  expect_rows(out);
  STD_TORCH_CHECK(dtype_of(out) == Dtype::kFloat || dtype_of(out) == dtype_of(logits),
                  "grade_kernels: weights are float32 or of logits' dtype");
  const SoftmaxArgs args{rows_of(logits, seed, row_ids, vocab_start),
                         data<float>(tau),
                         data<float>(score_max),
                         normalize,
                         mutable_data<float>(partial),
                         out.mutable_data_ptr(),
                         dtype_of(out),
                         out.stride(0),
                         mutable_data<float>(total)};
  softmax(args, Launching(logits).stream());
}

void softmax_backward_rows(Tensor dy, Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids,
                           int64_t vocab_start, int64_t estimator, Tensor ids, Tensor score_max, Tensor logit_max,
                           Tensor logit_sum, std::optional<Tensor> dlogprobs, Tensor partial, Tensor chosen,
                           std::optional<Tensor> partial_dtau, Tensor out, Tensor dtau) {
  expect_rows(dy);
  expect_rows(out);
  STD_TORCH_CHECK(dtype_of(dy) == dtype_of(logits) && dtype_of(out) == dtype_of(logits),
                  "grade_kernels: dy and out have logits' dtype");
  const BackwardArgs args{rows_of(logits, seed, row_ids, vocab_start),
                          static_cast<Estimator>(estimator),
                          data<float>(tau),
                          data<float>(score_max),
                          data<float>(logit_max),
                          data<float>(logit_sum),
                          data<int64_t>(ids),
                          data<float>(dlogprobs),
                          dy.const_data_ptr(),
                          dy.stride(0),
                          out.mutable_data_ptr(),
                          out.stride(0),
                          mutable_data<float>(partial),
                          mutable_data<float>(chosen),
                          partial_dtau ? mutable_data<float>(*partial_dtau) : nullptr,
                          mutable_data<float>(dtau)};
  softmax_backward(args, Launching(logits).stream());
}

Place place_of(const Tensor& x, const Tensor& logits) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == logits.size(0) && x.size(1) == logits.size(1) &&
                      x.size(2) == logits.size(2) && dtype_of(x) == dtype_of(logits),
                  "grade_kernels: the cuda kernels take tensors [A, V, B] of one shape and dtype");
  return {x.stride(0), x.stride(1), x.stride(2)};
}

PlacedRows placed_rows_of(const Tensor& logits, const Tensor& seed, const std::optional<Tensor>& row_ids,
                          int64_t vocab_start) {
  const Place place = place_of(logits, logits);
  STD_TORCH_CHECK(dtype_of(logits) != Dtype::kDouble, "grade_kernels: the cuda kernels compute in float32");
  const bool on_device = seed.is_cuda() == logits.is_cuda();
  return {logits.const_data_ptr(),
          place,
          dtype_of(logits),
          logits.size(0),
          logits.size(1),
          logits.size(2),
          logits.size(0) * logits.size(2),
          on_device ? seed.const_data_ptr<int64_t>() : nullptr,
          on_device ? 0 : *seed.const_data_ptr<int64_t>(),
          data<int64_t>(row_ids),
          vocab_start};
}

void relax_rows(Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids, int64_t vocab_start, bool hard,
                Tensor out, Tensor score_max) {
  const RelaxArgs args{placed_rows_of(logits, seed, row_ids, vocab_start),
                       data<float>(tau),
                       hard,
                       out.mutable_data_ptr(),
                       place_of(out, logits),
                       mutable_data<float>(score_max)};
  relax(args, Launching(logits).stream());
}

void relax_backward_rows(Tensor dy, Tensor logits, Tensor tau, Tensor seed, std::optional<Tensor> row_ids,
                         int64_t vocab_start, Tensor score_max, Tensor out, std::optional<Tensor> dtau) {
  const RelaxBackwardArgs args{placed_rows_of(logits, seed, row_ids, vocab_start),
                               data<float>(tau),
                               data<float>(score_max),
                               dy.const_data_ptr(),
                               place_of(dy, logits),
                               out.mutable_data_ptr(),
                               place_of(out, logits),
                               dtau ? mutable_data<float>(*dtau) : nullptr};
  relax_backward(args, Launching(logits).stream());
}

}  // namespace
}  // namespace gk::cuda

STABLE_TORCH_LIBRARY(grade_kernels_cuda, m) {
  m.def("pieces(int vocab, int vocab_start) -> int");
  m.def(
      "sample(Tensor logits, Tensor seed, Tensor? row_ids, int vocab_start, Tensor(a!) best, Tensor(b!) tile, "
      "Tensor(c!)? top, Tensor(d!)? total, Tensor(e!) ids, Tensor(f!) score_max, Tensor(g!) logit_max, "
      "Tensor(h!) logit_sum) -> ()");
  m.def("one_hot(Tensor ids, Tensor score_max, Tensor(a!) out) -> ()");
  m.def(
      "softmax(Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, int vocab_start, Tensor score_max, "
      "bool normalize, Tensor(a!) partial, Tensor(b!) out, Tensor(c!) total) -> ()");
  m.def(
      "softmax_backward(Tensor dy, Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, int vocab_start, "
      "int estimator, Tensor ids, Tensor score_max, Tensor logit_max, Tensor logit_sum, Tensor? dlogprobs, "
      "Tensor(a!) partial, Tensor(b!) chosen, Tensor(c!)? partial_dtau, Tensor(d!) out, Tensor(e!) dtau) -> ()");
  m.def(
      "relax(Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, int vocab_start, bool hard, Tensor(a!) out, "
      "Tensor(b!) score_max) -> ()");
  m.def(
      "relax_backward(Tensor dy, Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, int vocab_start, "
      "Tensor score_max, Tensor(a!) out, Tensor(b!)? dtau) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(grade_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("pieces", TORCH_BOX(&gk::cuda::pieces_of));
  m.impl("sample", TORCH_BOX(&gk::cuda::sample_rows));
  m.impl("one_hot", TORCH_BOX(&gk::cuda::one_hot_rows));
  m.impl("softmax", TORCH_BOX(&gk::cuda::softmax_rows));
  m.impl("softmax_backward", TORCH_BOX(&gk::cuda::softmax_backward_rows));
  m.impl("relax", TORCH_BOX(&gk::cuda::relax_rows));
  m.impl("relax_backward", TORCH_BOX(&gk::cuda::relax_backward_rows));
}
