// Glue of selective_scan: checks, allocation, calls of the kernels.
#pragma once

#include "cpu/selective_scan.h"
#include "cuda/selective_scan.h"
#include "scans.h"

namespace mblm {
namespace {

struct SelectiveScanInputs : ScanInputs {
  explicit SelectiveScanInputs(const auto&... given) : ScanInputs("delta", 3, given...) {
    TORCH_CHECK_VALUE(!on_gpu(x) || states <= cuda::kScanMaxStates, "A must have at most ",
                      cuda::kScanMaxStates, " states per channel on a GPU, got ", states);
    x = x.contiguous();
    rates = padded(rates);
  }

  template <class T>
  cpu::SelectiveScanInput<T> kernel_input() const {
    using C = cpu::compute_t<T>;
    return {rows,
            length,
            width,
            states,
            padded_states,
            chunk_size,
            data<T>(x),
            data<C>(steps),
            data<C>(rates),
            data<C>(weight_in),
            data<C>(weight_out),
            data<C>(direct)};
  }
};

#ifdef MBLM_CUDA
// The gradients on a GPU, of all chunks at once.
Gradients backward_on_device(const SelectiveScanInputs& in, const Tensor& from_y,
                             const Tensor& before, Tensor grad_state, at::ScalarType x_type,
                             at::ScalarType weight_type) {
  const auto options = in.rates.options();
  const int64_t parts = cuda::selective_scan_parts(in.width, in.padded_states);
  Tensor grad_x = make::empty(in.x.sizes(), in.x.options());
  Tensor grad_delta = make::empty(in.x.sizes(), options);
  Tensor rates_parts = make::empty({in.rows, in.chunks, in.width, in.padded_states}, options);
  Tensor direct_parts = make::empty({in.rows, in.chunks, in.width}, options);
  Tensor in_parts = make::empty({parts, in.rows, in.length, in.padded_states}, options);
  Tensor out_parts = make::empty_like(in_parts);
  dispatch(in.type, [&]<class T, class C>(T, C) {
    const auto input = in.kernel_input<T>();
    Tensor carries = make::empty_like(before);
    Tensor sums = make::empty_like(direct_parts);
    Tensor kept = make::empty({cuda::selective_scan_kept(input)}, options);
    const cuda::SelectiveScanGradients<T> grad{data<C>(before),
                                               data<T>(from_y),
                                               mutable_data<C>(grad_state),
                                               mutable_data<T>(grad_x),
                                               mutable_data<C>(grad_delta),
                                               mutable_data<C>(rates_parts),
                                               mutable_data<C>(direct_parts),
                                               mutable_data<C>(in_parts),
                                               mutable_data<C>(out_parts),
                                               mutable_data<C>(carries),
                                               mutable_data<C>(sums),
                                               mutable_data<C>(kept)};
    launch(in.x.device(),
           [&](cuda::Stream stream) { return cuda::selective_scan_backward(input, grad, stream); });
  });
  const auto of_states = [&](const Tensor& tensor) { return tensor.narrow(-1, 0, in.states); };
  return {grad_x.to(x_type),
          grad_delta,
          of_states(rates_parts.sum(at::IntArrayRef{0, 1})).contiguous(),
          of_states(in_parts.sum(0)).to(weight_type).contiguous(),
          of_states(out_parts.sum(0)).to(weight_type).contiguous(),
          direct_parts.sum(at::IntArrayRef{0, 1}),
          grad_state};
}
#endif

// How the work on one chunk is cut, whatever the number of threads: sums over rows are sums over
// row blocks, and sums over channels are sums over groups of them.
struct Cut {
  int64_t row_blocks, rows_each, groups, channels_each;

  explicit Cut(const SelectiveScanInputs& in) {
    constexpr int64_t kItems = 32;
    row_blocks = std::clamp<int64_t>(in.rows, 1, kItems);
    rows_each = divide_up(in.rows, row_blocks);
    const int64_t tiles = std::max<int64_t>(divide_up(in.width, cpu::kScanTile), 1);
    groups = std::min(divide_up(kItems, row_blocks), tiles);
    channels_each = divide_up(tiles, groups) * cpu::kScanTile;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& delta,
                                                  const Tensor& rates, const Tensor& weight_in,
                                                  const Tensor& weight_out, const Tensor& direct,
                                                  const OptionalTensor& initial_state,
                                                  int64_t chunk_size) {
  const SelectiveScanInputs in(x, delta, rates, weight_in, weight_out, direct, initial_state,
                               chunk_size);
  Tensor y = make::empty(x.sizes(), in.x.options());
  Tensor state = in.first_states(initial_state), chunk_states = in.new_states(in.chunks);
  dispatch(in.type, [&]<class T, class C>(T, C) {
    const auto input = in.kernel_input<T>();
    T* to_y = mutable_data<T>(y);
    C* to_state = mutable_data<C>(state);
    C* to_chunk_states = mutable_data<C>(chunk_states);
    if constexpr (kCuda) {
      if (on_gpu(x)) {
        Tensor sums = make::empty({in.rows, in.chunks, in.width}, in.rates.options());
        return launch(x.device(), [&](cuda::Stream stream) {
          return cuda::selective_scan(input, to_y, to_state, to_chunk_states, mutable_data<C>(sums),
                                      stream);
        });
      }
    }
    parallel(in.rows * divide_up(in.width, cpu::kScanTile),
             cpu::kScanTile * in.length * in.padded_states, [&](int64_t begin, int64_t end) {
               cpu::selective_scan(input, to_y, to_state, to_chunk_states, begin, end);
             });
  });
  return {y.to(x.scalar_type()), state, chunk_states};
}

Gradients selective_scan_backward(const Tensor& grad_y, const Tensor& grad_final_state,
                                  const Tensor& x, const Tensor& delta, const Tensor& rates,
                                  const Tensor& weight_in, const Tensor& weight_out,
                                  const Tensor& direct, const Tensor& chunk_states,
                                  int64_t chunk_size) {
  const SelectiveScanInputs in(x, delta, rates, weight_in, weight_out, direct, grad_final_state,
                               chunk_size);
  in.check_gradients(grad_y, x, chunk_states);
  const Cut cut(in);
  const auto options = in.rates.options();
  const Tensor from_y = grad_y.to(in.type).contiguous(), before = chunk_states.contiguous();
  Tensor grad_state = in.first_states(grad_final_state);
#ifdef MBLM_CUDA
  if (on_gpu(x)) {
    return backward_on_device(in, from_y, before, grad_state, x.scalar_type(),
                              weight_in.scalar_type());
  }
#endif
  Tensor grad_x = make::empty(x.sizes(), in.x.options());
  Tensor grad_delta = make::empty(x.sizes(), options);
  Tensor grad_weight_in = make::empty(weight_in.sizes(), weight_in.options());
  Tensor grad_weight_out = make::empty(weight_in.sizes(), weight_in.options());
  Tensor rates_parts = make::zeros({cut.row_blocks, in.width, in.padded_states}, options);
  Tensor direct_parts = make::zeros({cut.row_blocks, in.width}, options);
  for (int64_t chunk = in.chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * in.chunk_size;
    const int64_t positions = std::min(in.chunk_size, in.length - start);
    // Of weight_in and of weight_out.
    Tensor parts = make::zeros({2, cut.groups, in.rows, positions, in.padded_states}, options);
    dispatch(in.type, [&]<class T, class C>(T, C) {
      const auto input = in.kernel_input<T>();
      const cpu::SelectiveScanGradients<T> first{data<T>(from_y),
                                                 mutable_data<C>(grad_state),
                                                 mutable_data<T>(grad_x),
                                                 mutable_data<C>(grad_delta),
                                                 mutable_data<C>(rates_parts),
                                                 mutable_data<C>(direct_parts),
                                                 mutable_data<C>(parts),
                                                 mutable_data<C>(parts) + parts.stride(0)};
      parallel(cut.row_blocks * cut.groups,
               cut.rows_each * cut.channels_each * positions * in.padded_states,
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t block = item / cut.groups, group = item % cut.groups;
                   const int64_t row = block * cut.rows_each, channel = group * cut.channels_each;
                   auto grad = first;
                   grad.rates += block * rates_parts.stride(0);
                   grad.direct += block * direct_parts.stride(0);
                   grad.weight_in += group * parts.stride(1);
                   grad.weight_out += group * parts.stride(1);
                   cpu::selective_scan_backward(input, data<C>(before), chunk, grad, row,
                                                std::min(row + cut.rows_each, in.rows), channel,
                                                std::min(channel + cut.channels_each, in.width));
                 }
               });
    });
    const Tensor sums = parts.sum(1).narrow(-1, 0, in.states);
    grad_weight_in.narrow(1, start, positions).copy_(sums[0]);
    grad_weight_out.narrow(1, start, positions).copy_(sums[1]);
  }
  return {grad_x.to(x.scalar_type()),
          grad_delta,
          rates_parts.sum(0).narrow(-1, 0, in.states).contiguous(),
          grad_weight_in.contiguous(),
          grad_weight_out.contiguous(),
          direct_parts.sum(0),
          grad_state};
}

}  // namespace mblm
