// Names of the dtypes that kernels take, and numbers for them that cross from host to device.
#pragma once

namespace gk {

enum class Dtype { kFloat, kBFloat16, kHalf, kDouble };

// call.template operator()<kDtype>() with a dtype of at most 32 bits as a constant. Float64 has kernels of its own,
// which are no templates.
template <typename Call>
[[gnu::always_inline]] inline auto with_dtype(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::kFloat: return call.template operator()<Dtype::kFloat>();
    case Dtype::kBFloat16: return call.template operator()<Dtype::kBFloat16>();
    default: return call.template operator()<Dtype::kHalf>();
  }
}

}  // namespace gk
