// Runs a kernel: an object whose operator()(block, index) is the work of one block. Compiled by anything but a CUDA
// compiler, it runs on the host, which is how tests run the kernels without a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <stdexcept>
#include <string>

#include "cuda/block_device.h"
#else
#include "cuda/block_host.h"
#endif

namespace gk::cuda {

#if defined(__CUDACC__)

template <typename Kernel>
__global__ void __launch_bounds__(kThreads) run_kernel(const __grid_constant__ Kernel kernel) {
  DeviceBlock block;
  kernel(block, int64_t(blockIdx.x));
}

// Blocks [0, count), on a stream of the current device.
template <typename Kernel>
void launch(const Kernel& kernel, int64_t count, void* stream) {
  if (count == 0) return;  // which CUDA would call an invalid configuration
  if (count > INT32_MAX) throw std::runtime_error("grade_kernels: too many rows for one call of the cuda backend");
  run_kernel<<<dim3(unsigned(count)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(kernel);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("grade_kernels: a CUDA kernel could not be launched: ") +
                             cudaGetErrorString(error));
  }
}

#else

template <typename Kernel>
void launch(const Kernel& kernel, int64_t count, void*) {
  for (int64_t index = 0; index < count; ++index) {
    HostBlock block;
    kernel(block, index);
  }
}

#endif

}  // namespace gk::cuda
