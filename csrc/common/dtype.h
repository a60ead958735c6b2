// Names of the dtypes that kernels take, and numbers for them that cross from host to device.
#pragma once

namespace gk {

enum class Dtype { kFloat, kBFloat16, kHalf, kDouble };

}  // namespace gk
