// A thread block on the host, for tests: what is per thread is an array, and a step runs thread after thread.
//
// Memory is watched: once tensors are named by `watch`, every access of the large kind must fall on one of their
// elements, vectors must be aligned as a GPU requires, and reads and writes are counted per element.
#pragma once

#include <array>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/block.h"

namespace gk::cuda {

struct Watched {
  const char* begin;
  int64_t rows, columns, row_bytes;
  size_t element;
  int64_t *reads, *writes;  // [rows, columns]
};

inline std::vector<Watched> watched;

inline void note_access(const void* p, size_t size, bool write) {
  if (size == sizeof(Quad) && reinterpret_cast<uintptr_t>(p) % sizeof(Quad)) {
    throw std::runtime_error("an access of 16 bytes is not aligned to them");
  }
  if (watched.empty()) return;
  for (const Watched& w : watched) {
    const int64_t offset = static_cast<const char*>(p) - w.begin;
    const int64_t row = w.row_bytes ? offset / w.row_bytes : 0, within = offset - row * w.row_bytes;
    if (offset < 0 || row >= w.rows || within + int64_t(size) > w.columns * int64_t(w.element)) continue;
    int64_t* counts = (write ? w.writes : w.reads) + row * w.columns + within / int64_t(w.element);
    for (size_t i = 0; i < size / w.element; ++i) ++counts[i];
    return;
  }
  throw std::runtime_error(write ? "a write outside the tensors" : "a read outside the tensors");
}

struct HostBlock {
  template <typename T>
  using PerThread = std::array<T, kThreads>;
  struct Nothing {};

  template <typename F, typename... X>
  auto each(F&& f, const X&... x) const {
    using Result = decltype(f(0, x[0]...));
    if constexpr (std::is_void_v<Result>) {
      for (int thread = 0; thread < kThreads; ++thread) f(thread, x[size_t(thread)]...);
      return Nothing{};
    } else {
      PerThread<Result> out;
      for (int thread = 0; thread < kThreads; ++thread) out[size_t(thread)] = f(thread, x[size_t(thread)]...);
      return out;
    }
  }

  template <typename T>
  PerThread<T> shuffle_xor(const PerThread<T>& x, int mask) const {
    return each([&](int thread) { return x[size_t(thread ^ mask)]; });
  }

  template <typename T, typename Merge>
  T across_warps(const PerThread<T>& x, Merge merge) const {
    T all = x[0];
    for (size_t i = 1; i < kWarps; ++i) all = merge(all, x[i * kWarp]);
    return all;
  }

  template <typename F>
  void once(F&& f) const {
    f();
  }

  template <typename Word>
  static Word load(const void* p) {
    note_access(p, sizeof(Word), false);
    Word x;
    std::memcpy(&x, p, sizeof(Word));
    return x;
  }

  template <typename Word>
  static void store(void* p, Word x) {
    note_access(p, sizeof(Word), true);
    std::memcpy(p, &x, sizeof(Word));
  }
};

}  // namespace gk::cuda
