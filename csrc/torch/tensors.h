// New tensors: PyTorch's functions without its headers, which take longer to compile than the rest.
#pragma once

#include <ATen/core/Tensor.h>

namespace mblm::make {

at::Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& tensor);
at::Tensor zeros(at::IntArrayRef shape, const at::TensorOptions& options);
at::Tensor full(at::IntArrayRef shape, int64_t value, const at::TensorOptions& options);
// Zeros before and after the values of the last dimensions: see torch.nn.functional.pad.
at::Tensor padded(const at::Tensor& tensor, at::IntArrayRef pad);

}  // namespace mblm::make
