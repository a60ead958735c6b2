// Names of the dtypes that kernels take, and numbers for them that cross from host to device.
#pragma once

namespace gk {

enum class Dtype { kFloat, kBFloat16, kHalf, kDouble };

constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

}  // namespace gk
