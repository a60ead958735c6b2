// What the simulator adds to the host part of csrc/cuda: who is told of a launch, and no stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda/launch.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return AOTI_TORCH_FAILURE; }

namespace gk::cuda {

Launch on_launch = nullptr;

}  // namespace gk::cuda

extern "C" __attribute__((visibility("default"))) void gk_set_on_launch(gk::cuda::Launch told) {
  gk::cuda::on_launch = told;
}
