// Glue of linear: few rows on a CPU by a kernel, large float32 products there by oneDNN, all others
// as PyTorch has them.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>

#include <string_view>

#include "common.h"
#include "cpu/linear_rows.h"
#include "cpu/transpose.h"

namespace mblm {
namespace {

using Scalars = c10::List<std::optional<at::Scalar>>;
using OneDnnLinear = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
                            Scalars, std::optional<std::string_view>);

// x @ weight.T + bias by oneDNN, as PyTorch's compiler calls it; empty in a PyTorch without.
const std::optional<c10::TypedOperatorHandle<OneDnnLinear>>& onednn_linear() {
  static const auto handle = []() -> std::optional<c10::TypedOperatorHandle<OneDnnLinear>> {
    const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!found || !found->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
    try {
      return found->typed<OneDnnLinear>();
    } catch (const c10::Error&) {  // another PyTorch's, with other arguments
      return std::nullopt;
    }
  }();
  return handle;
}

// A matrix that is contiguous. A transposed one is copied by several threads, which
// PyTorch does by one.
Tensor contiguous(const Tensor& matrix) {
  if (matrix.is_contiguous() || matrix.stride(0) != 1) return matrix.contiguous();
  const cpu::TransposeInput input{matrix.size(1), matrix.size(0), data<float>(matrix),
                                  matrix.stride(1)};
  Tensor out = make::empty(matrix.sizes(), matrix.options());
  float* to = mutable_data<float>(out);
  parallel(input.blocks(), cpu::kTransposeColumns * input.rows,
           [&](int64_t begin, int64_t end) { cpu::transpose_matrix(input, to, begin, end); });
  return out;
}

// A matrix that is contiguous or the transpose of one: with gaps between its rows or columns,
// oneDNN takes a loop that is a thousand times slower.
Tensor without_gaps(const Tensor& matrix) {
  return matrix.stride(0) == 1 ? matrix.t().contiguous().t() : matrix.contiguous();
}

void check(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_floating("x", x);
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have two dimensions, got ", x.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have two dimensions, got ", weight.sizes());
  check_like("weight", weight, {weight.size(0), x.size(1)}, "x", x);
  if (bias) check_like("bias", *bias, {weight.size(0)}, "x", x);
}

Tensor linear_rows(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor rows = x.contiguous();
  Tensor out = make::empty({x.size(0), weight.size(0)}, rows.options());
  dispatch(x.scalar_type(), [&]<class T>(T, auto) {
    const cpu::LinearRowsInput<T> input{x.size(0),     x.size(1),       weight.size(0),
                                        data<T>(rows), data<T>(weight), data<T>(bias)};
    T* to = mutable_data<T>(out);
    parallel(weight.size(0), x.size(1),
             [&](int64_t begin, int64_t end) { cpu::linear_rows(input, to, begin, end); });
  });
  return out;
}

}  // namespace

// Whether MKL, PyTorch's choice, leaves half of this machine unused: it computes with 64 bytes at
// once on Intel's processors alone.
bool onednn_is_faster() {
#if defined(__x86_64__) && defined(__GNUC__)
  return at::hasMKL() && onednn_linear() && __builtin_cpu_supports("avx512f") &&
         !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check(x, weight, bias);
  const bool is_empty = x.numel() == 0 || weight.numel() == 0;
  if (!x.is_cpu() || is_empty || x.scalar_type() == at::kHalf) return at::linear(x, weight, bias);
  OptionalTensor offset;
  if (bias) offset = bias->contiguous();
  constexpr int64_t kFewRows = 8;  // mblm.ops.linear's MAX_ROWS
  if (x.size(0) <= kFewRows && weight.is_contiguous()) return linear_rows(x, weight, offset);
  if (x.scalar_type() != at::kFloat || !onednn_linear()) return at::linear(x, weight, bias);
  return onednn_linear()->call(contiguous(x), without_gaps(weight), offset, "none", Scalars(), "");
}

}  // namespace mblm
