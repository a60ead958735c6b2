// A thread block on a GPU: what is per thread is a thread's own variable.
#pragma once

#include "cuda/block.h"

namespace gk::cuda {

struct DeviceBlock {
  template <typename F, typename... X>
  __device__ __forceinline__ auto each(F&& f, const X&... x) const {
    return f(int(threadIdx.x), x...);
  }

  template <typename T>
  __device__ __forceinline__ T shuffle_xor(T x, int mask) const {
    return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  }

  template <typename T, typename Merge>
  __device__ __forceinline__ T across_warps(T x, Merge merge) const {
    __shared__ T values[kWarps];
    __syncthreads();  // what an earlier call left here has been read
    if (threadIdx.x % kWarp == 0) values[threadIdx.x / kWarp] = x;
    __syncthreads();
    T all = values[0];
    GK_UNROLL
    for (int i = 1; i < kWarps; ++i) all = merge(all, values[i]);
    return all;
  }

  template <typename F>
  __device__ __forceinline__ void once(F&& f) const {
    if (threadIdx.x == 0) f();
  }

  template <typename Word>
  static __device__ __forceinline__ Word load(const void* p) {
    if constexpr (sizeof(Word) == 16) {
      const uint4 x = *static_cast<const uint4*>(p);
      return {{x.x, x.y, x.z, x.w}};
    } else {
      return *static_cast<const Word*>(p);
    }
  }

  template <typename Word>
  static __device__ __forceinline__ void store(void* p, Word x) {
    if constexpr (sizeof(Word) == 16) {
      *static_cast<uint4*>(p) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
    } else {
      *static_cast<Word*>(p) = x;
    }
  }
};

}  // namespace gk::cuda
