// Glue of gated_rms_norm: checks, allocation, calls of the kernels.
#include "cpu/gated_rms_norm.h"

#include "common.h"
#include "cpu/sum_rows.h"
#include "cuda/gated_rms_norm.h"
#include "operators.h"

namespace mblm {
namespace {

void check(const Tensor& x, const Tensor& weight, const OptionalTensor& gate, double eps) {
  check_floating("x", x);
  check_floating("weight", weight);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, "x must have shape [..., D] with D >= 1, got ",
                    x.sizes());
  check_shape("weight", weight, {x.size(-1)});
  check_device("weight", weight, "x", x);
  TORCH_CHECK_VALUE(eps > 0, "eps must be positive, got ", eps);
  if (gate) {
    check_shape("gate", *gate, x.sizes());
    check_like("gate", *gate, "x", x);
  }
}

// The tensors as the kernel wants them: in its dtype, leading dimensions in one.
struct Inputs {
  at::ScalarType type;
  int64_t width, positions;
  double eps;
  Tensor x, weight;
  OptionalTensor gate;

  Inputs(const Tensor& x_, const Tensor& weight_, const OptionalTensor& gate_, double eps)
      : type(kernel_type(c10::promoteTypes(x_.scalar_type(), weight_.scalar_type()))),
        width(x_.size(-1)),
        positions(x_.numel() / width),
        eps(eps),
        x(flat(x_)),
        weight(weight_.to(compute_type(type)).contiguous()) {
    if (gate_) gate = flat(*gate_);
  }

  Tensor flat(const Tensor& tensor) const {
    return with_unit_stride(tensor.to(type).reshape({positions, width}));
  }

  template <class T>
  cpu::GatedRmsNormInput<T> kernel_input() const {
    return {width,
            data<T>(x),
            x.stride(0),
            data<T>(gate),
            gate ? gate->stride(0) : 0,
            data<cpu::compute_t<T>>(weight),
            eps};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> gated_rms_norm(const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& gate, double eps) {
  check(x, weight, gate, eps);
  const c10::DeviceGuard device(x.device());
  const Inputs in(x, weight, gate, eps);
  Tensor out = make::empty(x.sizes(), x.options().dtype(in.type));
  Tensor inverse_norm =
      make::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(compute_type(in.type)));
  dispatch(in.type, [&](auto zero) {
    using T = decltype(zero);
    const auto input = in.kernel_input<T>();
    T* to = mutable_data<T>(out);
    auto* inverse = mutable_data<cpu::compute_t<T>>(inverse_norm);
    if constexpr (kCuda) {
      if (on_gpu(x)) {
        return launch(x.device(), [&](cuda::Stream stream) {
          return cuda::gated_rms_norm(input, in.positions, to, inverse, stream);
        });
      }
    }
    parallel(in.positions, in.width, [&](int64_t begin, int64_t end) {
      cpu::gated_rms_norm(input, to, inverse, begin, end);
    });
  });
  return {out.to(weight.scalar_type()), inverse_norm};
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward(const Tensor& grad, const Tensor& x,
                                                           const Tensor& weight,
                                                           const OptionalTensor& gate,
                                                           const Tensor& inverse_norm, double eps) {
  check(x, weight, gate, eps);
  const c10::DeviceGuard device(x.device());
  const Inputs in(x, weight, gate, eps);
  check_shape("grad", grad, x.sizes());
  check_like("grad", grad, "weight", weight);
  check_shape("inverse_norm", inverse_norm, x.sizes().slice(0, x.dim() - 1));
  check_type("inverse_norm", inverse_norm, compute_type(in.type));
  check_device("inverse_norm", inverse_norm, "x", x);

  const Tensor grad_in = grad.to(in.type).contiguous(), inverse_in = inverse_norm.contiguous();
  Tensor grad_x = make::empty(x.sizes(), x.options().dtype(in.type));
  Tensor grad_gate =
      gate ? make::empty(x.sizes(), grad_x.options()) : make::empty({0}, grad_x.options());
  Tensor grad_weight = make::empty({in.width}, in.weight.options());
  dispatch(in.type, [&](auto zero) {
    using T = decltype(zero);
    using C = cpu::compute_t<T>;
    const auto input = in.kernel_input<T>();
    T* to_x = mutable_data<T>(grad_x);
    T* to_gate = gate ? mutable_data<T>(grad_gate) : nullptr;
    if constexpr (kCuda) {
      if (on_gpu(x)) {
        Tensor parts =
            make::empty({cuda::gated_rms_norm_parts(in.positions), in.width}, in.weight.options());
        launch(x.device(), [&](cuda::Stream stream) {
          return cuda::gated_rms_norm_backward(input, in.positions, data<T>(grad_in),
                                               data<C>(inverse_in), to_x, to_gate,
                                               mutable_data<C>(parts), stream);
        });
        grad_weight = parts.sum(0);
        return;
      }
    }
    // The weight's gradient is summed over blocks of positions, then over the blocks, so that it is
    // the same for any number of threads.
    constexpr int64_t kBlock = 64;
    const int64_t blocks = (in.positions + kBlock - 1) / kBlock;
    Tensor partial = make::empty({blocks, in.width}, in.weight.options());
    C* sums = mutable_data<C>(partial);
    parallel(blocks, kBlock * in.width, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        cpu::gated_rms_norm_backward(input, data<T>(grad_in), data<C>(inverse_in), to_x, to_gate,
                                     sums + block * in.width, block * kBlock,
                                     std::min((block + 1) * kBlock, in.positions));
      }
    });
    C* to_weight = mutable_data<C>(grad_weight);
    parallel_columns(in.width, blocks, [&](int64_t begin, int64_t end) {
      cpu::sum_rows<C>(sums, blocks, in.width, to_weight, begin, end);
    });
  });
  return {grad_x.to(x.scalar_type()), grad_weight.to(weight.scalar_type()),
          grad_gate.to(x.scalar_type())};
}

}  // namespace mblm
