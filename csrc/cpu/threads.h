// Rows over torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace gk {

// Weights far below a row's maximum become subnormal products, and each costs a microcode trap; nothing that small can
// be seen in a result, so they are flushed to zero while a kernel runs.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Calls work(begin, end) for pieces of [0, count), each of at least `grain` unless that is all.
template <typename Work>
void parallel_rows(int64_t count, int64_t grain, const Work& work) {
  const auto piece = [&](int64_t begin, int64_t end) {
    FlushSubnormals flush;
    work(begin, end);
  };
  if (count <= grain) {  // without torch, which takes longer to find that out than a few small rows do
    if (count > 0) piece(0, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, piece);
}
template <typename Work>
void parallel_rows(int64_t count, const Work& work) {
  parallel_rows(count, 1, work);
}

}  // namespace gk
