// Glue of short_attention: checks, allocation, calls of the kernels.
#pragma once

#include "common.h"
#include "cpu/short_attention.h"
#include "cuda/short_attention.h"

namespace mblm {
namespace {

constexpr int64_t kMaxPositions = 64;

c10::Device check(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cos,
                  const OptionalTensor& sin) {
  check_floating("q", q);
  TORCH_CHECK_VALUE(q.dim() == 4, "q must have shape [B, S, H, d], got ", q.sizes());
  const int64_t count = q.size(1), width = q.size(3);
  TORCH_CHECK_VALUE(k.dim() == 4 && count <= k.size(1) && k.size(1) <= kMaxPositions,
                    "k must have shape [B, T, H, d] with ", count, " <= T <= ", kMaxPositions,
                    ", got ", k.sizes());
  const int64_t total = k.size(1);
  check_like("k", k, {q.size(0), total, q.size(2), width}, "q", q);
  check_like("v", v, k.sizes(), "q", q);
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(),
                    "cos and sin must be given both or not at all");
  if (!cos) return q.device();
  TORCH_CHECK_VALUE(width % 2 == 0, "q must have an even width d for rotary positions, got ",
                    width);
  check_tensor("cos", *cos, {total, width / 2}, at::kFloat, "q", q);
  check_tensor("sin", *sin, {total, width / 2}, at::kFloat, "q", q);
  return q.device();
}

// The tensors as the kernels want them.
struct AttentionInputs {
  const c10::DeviceGuard device;
  at::ScalarType type;
  Tensor q, k, v;
  OptionalTensor cos, sin;

  AttentionInputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& cos_,
                  const OptionalTensor& sin_)
      : device(check(q_, k_, v_, cos_, sin_)),
        type(kernel_type(q_.scalar_type())),
        q(with_unit_stride(q_.to(type))),
        k(with_unit_stride(k_.to(type))),
        v(with_unit_stride(v_.to(type))) {
    if (cos_) cos = cos_->contiguous();
    if (sin_) sin = sin_->contiguous();
  }

  template <class T>
  static cpu::HeadsView<T> view(const Tensor& tensor) {
    return {data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }

  template <class T>
  cpu::ShortAttentionInput<T> kernel_input() const {
    return {q.size(2),  q.size(3),  q.size(1),        k.size(1),       view<T>(q),
            view<T>(k), view<T>(v), data<float>(cos), data<float>(sin)};
  }

  int64_t items() const { return q.size(0) * q.size(2); }
  int64_t values_per_item() const {
    return q.size(1) * k.size(1) * std::max<int64_t>(q.size(3), 1);
  }
};

}  // namespace

Tensor short_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cos,
                       const OptionalTensor& sin) {
  const AttentionInputs in(q, k, v, cos, sin);
  Tensor out = make::empty(q.sizes(), in.q.options());
  dispatch(in.type, [&]<class T>(T, auto) {
    const auto input = in.kernel_input<T>();
    T* to = mutable_data<T>(out);
    run(
        q, [&](auto stream) { return cuda::short_attention(input, in.items(), to, stream); },
        in.items(), in.values_per_item(),
        [&](int64_t begin, int64_t end) { cpu::short_attention(input, to, begin, end); });
  });
  return out.to(q.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> short_attention_backward(const Tensor& grad, const Tensor& q,
                                                            const Tensor& k, const Tensor& v,
                                                            const OptionalTensor& cos,
                                                            const OptionalTensor& sin) {
  const AttentionInputs in(q, k, v, cos, sin);
  check_like("grad", grad, q.sizes(), "q", q);
  const Tensor grad_out = with_unit_stride(grad.to(in.type));
  Tensor grad_q = make::empty(q.sizes(), in.q.options());
  Tensor grad_k = make::empty(k.sizes(), in.q.options());
  Tensor grad_v = make::empty(v.sizes(), in.q.options());
  dispatch(in.type, [&]<class T>(T, auto) {
    const auto input = in.kernel_input<T>();
    const auto from = AttentionInputs::view<T>(grad_out);
    T *to_q = mutable_data<T>(grad_q), *to_k = mutable_data<T>(grad_k),
      *to_v = mutable_data<T>(grad_v);
    run(
        q,
        [&](auto stream) {
          return cuda::short_attention_backward(input, in.items(), from, to_q, to_k, to_v, stream);
        },
        in.items(), in.values_per_item(),
        [&](int64_t begin, int64_t end) {
          cpu::short_attention_backward(input, from, to_q, to_k, to_v, begin, end);
        });
  });
  return {grad_q.to(q.scalar_type()), grad_k.to(q.scalar_type()), grad_v.to(q.scalar_type())};
}

}  // namespace mblm
