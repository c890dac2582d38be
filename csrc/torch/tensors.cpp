// See tensors.h.
#include "tensors.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

namespace mblm::make {

at::Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options) {
  return at::empty(shape, options);
}

at::Tensor empty_like(const at::Tensor& tensor) {
  return at::empty_like(tensor);
}

at::Tensor zeros(at::IntArrayRef shape, const at::TensorOptions& options) {
  return at::zeros(shape, options);
}

at::Tensor full(at::IntArrayRef shape, int64_t value, const at::TensorOptions& options) {
  return at::full(shape, value, options);
}

at::Tensor padded(const at::Tensor& tensor, at::IntArrayRef pad) {
  return at::constant_pad_nd(tensor, pad);
}

}  // namespace mblm::make
