// Glue of linear_rows: checks, allocation, calls of the kernels.
#include "cpu/linear_rows.h"

#include "common.h"
#include "linear.h"
#include "operators.h"

namespace mblm {
Tensor linear_rows(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_linear(x, weight, bias);
  const at::ScalarType type = kernel_type(x.scalar_type());
  const Tensor rows = x.to(type).contiguous(), matrix = weight.to(type).contiguous();
  std::optional<Tensor> offset;
  if (bias) offset = bias->to(type).contiguous();
  Tensor out = make::empty({x.size(0), weight.size(0)}, rows.options());
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const cpu::LinearRowsInput<T> input{x.size(0),     x.size(1),       weight.size(0),
                                        data<T>(rows), data<T>(matrix), data<T>(offset)};
    T* to = mutable_data<T>(out);
    parallel(weight.size(0), x.size(1),
             [&](int64_t begin, int64_t end) { cpu::linear_rows(input, to, begin, end); });
  });
  return out.to(x.scalar_type());
}

}  // namespace mblm
