// Products of two matrices, whose sums are float32, for processors with AVX2 (float32, bfloat16, float16), AVX-512
// (float32, float16, and bfloat16 where it has instructions for that) or AMX (float32, bfloat16).
//
// A logit comes out the same whatever rows and tokens stand beside it, so that a backward pass sees the logits whose
// normaliser its forward pass took.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace gk {

struct Packing {
  const void* x;  // [rows, width]
  Dtype dtype;    // not kDouble
  int64_t rows, width, stride;
  uint16_t* packed;  // ProductKernels::packed_numbers
};

struct Product {
  const uint16_t* packed;  // x
  int64_t rows;
  const void* table;  // [tokens, width], of x's dtype
  Dtype dtype;
  int64_t tokens, width, stride;
  // table @ x.T, [tokens, out_stride], of which columns up to the next multiple of 16 are written; or, if by_row,
  // x @ table.T, [rows, out_stride]. In kFloat, or rounded to x's dtype.
  void* out;
  Dtype out_dtype;
  int64_t out_stride;
  bool by_row;
};

struct WeightedSum {
  const void* values;  // [rows, tokens]
  Dtype values_dtype;  // kFloat or the table's
  int64_t rows, values_stride;
  const void* table;  // [tokens, width]
  Dtype dtype;        // the table's
  int64_t tokens, width, stride;
  // values @ table, [rows, out_stride]. For a table in bfloat16 values are split into two such numbers, not rounded to
  // one.
  float* out;
  int64_t out_stride;
};

// No matrix is empty.
struct ProductKernels {
  int64_t packed_rows, tokens, columns;  // a block is so many rows of x, of the table's rows, of its columns
  int64_t (*packed_numbers)(Dtype dtype, int64_t rows, int64_t width);
  // Blocks [begin, end): of x's rows, of the table's rows, of its columns.
  void (*pack)(const Packing& args, int64_t begin, int64_t end);
  void (*multiply)(const Product& args, int64_t begin, int64_t end);
  // False if an infinity in the arguments made a sum NaN; the caller must take the sums that are not finite again.
  bool (*sum)(const WeightedSum& args, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
extern const ProductKernels kProductsAvx2, kProductsAvx512;
#if defined(__linux__)
extern const ProductKernels kProductsAmx;
#endif
#endif

// Those for this machine; null where torch's own products serve.
inline const ProductKernels* product_kernels(Dtype dtype) {
#if defined(__x86_64__)
  const bool brain = dtype == Dtype::kBFloat16;
#if defined(__linux__)
  if (machine_isa() == Isa::kAmx) return brain || dtype == Dtype::kFloat ? &kProductsAmx : nullptr;
#endif
  if (machine_isa() == Isa::kAvx2 && dtype != Dtype::kDouble) return &kProductsAvx2;
  if (machine_isa() == Isa::kAvx512 && dtype != Dtype::kDouble && (!brain || multiplies_bfloat16()))
    return &kProductsAvx512;
#else
  (void)dtype;
#endif
  return nullptr;
}

}  // namespace gk
