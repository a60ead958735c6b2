// A thread block as the kernels see it. Their bodies are templates over it, so that the same source runs on a GPU
// (block_device.h) and, thread by thread, on the host (block_host.h), where tests watch every access to memory.
//
// A body is a sequence of steps. `each(f, x...)` runs f(thread, x of that thread...) for every thread and returns what
// they return, one value per thread; collective steps take such values. All else in a body has the same value in every
// thread. A block offers:
//
//   each(f, x...)                 see above
//   shuffle_xor(x, mask)          from every thread the value of thread ^ mask, within a warp
//   across_warps(x, merge)        the warps' values merged in order, one value for all
//   once(f)                       f() on one thread
//   load<Word>(p), store(p, x)    memory of the large tensors; Quad is 16 bytes and must be aligned to them
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GK_KERNEL __device__ __forceinline__
#define GK_UNROLL _Pragma("unroll")
#define GK_NO_UNROLL _Pragma("unroll 1")
#else
#define GK_KERNEL inline
#define GK_UNROLL
#define GK_NO_UNROLL
#endif

namespace gk::cuda {

constexpr int kWarp = 32, kWarps = 4, kThreads = kWarp * kWarps;

struct alignas(16) Quad {
  uint32_t word[4];
};

// All threads' values merged: in a butterfly within a warp, then warp by warp. The same order on every run.
template <typename Block, typename Values, typename Merge>
GK_KERNEL auto reduced(Block& block, Values x, Merge merge) {
  GK_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    x = block.each([&](int, const auto& mine, const auto& other) { return merge(mine, other); }, x,
                   block.shuffle_xor(x, mask));
  }
  return block.across_warps(x, merge);
}

}  // namespace gk::cuda
