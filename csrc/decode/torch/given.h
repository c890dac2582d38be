// Tensors that calls are given, checked, and that they give.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <vector>

#include "cpu/ids.h"
#include "torch/common.h"

namespace mblm::decode {

// The same values in a contiguous tensor, which must be on the CPU.
inline at::Tensor check_given(const char* name, const at::Tensor& tensor, at::ScalarType type) {
  check_type(name, tensor, type);
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.layout() == at::kStrided, name,
                    " must be a dense tensor on the CPU");
  return (tensor.is_neg() ? tensor.resolve_neg() : tensor).contiguous();
}

inline at::Tensor check_given(const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                              at::ScalarType type) {
  check_shape(name, tensor, shape);
  return check_given(name, tensor, type);
}

// A new tensor that is the caller's own, in inference mode, too.
inline at::Tensor own_tensor(at::IntArrayRef shape, at::ScalarType type) {
  const c10::InferenceMode guard(false);
  return make::empty(shape, type);
}

using Ids = std::vector<int64_t>;

inline at::Tensor tensor_of(const Ids& ids) {
  at::Tensor tensor = own_tensor({int64_t(ids.size())}, at::kLong);
  std::copy(ids.begin(), ids.end(), tensor.mutable_data_ptr<int64_t>());
  return tensor;
}

// Token ids (n), each in the vocabulary, where nobody else can write to them meanwhile.
inline Ids own_ids(const char* name, const at::Tensor& ids, int64_t num_tokens) {
  TORCH_CHECK_VALUE(ids.dim() == 1, name, " must be of one dimension, got ", ids.sizes());
  const at::Tensor given = check_given(name, ids, at::kLong);
  const int64_t* data = given.const_data_ptr<int64_t>();
  Ids own(data, data + given.numel());
  const int64_t outside = cpu::first_id_outside(own.data(), int64_t(own.size()), num_tokens);
  TORCH_CHECK_VALUE(outside < 0, name, " must lie in [0, ", num_tokens, "), got ",
                    own[std::max<int64_t>(outside, 0)], " at index ", outside);
  return own;
}

}  // namespace mblm::decode
