// Glue of causal_conv: checks, allocation, calls of the kernels.
#pragma once

#include "common.h"
#include "cpu/causal_conv.h"
#include "cuda/causal_conv.h"

namespace mblm {
namespace {

c10::Device check(const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const OptionalTensor& window) {
  check_floating("x", x);
  check_floating("weight", weight);
  TORCH_CHECK_VALUE(x.dim() == 3, "x must have shape [B, L, D], got ", x.sizes());
  const int64_t rows = x.size(0), channels = x.size(2);
  TORCH_CHECK_VALUE(
      weight.dim() == 3 && weight.size(0) == channels && weight.size(1) == 1 && weight.size(2) >= 1,
      "weight must have shape [", channels, ", 1, K] with K >= 1, got ", weight.sizes());
  TORCH_CHECK_VALUE(!on_gpu(x) || weight.size(2) <= cuda::kConvMaxTaps, "weight must have at most ",
                    cuda::kConvMaxTaps, " taps on a GPU, got ", weight.size(2));
  check_device("weight", weight, "x", x);
  check_like("bias", bias, {channels}, "weight", weight);
  if (window) check_like("window", *window, {rows, weight.size(2) - 1, channels}, "x", x);
  return x.device();
}

// The tensors as the kernels want them.
struct ConvInputs {
  const c10::DeviceGuard device;
  at::ScalarType type;
  int64_t rows, length, channels, taps;
  Tensor x, weight_bias;
  OptionalTensor window;

  ConvInputs(const Tensor& x_, const Tensor& weight, const Tensor& bias,
             const OptionalTensor& window_)
      : device(check(x_, weight, bias, window_)),
        type(kernel_type(x_.scalar_type())),
        rows(x_.size(0)),
        length(x_.size(1)),
        channels(x_.size(2)),
        taps(weight.size(2)),
        x(with_unit_stride(x_.to(type))),
        weight_bias(make::empty({taps + 1, channels}, x_.options().dtype(compute_type(type)))) {
    weight_bias.narrow(0, 0, taps).copy_(weight.squeeze(1).t());
    weight_bias[taps].copy_(bias);
    if (window_) window = window_->to(type).contiguous();
  }

  template <class T>
  cpu::CausalConvInput<T> kernel_input() const {
    return {rows,        length,          channels,
            taps,        data<T>(x),      x.stride(0),
            x.stride(1), data<T>(window), data<cpu::compute_t<T>>(weight_bias)};
  }
};

// The last inputs, of x and where it is short of the window before it.
Tensor next_window(const Tensor& x, const OptionalTensor& window, int64_t positions) {
  Tensor next = make::zeros({x.size(0), positions, x.size(2)}, x.options());
  const int64_t from_x = std::min(positions, x.size(1));
  next.narrow(1, positions - from_x, from_x).copy_(x.narrow(1, x.size(1) - from_x, from_x));
  const int64_t kept = positions - from_x;
  if (window) next.narrow(1, 0, kept).copy_(window->narrow(1, from_x, kept));
  return next;
}

}  // namespace

std::tuple<Tensor, Tensor> causal_conv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                       const OptionalTensor& window) {
  const ConvInputs in(x, weight, bias, window);
  Tensor y = make::empty(x.sizes(), in.x.options());
  dispatch(in.type, [&]<class T>(T, auto) {
    const auto input = in.kernel_input<T>();
    T* to = mutable_data<T>(y);
    run(
        x, [&](auto stream) { return cuda::causal_conv(input, to, stream); },
        in.rows * input.blocks() * input.tiles(),
        std::min(in.length, cpu::kConvPositions) * cpu::kConvTile * in.taps,
        [&](int64_t begin, int64_t end) { cpu::causal_conv(input, to, begin, end); });
  });
  return {y.to(x.scalar_type()), next_window(x, window, in.taps - 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv_backward(
    const Tensor& grad_y, const OptionalTensor& grad_next_window, const Tensor& x,
    const Tensor& weight, const Tensor& bias, const OptionalTensor& window) {
  const ConvInputs in(x, weight, bias, window);
  check_like("grad_y", grad_y, x.sizes(), "x", x);
  const Tensor from_y = grad_y.to(in.type).contiguous();
  OptionalTensor from_window;
  if (grad_next_window) {
    check_like("grad_next_window", *grad_next_window, {in.rows, in.taps - 1, in.channels}, "x", x);
    from_window = grad_next_window->to(in.type).contiguous();
  }

  Tensor grad_x = make::empty(x.sizes(), in.x.options());
  Tensor grad_window = make::empty({in.rows, in.taps - 1, in.channels}, in.x.options());
  Tensor sums;
  dispatch(in.type, [&]<class T, class C>(T, C) {
    const auto input = in.kernel_input<T>();
    // The gradients of weight and bias are summed over groups of blocks, then over the groups, so
    // that they are the same for any number of threads.
    constexpr int64_t kGroups = 32;
    const int64_t blocks = in.rows * input.blocks(), tiles = input.tiles();
    const int64_t each = divide_up(blocks, kGroups);
    int64_t groups = each > 0 ? divide_up(blocks, each) : 0;
    if constexpr (kCuda) {
      if (on_gpu(x)) groups = cuda::causal_conv_parts(input);
    }
    Tensor parts = make::empty({groups, in.taps + 1, in.channels}, in.weight_bias.options());
    const cpu::CausalConvGradients<T> first{data<T>(from_y), data<T>(from_window),
                                            mutable_data<T>(grad_x), mutable_data<T>(grad_window),
                                            mutable_data<C>(parts)};
    run(
        x, [&](auto stream) { return cuda::causal_conv_backward(input, first, stream); },
        groups * tiles, each * std::min(in.length, cpu::kConvPositions) * cpu::kConvTile * in.taps,
        [&](int64_t begin, int64_t end) {
          for (int64_t item = begin; item < end; ++item) {
            const int64_t group = item / tiles;
            auto grad = first;
            grad.weight_bias += group * parts.stride(0);
            cpu::causal_conv_backward(input, grad, item % tiles, group * each,
                                      std::min((group + 1) * each, blocks));
          }
        });
    sums = parts.sum(0);  // (K + 1, D)
  });
  const Tensor grad_weight = sums.narrow(0, 0, in.taps).t().unsqueeze(1);
  return {grad_x.to(x.scalar_type()), grad_weight.to(weight.scalar_type()).contiguous(),
          sums[in.taps].to(bias.scalar_type(), /*non_blocking=*/false, /*copy=*/true),
          window ? grad_window.to(x.scalar_type()) : make::empty({0}, x.options())};
}

}  // namespace mblm
