// What kernels need to know about torch's tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>

#include "common/dtype.h"

namespace gk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool has_dtype(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::Double: return Dtype::kDouble;
    default: STD_TORCH_CHECK(false, "grade_kernels: dtype must be float32, float64, bfloat16 or float16");
  }
}

inline size_t element_size(const Tensor& x) {
  const Dtype dtype = dtype_of(x);
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// Null for an empty tensor, which stands for an argument that is not used. An error for numbers of another dtype, which
// hooks for saved tensors may make of ours; records of several numbers lie in tensors of any.
template <typename Real>
const Real* data(const Tensor& x) {
  if (x.numel() == 0) return nullptr;
  if constexpr (std::is_arithmetic_v<Real>) return x.const_data_ptr<Real>();
  else return static_cast<const Real*>(x.const_data_ptr());
}
template <typename Real>
Real* mutable_data(const Tensor& x) {
  if (x.numel() == 0) return nullptr;
  if constexpr (std::is_arithmetic_v<Real>) return x.mutable_data_ptr<Real>();
  else return static_cast<Real*>(x.mutable_data_ptr());
}
template <typename Real>
const Real* data(const std::optional<Tensor>& x) {
  return x ? data<Real>(*x) : nullptr;
}

}  // namespace gk
