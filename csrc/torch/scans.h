// What the glue of both scans shares: checks in the references' words, and the inputs as kernels
// want them. x is (B, L, D) with A (D, N), or (B, L, H, P) with A (H).
#pragma once

#include "common.h"
#include "cpu/kernel.h"

namespace mblm {

// The gradients of x, steps, A, B, C, D and the initial state.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct ScanInputs {
  const c10::DeviceGuard device;
  at::ScalarType compute, type;
  // A chunk is no longer than the sequences; N is padded.
  int64_t rows, length, width, states, padded_states, chunk_size, chunks;
  Tensor x, steps, rates, weight_in, weight_out, direct;  // of B and C N is padded

  ScanInputs(const char* steps_name, int64_t dims, const Tensor& x_, const Tensor& steps_,
             const Tensor& rates_, const Tensor& weight_in_, const Tensor& weight_out_,
             const Tensor& direct_, const OptionalTensor& state, int64_t largest_chunk)
      : device(check(steps_name, dims, x_, steps_, rates_, weight_in_, weight_out_, direct_, state,
                     largest_chunk)),
        compute(rates_.scalar_type()),
        type(compute == at::kFloat && x_.scalar_type() == at::kBFloat16 ? at::kBFloat16 : compute),
        rows(x_.size(0)),
        length(x_.size(1)),
        width(x_.size(2)),
        states(weight_in_.size(2)),
        padded_states(cpu::padded(states)),
        chunk_size(std::clamp<int64_t>(length, 1, largest_chunk)),
        chunks(divide_up(length, chunk_size)),
        x(x_.to(type)),
        steps(steps_.contiguous()),
        rates(rates_.contiguous()),
        weight_in(padded(weight_in_)),
        weight_out(padded(weight_out_)),
        direct(direct_.contiguous()) {}

  static c10::Device check(const char* steps_name, int64_t dims, const Tensor& x,
                           const Tensor& steps, const Tensor& rates, const Tensor& weight_in,
                           const Tensor& weight_out, const Tensor& direct,
                           const OptionalTensor& state, int64_t chunk_size) {
    const bool of_channels = dims == 3;
    check_floating("x", x);
    TORCH_CHECK_VALUE(x.dim() == dims, "x must be ", of_channels ? "(B, L, D)" : "(B, L, H, P)",
                      ", got shape ", x.sizes());
    const at::ScalarType compute = rates.scalar_type();
    TORCH_CHECK_TYPE(compute == at::kFloat || compute == at::kDouble,
                     "A must be float32 or float64, got ", compute);
    TORCH_CHECK_VALUE(chunk_size >= 1, "chunk_size must be at least 1, got ", chunk_size);
    const int64_t rows = x.size(0), length = x.size(1), width = x.size(2);
    TORCH_CHECK_VALUE(!of_channels || (rates.dim() == 2 && rates.size(0) == width), "A must be (",
                      width, ", N) to go with x, got shape ", rates.sizes());
    TORCH_CHECK_VALUE(weight_in.dim() == 3, "B must be (", rows, ", ", length, ", N), got shape ",
                      weight_in.sizes());
    const int64_t states = of_channels ? rates.size(1) : weight_in.size(2);
    check_device("A", rates, "x", x);
    check_tensor(steps_name, steps, {rows, length, width}, compute, "x", x);
    if (!of_channels) check_tensor("A", rates, {width}, compute, "x", x);
    check_tensor("B", weight_in, {rows, length, states}, x.scalar_type(), "x", x);
    check_tensor("C", weight_out, {rows, length, states}, x.scalar_type(), "x", x);
    check_tensor("D", direct, {width}, compute, "x", x);
    if (state) check_tensor("initial_state", *state, state_shape(x, states), compute, "x", x);
    return x.device();
  }

  // (B, D, N) or (B, H, P, N).
  static std::vector<int64_t> state_shape(const Tensor& x, int64_t states) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape.erase(shape.begin() + 1);
    shape.push_back(states);
    return shape;
  }

  Tensor padded(const Tensor& tensor) const {
    const Tensor whole = tensor.to(compute).contiguous();
    if (padded_states > states) return make::padded(whole, {0, padded_states - states});
    // A GPU's kernels load 16 bytes at once, which a new tensor's address allows for.
    const bool aligned = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0;
    return on_gpu(x) && !aligned ? whole.clone() : whole;
  }

  // States, of that many chunks if it is not negative, as they are given or kept: without padding.
  Tensor new_states(int64_t of_chunks = -1) const {
    std::vector<int64_t> shape = state_shape(x, states);
    if (of_chunks >= 0) shape.insert(shape.begin() + 1, of_chunks);
    return make::empty(shape, rates.options());
  }

  // The states before the first position.
  Tensor first_states(const OptionalTensor& given) const {
    Tensor state = new_states();
    given ? state.copy_(*given) : state.zero_();
    return state;
  }

  void check_gradients(const Tensor& grad_y, const Tensor& of_x, const Tensor& chunk_states) const {
    check_like("grad_y", grad_y, of_x.sizes(), "x", of_x);
    std::vector<int64_t> shape = state_shape(x, states);
    shape.insert(shape.begin() + 1, chunks);
    check_like("chunk_states", chunk_states, shape, "A", rates);
  }
};

}  // namespace mblm
