// Checks of tensors that calls are given.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "cpu/ids.h"
#include "torch/common.h"

namespace mblm::decode {

// Of one dimension and on the CPU, each in the vocabulary.
inline void check_ids(const char* name, const at::Tensor& ids, int64_t num_tokens) {
  check_type(name, ids, at::kLong);
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.device().is_cpu(), name,
                    " must be of one dimension and on the CPU, got ", ids.sizes());
  const at::Tensor contiguous = ids.contiguous();
  const int64_t* data = contiguous.const_data_ptr<int64_t>();
  const int64_t outside = cpu::first_id_outside(data, ids.numel(), num_tokens);
  TORCH_CHECK_VALUE(outside < 0, name, " must lie in [0, ", num_tokens, "), got ",
                    data[std::max<int64_t>(outside, 0)], " at index ", outside);
}

// A contiguous tensor of that shape and type on the CPU.
inline at::Tensor check_given(const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                              at::ScalarType type) {
  check_shape(name, tensor, shape);
  check_type(name, tensor, type);
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU");
  return tensor.contiguous();
}

}  // namespace mblm::decode
