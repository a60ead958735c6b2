// From torch's tensors to what the kernels take.
#pragma once

#include "common/tensors.h"
#include "cpu/rows.h"

namespace gk {

inline Noise noise_of(const Tensor& seed, const std::optional<Tensor>& row_ids, int64_t vocab_start) {
  return {uint64_t(*seed.const_data_ptr<int64_t>()), data<int64_t>(row_ids), vocab_start};
}

}  // namespace gk
