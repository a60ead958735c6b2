// Products with rows of a table: sparse ones, which the backward pass takes on a support, and those of a few rows of x
// with the whole table.
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
  const int64_t *rows, *tokens;  // entries; rows: gather_dot
  const int64_t* offsets;        // gather_sum: where each row's entries begin
  const float* values;           // gather_sum
  float* out;                    // gather_dot: [K]; gather_sum: [N, width]
};

constexpr int64_t kProductBlock = 64;  // table rows of one piece of work

template <typename T>
struct FewRows {
  const float* x;  // [rows, width]
  int64_t rows, x_stride;
  const T* table;  // [V, width]
  int64_t table_stride, width;
  float* out;  // [rows, V]
  int64_t out_stride;
};
using ProductArgs = FewRows<float>;

// What a dense backward pass sums: weights, and weights times the upstream gradient.
struct TermsArgs {
  const float *weights, *dy, *slope;  // [N, C]; slope may be null
  int64_t weights_stride, dy_stride, slope_stride, columns;
  void *weighted, *unweighted;  // [N, C]: weights * (dy - mean) and weights, times slope
  Dtype out_dtype;              // kFloat or kBFloat16
  int64_t out_stride;
  float *total, *dot;  // [N]: sums of weights and of weights * dy so far, to which these are added; mean is their ratio
  float* shift;        // [N]: by how much the mean has moved
};

struct GatherKernels {
  void (*dot)(const GatherArgs& args, int64_t begin, int64_t end);               // entries [begin, end)
  void (*sum)(const GatherArgs& args, int64_t row, int64_t begin, int64_t end);  // columns [begin, end) of one row
  void (*product)(const ProductArgs& args, int64_t begin, int64_t end);          // rows [begin, end) of the table
  void (*terms)(const TermsArgs& args, int64_t row);
};

extern const GatherKernels kGatherGeneric;
#if defined(__x86_64__)
extern const GatherKernels kGatherAvx2, kGatherAvx512;
#endif

}  // namespace gk
