// Stands in for the GPU when tests run the CUDA kernels on the host: nothing to launch on, and ops to look inside.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/gumbel.h"
#include "common/tensors.h"
#include "cuda/block_host.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return AOTI_TORCH_FAILURE; }

namespace {

using gk::Tensor;

// Counts accesses to the elements of x [rows, columns] from now on; those elsewhere are errors.
void watch(Tensor x, Tensor reads, Tensor writes) {
  const size_t size = gk::element_size(x);
  gk::cuda::watched.push_back({static_cast<const char*>(x.const_data_ptr()), x.size(0), x.size(1),
                               x.size(0) > 1 ? x.stride(0) * int64_t(size) : int64_t(1) << 40, size,
                               gk::mutable_data<int64_t>(reads), gk::mutable_data<int64_t>(writes)});
}

void unwatch(Tensor) { gk::cuda::watched.clear(); }

// Noise of words and their refinement, without and then with the shift.
void noise(Tensor word, Tensor refinement, Tensor out) {
  const int64_t *w = gk::data<int64_t>(word), *fine = gk::data<int64_t>(refinement);
  float* g = gk::mutable_data<float>(out);
  for (int64_t i = 0; i < int64_t(word.numel()); ++i) {
    float y = gk::noise_argument(uint32_t(w[i]));
    if (gk::needs_refinement(y)) y = gk::refined_argument(y, uint32_t(fine[i]));
    g[i] = gk::kNoiseShift - gk::kLn2 * gk::scaled_noise(y);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(grade_kernels_cuda_host, m) {
  m.def("watch(Tensor x, Tensor(a!) reads, Tensor(b!) writes) -> ()");
  m.def("unwatch(Tensor x) -> ()");
  m.def("noise(Tensor word, Tensor refinement, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(grade_kernels_cuda_host, CompositeExplicitAutograd, m) {
  m.impl("watch", TORCH_BOX(&watch));
  m.impl("unwatch", TORCH_BOX(&unwatch));
  m.impl("noise", TORCH_BOX(&noise));
}
