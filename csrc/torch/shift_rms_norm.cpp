// Glue of shift_rms_norm: checks, allocation, calls of the kernels.
#include "cpu/shift_rms_norm.h"

#include "common.h"
#include "cpu/sum_rows.h"
#include "cuda/shift_rms_norm.h"
#include "operators.h"

namespace mblm {
namespace {

void check(const Tensor& x, const Tensor& weight, const OptionalTensor& previous, bool shift,
           double eps) {
  check_floating("x", x);
  check_floating("weight", weight);
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-1) >= 1,
                    "x must have shape [..., S, D] with D >= 1, got ", x.sizes());
  check_shape("weight", weight, {x.size(-1)});
  check_device("weight", weight, "x", x);
  TORCH_CHECK_VALUE(eps > 0, "eps must be positive, got ", eps);
  if (previous) {
    TORCH_CHECK_VALUE(shift, "previous must be None where shift is False");
    auto shape = x.sizes().slice(0, x.dim() - 2).vec();
    shape.push_back(x.size(-1) / 2);
    check_shape("previous", *previous, shape);
    check_like("previous", *previous, "x", x);
  }
}

// The tensors as the kernel wants them: in its dtype, leading dimensions in one.
struct Inputs {
  at::ScalarType out_type, type;
  int64_t rows, length, width;
  bool shift;
  double eps;
  Tensor x, weight;
  OptionalTensor previous;

  Inputs(const Tensor& x_, const Tensor& weight_, const OptionalTensor& previous_, bool shift,
         double eps)
      : out_type(c10::promoteTypes(x_.scalar_type(), weight_.scalar_type())),
        type(kernel_type(out_type)),
        rows(c10::multiply_integers(x_.sizes().slice(0, x_.dim() - 2))),
        length(x_.size(-2)),
        width(x_.size(-1)),
        shift(shift),
        eps(eps),
        x(with_unit_stride(x_.to(type).reshape({rows, length, width}))),
        weight(weight_.to(compute_type(type)).contiguous()) {
    if (previous_) {
      previous = with_unit_stride(previous_->to(type).reshape({rows, width / 2}));
    }
  }

  template <class T>
  cpu::ShiftRmsNormInput<T> kernel_input() const {
    return {length,
            width,
            data<T>(x),
            x.stride(0),
            x.stride(1),
            data<cpu::compute_t<T>>(weight),
            data<T>(previous),
            previous ? previous->stride(0) : 0,
            shift,
            eps};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> shift_rms_norm(const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& previous, bool shift, double eps) {
  check(x, weight, previous, shift, eps);
  const c10::DeviceGuard device(x.device());
  const Inputs in(x, weight, previous, shift, eps);
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
          return cuda::shift_rms_norm(input, in.rows * in.length, to, inverse, stream);
        });
      }
    }
    parallel(in.rows * in.length, in.width, [&](int64_t begin, int64_t end) {
      cpu::shift_rms_norm(input, to, inverse, begin, end);
    });
  });
  return {out.to(in.out_type), inverse_norm};
}

std::tuple<Tensor, Tensor, Tensor> shift_rms_norm_backward(const Tensor& grad, const Tensor& x,
                                                           const Tensor& weight,
                                                           const OptionalTensor& previous,
                                                           const Tensor& inverse_norm, bool shift,
                                                           double eps) {
  check(x, weight, previous, shift, eps);
  const c10::DeviceGuard device(x.device());
  const Inputs in(x, weight, previous, shift, eps);
  check_shape("grad", grad, x.sizes());
  check_shape("inverse_norm", inverse_norm, x.sizes().slice(0, x.dim() - 1));
  check_type("grad", grad, in.out_type);
  check_type("inverse_norm", inverse_norm, compute_type(in.out_type));
  check_device("grad", grad, "x", x);
  check_device("inverse_norm", inverse_norm, "x", x);

  const int64_t positions = in.rows * in.length;
  const Tensor grad_in = grad.to(in.type).contiguous();
  const Tensor inverse_in = inverse_norm.contiguous();
  Tensor grad_x = make::empty(x.sizes(), x.options().dtype(in.type));
  Tensor grad_previous = make::empty({0}, grad_x.options());
  if (previous) grad_previous = make::empty(previous->sizes(), grad_x.options());
  if (previous && positions == 0) grad_previous.zero_();
  Tensor grad_weight = make::empty({in.width}, in.weight.options());
  dispatch(in.type, [&](auto zero) {
    using T = decltype(zero);
    using C = cpu::compute_t<T>;
    const auto input = in.kernel_input<T>();
    T* to_x = mutable_data<T>(grad_x);
    T* to_previous = previous ? mutable_data<T>(grad_previous) : nullptr;
    if constexpr (kCuda) {
      if (on_gpu(x)) {
        Tensor parts =
            make::empty({cuda::shift_rms_norm_parts(positions), in.width}, in.weight.options());
        launch(x.device(), [&](cuda::Stream stream) {
          return cuda::shift_rms_norm_backward(input, positions, data<T>(grad_in),
                                               data<C>(inverse_in), to_x, to_previous,
                                               mutable_data<C>(parts), stream);
        });
        grad_weight = parts.sum(0);
        return;
      }
    }
    // The weight's gradient is summed over blocks of positions, then over the blocks, so that it
    // is the same for any number of threads.
    constexpr int64_t kBlock = 64;
    const int64_t blocks = (positions + kBlock - 1) / kBlock;
    Tensor partial = make::empty({blocks, in.width}, in.weight.options());
    C* sums = mutable_data<C>(partial);
    parallel(blocks, kBlock * in.width, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        cpu::shift_rms_norm_backward(input, data<T>(grad_in), data<C>(inverse_in), to_x,
                                     to_previous, sums + block * in.width, block * kBlock,
                                     std::min((block + 1) * kBlock, positions));
      }
    });
    C* to_weight = mutable_data<C>(grad_weight);
    parallel_columns(in.width, blocks, [&](int64_t begin, int64_t end) {
      cpu::sum_rows<C>(sums, blocks, in.width, to_weight, begin, end);
    });
  });
  return {grad_x.to(x.scalar_type()), grad_weight.to(weight.scalar_type()),
          grad_previous.to(x.scalar_type())};
}

}  // namespace mblm
