// What the operators linear and linear_rows refuse.
#pragma once

#include "common.h"

namespace mblm {

inline void check_linear(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  check_floating("x", x);
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have two dimensions, got ", x.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have two dimensions, got ", weight.sizes());
  check_like("weight", weight, {weight.size(0), x.size(1)}, "x", x);
  if (bias) check_like("bias", *bias, {weight.size(0)}, "x", x);
}

}  // namespace mblm
