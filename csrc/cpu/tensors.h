// From torch's tensors to what the kernels take.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/rows.h"

namespace gk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::Double:
      return Dtype::kDouble;
    default:
      STD_TORCH_CHECK(false, "grade_kernels: dtype not supported by the cpu backend");
  }
}

inline size_t element_size(const Tensor& x) {
  const Dtype dtype = dtype_of(x);
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// Null for an empty tensor, which stands for an argument that is not used.
template <typename Real>
const Real* data(const Tensor& x) {
  return x.numel() ? static_cast<const Real*>(x.const_data_ptr()) : nullptr;
}
template <typename Real>
Real* mutable_data(const Tensor& x) {
  return x.numel() ? static_cast<Real*>(x.mutable_data_ptr()) : nullptr;
}
template <typename Real>
const Real* data(const std::optional<Tensor>& x) {
  return x ? data<Real>(*x) : nullptr;
}

inline Noise noise_of(const Tensor& seed, const std::optional<Tensor>& row_ids, int64_t vocab_start) {
  return {uint64_t(*seed.const_data_ptr<int64_t>()), data<int64_t>(row_ids), vocab_start};
}

}  // namespace gk
