// In the place of csrc/cuda/launch.h, for the simulator: a launch tells which kernel it is, and its argument's bytes.
#pragma once

#include <cstdint>
#include <typeinfo>

#include "cuda/block_host.h"

namespace gk::cuda {

using Launch = void (*)(const char* kernel, const void* argument, int64_t size, int64_t blocks, int threads);

extern Launch on_launch;

template <typename Kernel>
void launch(const Kernel& kernel, int64_t count, void*) {
  if (count > 0) on_launch(typeid(Kernel).name(), &kernel, int64_t(sizeof kernel), count, kThreads);
}

}  // namespace gk::cuda
