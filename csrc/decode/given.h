// Checks of tensors that calls are given.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "cpu/ids.h"
#include "torch/common.h"

namespace mblm::decode {

// The same values in a contiguous tensor, which must be on the CPU.
inline at::Tensor check_given(const char* name, const at::Tensor& tensor, at::ScalarType type) {
  check_type(name, tensor, type);
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.layout() == at::kStrided, name,
                    " must be a dense tensor on the CPU");
  return tensor.resolve_neg().contiguous();
}

inline at::Tensor check_given(const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                              at::ScalarType type) {
  check_shape(name, tensor, shape);
  return check_given(name, tensor, type);
}

// Token ids (n), each in the vocabulary, in a tensor that nobody else can write to meanwhile.
inline at::Tensor own_ids(const char* name, const at::Tensor& ids, int64_t num_tokens) {
  TORCH_CHECK_VALUE(ids.dim() == 1, name, " must be of one dimension, got ", ids.sizes());
  const c10::InferenceMode guard(false);
  const at::Tensor own = check_given(name, ids, at::kLong).clone();
  const int64_t* data = own.const_data_ptr<int64_t>();
  const int64_t outside = cpu::first_id_outside(data, own.numel(), num_tokens);
  TORCH_CHECK_VALUE(outside < 0, name, " must lie in [0, ", num_tokens, "), got ",
                    data[std::max<int64_t>(outside, 0)], " at index ", outside);
  return own;
}

}  // namespace mblm::decode
