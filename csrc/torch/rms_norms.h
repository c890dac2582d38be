// Glue of gated_rms_norm and shift_rms_norm: checks, allocation, calls of the kernels.
#pragma once

#include "common.h"
#include "cpu/rms_norms.h"
#include "cpu/sum_rows.h"
#include "cuda/rms_norms.h"

namespace mblm {
namespace {

void check_weight(const Tensor& x, const Tensor& weight, double eps) {
  check_floating("x", x);
  check_floating("weight", weight);
  check_shape("weight", weight, {x.size(-1)});
  check_device("weight", weight, "x", x);
  TORCH_CHECK_VALUE(eps > 0, "eps must be positive, got ", eps);
}

// What both norms have: a norm's inputs are the tensors as its kernels want them, in their dtype.
struct NormInputs {
  const c10::DeviceGuard device;
  at::ScalarType out_type, type;
  int64_t width, positions;
  double eps;
  Tensor weight;
  Tensor x;
  OptionalTensor other;  // the gate, or what is shifted in

  NormInputs(const c10::Device& device, const Tensor& x, const Tensor& weight, double eps,
             at::ScalarType out_type)
      : device(device),
        out_type(out_type),
        type(kernel_type(c10::promoteTypes(x.scalar_type(), weight.scalar_type()))),
        width(x.size(-1)),
        positions(x.numel() / width),
        eps(eps),
        weight(weight.to(compute_type(type)).contiguous()) {}

  Tensor as(const Tensor& tensor, at::IntArrayRef shape) const {
    return with_unit_stride(tensor.to(type).reshape(shape));
  }
};

struct Gated : NormInputs {
  Gated(const Tensor& x_, const Tensor& weight_, const OptionalTensor& gate, double eps)
      : NormInputs(check(x_, weight_, gate, eps), x_, weight_, eps, weight_.scalar_type()) {
    x = as(x_, {positions, width});
    if (gate) other = as(*gate, {positions, width});
  }

  static c10::Device check(const Tensor& x, const Tensor& weight, const OptionalTensor& gate,
                           double eps) {
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1,
                      "x must have shape [..., D] with D >= 1, got ", x.sizes());
    check_weight(x, weight, eps);
    if (gate) check_like("gate", *gate, x.sizes(), "x", x);
    return x.device();
  }

  template <class T>
  cpu::GatedRmsNormInput<T> kernel_input() const {
    return {width,
            data<T>(x),
            x.stride(0),
            data<T>(other),
            other ? other->stride(0) : 0,
            data<cpu::compute_t<T>>(weight),
            eps};
  }
};

struct Shifted : NormInputs {
  int64_t length;
  bool shift;

  Shifted(const Tensor& x_, const Tensor& weight_, const OptionalTensor& previous, bool shift,
          double eps)
      : NormInputs(check(x_, weight_, previous, shift, eps), x_, weight_, eps,
                   c10::promoteTypes(x_.scalar_type(), weight_.scalar_type())),
        length(x_.size(-2)),
        shift(shift) {
    const int64_t rows = c10::multiply_integers(x_.sizes().slice(0, x_.dim() - 2));
    x = as(x_, {rows, length, width});
    if (previous) other = as(*previous, {rows, width / 2});
  }

  static c10::Device check(const Tensor& x, const Tensor& weight, const OptionalTensor& previous,
                           bool shift, double eps) {
    TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-1) >= 1,
                      "x must have shape [..., S, D] with D >= 1, got ", x.sizes());
    check_weight(x, weight, eps);
    TORCH_CHECK_VALUE(shift || !previous, "previous must be None where shift is False");
    auto shape = x.sizes().slice(0, x.dim() - 2).vec();
    shape.push_back(x.size(-1) / 2);
    if (previous) check_like("previous", *previous, shape, "x", x);
    return x.device();
  }

  template <class T>
  cpu::ShiftRmsNormInput<T> kernel_input() const {
    return {length,         width,
            data<T>(x),     x.stride(0),
            x.stride(1),    data<cpu::compute_t<T>>(weight),
            data<T>(other), other ? other->stride(0) : 0,
            shift,          eps};
  }
};

// The norm, and the inverse of what each position was divided by.
template <class Norm>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Norm& in) {
  Tensor out = make::empty(x.sizes(), in.x.options());
  Tensor inverse_norm = make::empty(x.sizes().slice(0, x.dim() - 1), in.weight.options());
  dispatch(in.type, [&]<class T, class C>(T, C) {
    const auto input = in.template kernel_input<T>();
    T* to = mutable_data<T>(out);
    auto* inverse = mutable_data<C>(inverse_norm);
    run(
        x, [&](auto stream) { return cuda::rms_norm(input, in.positions, to, inverse, stream); },
        in.positions, in.width,
        [&](int64_t begin, int64_t end) { cpu::rms_norm(input, to, inverse, begin, end); });
  });
  return {out.to(in.out_type), inverse_norm};
}

// The gradients of x, the weight and the other tensor, which is empty if there is none.
template <class Norm>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                            const Tensor& weight, const OptionalTensor& other,
                                            const Tensor& inverse_norm, const Norm& in) {
  check_tensor("grad", grad, x.sizes(), in.out_type, "x", x);
  check_tensor("inverse_norm", inverse_norm, x.sizes().slice(0, x.dim() - 1), compute_type(in.type),
               "x", x);
  const Tensor grad_in = grad.to(in.type).contiguous(), inverse_in = inverse_norm.contiguous();
  Tensor grad_x = make::empty(x.sizes(), in.x.options());
  Tensor grad_other = make::zeros({0}, in.x.options());
  if (other) grad_other = make::empty(other->sizes(), in.x.options());
  if (in.positions == 0) grad_other.zero_();
  Tensor grad_weight = make::empty({in.width}, in.weight.options());
  dispatch(in.type, [&]<class T, class C>(T, C) {
    const auto input = in.template kernel_input<T>();
    const T* from = data<T>(grad_in);
    const C* inverse = data<C>(inverse_in);
    T* to_x = mutable_data<T>(grad_x);
    T* to_other = other ? mutable_data<T>(grad_other) : nullptr;
    // The weight's gradient is summed over blocks of positions, then over the blocks, so that it is
    // the same for any number of threads.
    constexpr int64_t kBlock = 64;
    int64_t blocks = divide_up(in.positions, kBlock);
    if constexpr (kCuda) {
      if (on_gpu(x)) blocks = cuda::rms_norm_parts(in.positions);
    }
    Tensor partial = make::empty({blocks, in.width}, in.weight.options());
    C* sums = mutable_data<C>(partial);
    run(
        x,
        [&](auto stream) {
          return cuda::rms_norm_backward(input, in.positions, from, inverse, to_x, to_other, sums,
                                         stream);
        },
        blocks, kBlock * in.width,
        [&](int64_t begin, int64_t end) {
          for (int64_t block = begin; block < end; ++block) {
            cpu::rms_norm_backward(input, from, inverse, to_x, to_other, sums + block * in.width,
                                   block * kBlock, std::min((block + 1) * kBlock, in.positions));
          }
        });
    if (on_gpu(x)) {
      grad_weight = partial.sum(0);
      return;
    }
    C* to_weight = mutable_data<C>(grad_weight);
    parallel_columns(in.width, blocks, [&](int64_t begin, int64_t end) {
      cpu::sum_rows<C>(sums, blocks, in.width, to_weight, begin, end);
    });
  });
  return {grad_x.to(x.scalar_type()), grad_weight.to(weight.scalar_type()),
          grad_other.to(x.scalar_type())};
}

}  // namespace

std::tuple<Tensor, Tensor> gated_rms_norm(const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& gate, double eps) {
  return forward(x, Gated(x, weight, gate, eps));
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward(const Tensor& grad, const Tensor& x,
                                                           const Tensor& weight,
                                                           const OptionalTensor& gate,
                                                           const Tensor& inverse_norm, double eps) {
  return backward(grad, x, weight, gate, inverse_norm, Gated(x, weight, gate, eps));
}

std::tuple<Tensor, Tensor> shift_rms_norm(const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& previous, bool shift, double eps) {
  return forward(x, Shifted(x, weight, previous, shift, eps));
}

std::tuple<Tensor, Tensor, Tensor> shift_rms_norm_backward(const Tensor& grad, const Tensor& x,
                                                           const Tensor& weight,
                                                           const OptionalTensor& previous,
                                                           const Tensor& inverse_norm, bool shift,
                                                           double eps) {
  return backward(grad, x, weight, previous, inverse_norm,
                  Shifted(x, weight, previous, shift, eps));
}

}  // namespace mblm
