// Sparse products with rows of a table: what the backward pass does with a support.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace gk {

constexpr int64_t kGatherBlock = 1024;  // columns that gather_sum takes at a time: 4 KiB of sums

struct GatherArgs {
  const void* x;  // gather_dot: [N, width]
  Dtype x_dtype;
  int64_t x_stride;
  const void* table;  // [V, width]
  Dtype table_dtype;
  int64_t table_stride, width;
  const int64_t *rows, *tokens;   // entries; rows: gather_dot
  const int64_t* offsets;         // gather_sum: where each row's entries begin
  const float* values;            // gather_sum
  float* out;                     // gather_dot: [K]; gather_sum: [N, width]
};

struct GatherKernels {
  void (*dot)(const GatherArgs& args, int64_t begin, int64_t end);             // entries [begin, end)
  void (*sum)(const GatherArgs& args, int64_t row, int64_t begin, int64_t end);  // columns [begin, end) of one row
};

extern const GatherKernels kGatherGeneric;
#if defined(__x86_64__)
extern const GatherKernels kGatherAvx2, kGatherAvx512;
#endif

}  // namespace gk
