// Glue of ssd: checks, allocation, calls of the kernels.
#pragma once

#include <ATen/Context.h>

#include <array>
#include <limits>

#include "cpu/ssd.h"
#include "cuda/ssd.h"
#include "scans.h"

namespace mblm {
namespace {

struct SsdInputs : ScanInputs {
  const int64_t heads = width, head_dim = x.size(3);

  explicit SsdInputs(const auto&... given) : ScanInputs("dt", 4, given...) {
    if (x.stride(3) != 1 || x.stride(2) != head_dim) x = x.contiguous();
  }

  Tensor unpadded(const Tensor& tensor) const {
    return padded_states == states ? tensor : tensor.narrow(-1, 0, states).contiguous();
  }

  // For the scores of any one chunk, and for so many times what is as large.
  Tensor zero_scores(int64_t times) const {
    const int64_t span = std::min(chunk_size, length);
    return make::zeros({times, span, cpu::padded(span)}, rates.options());
  }
};

#ifdef MBLM_CUDA
// Whether PyTorch would multiply matrices of float32 in TF32.
bool may_round_products() {
  try {
    return at::globalContext().allowTF32CuBLAS();
  } catch (const c10::Error&) {  // it was told so in two ways that contradict each other
    return false;
  }
}

// The inputs of a GPU's kernels, with their scratch.
struct DeviceInputs {
  const SsdInputs& in;
  Tensor sums, scores;

  explicit DeviceInputs(const SsdInputs& in)
      : in(in),
        sums(make::empty({in.rows, in.length, in.heads}, in.rates.options().dtype(at::kDouble))),
        scores(
            make::empty({in.rows, in.chunks, in.chunk_size, in.chunk_size}, in.rates.options())) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;  // with room for a tile
    TORCH_CHECK_VALUE(in.heads * in.head_dim <= kMost && in.states <= kMost, "x has ", in.heads,
                      " heads of ", in.head_dim, " channels, B ", in.states,
                      " states: on a GPU a position has at most ", kMost, " of each");
  }

  template <class T>
  cuda::SsdInput<T> kernel_input() {
    using C = cpu::compute_t<T>;
    return {in.rows,
            in.length,
            in.heads,
            in.head_dim,
            in.states,
            in.padded_states,
            in.chunk_size,
            in.chunks,
            data<T>(in.x),
            in.x.stride(0),
            in.x.stride(1),
            data<C>(in.steps),
            data<C>(in.rates),
            data<C>(in.weight_in),
            data<C>(in.weight_out),
            data<C>(in.direct),
            mutable_data<double>(sums),
            mutable_data<C>(scores),
            may_round_products()};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward_on_device(const SsdInputs& in,
                                                     const OptionalTensor& initial_state,
                                                     at::ScalarType type) {
  Tensor y = make::empty(in.x.sizes(), in.x.options());
  Tensor state = in.first_states(initial_state), chunk_states = in.new_states(in.chunks);
  DeviceInputs own(in);
  dispatch(in.type, [&]<class T, class C>(T, C) {
    launch(in.x.device(), [&](cuda::Stream stream) {
      return cuda::ssd(own.kernel_input<T>(), mutable_data<T>(y), mutable_data<C>(state),
                       mutable_data<C>(chunk_states), stream);
    });
  });
  return {y.to(type), state, chunk_states};
}

Gradients backward_on_device(const SsdInputs& in, const Tensor& grad_y,
                             const Tensor& grad_final_state, const Tensor& chunk_states,
                             at::ScalarType type) {
  const auto options = in.rates.options();
  const Tensor from_y = grad_y.to(in.type).contiguous(), states_before = chunk_states.contiguous();
  Tensor grad_state = in.first_states(grad_final_state);
  DeviceInputs own(in);
  Tensor grad_x = make::empty(in.x.sizes(), in.x.options());
  Tensor grad_dt = make::empty_like(in.steps);
  Tensor grad_in = make::empty({in.rows, in.length, in.states}, options);
  Tensor grad_out = make::empty_like(grad_in);
  Tensor rates = make::empty({in.rows, in.chunks, in.heads}, options);
  Tensor direct = make::empty_like(rates);
  dispatch(in.type, [&]<class T, class C>(T, C) {
    Tensor carries = make::empty_like(states_before), scores = make::empty_like(own.scores);
    Tensor terms = make::zeros({4, in.rows, in.length, in.heads}, own.sums.options());
    const cuda::SsdGradients<T> grad{
        data<C>(states_before),   data<T>(from_y),          mutable_data<C>(grad_state),
        mutable_data<T>(grad_x),  mutable_data<C>(grad_dt), mutable_data<C>(rates),
        mutable_data<C>(direct),  mutable_data<C>(grad_in), mutable_data<C>(grad_out),
        mutable_data<C>(carries), mutable_data<C>(scores),  mutable_data<double>(terms)};
    launch(in.x.device(), [&](cuda::Stream stream) {
      return cuda::ssd_backward(own.kernel_input<T>(), grad, stream);
    });
  });
  constexpr std::array<int64_t, 2> rows_and_chunks = {0, 1};
  return {grad_x.to(type),  grad_dt,           rates.sum(rows_and_chunks),
          grad_in.to(type), grad_out.to(type), direct.sum(rows_and_chunks),
          grad_state};
}
#endif

// One chunk of positions, whose scores it makes.
template <class T>
cpu::SsdInput<T> chunk_input(const SsdInputs& in, int64_t index, Tensor& scores) {
  using C = cpu::compute_t<T>;
  const int64_t start = index * in.chunk_size;
  cpu::SsdInput<T> input{in.rows,
                         in.length,
                         in.heads,
                         in.head_dim,
                         in.padded_states,
                         start,
                         std::min(in.chunk_size, in.length - start),
                         data<T>(in.x),
                         in.x.stride(0),
                         in.x.stride(1),
                         data<C>(in.steps),
                         data<C>(in.rates),
                         data<C>(in.weight_in),
                         data<C>(in.weight_out),
                         data<C>(in.direct),
                         nullptr};
  C* to = mutable_data<C>(scores);
  parallel(in.rows, input.positions * input.positions * in.padded_states,
           [&](int64_t begin, int64_t end) { cpu::ssd_scores(input, to, begin, end); });
  input.scores = to;
  return input;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ssd(const Tensor& x, const Tensor& dt, const Tensor& rates,
                                       const Tensor& weight_in, const Tensor& weight_out,
                                       const Tensor& direct, const OptionalTensor& initial_state,
                                       int64_t chunk_size) {
  const SsdInputs in(x, dt, rates, weight_in, weight_out, direct, initial_state, chunk_size);
#ifdef MBLM_CUDA
  if (on_gpu(x)) return forward_on_device(in, initial_state, x.scalar_type());
#endif
  Tensor y = make::empty(x.sizes(), in.x.options());
  // The states before the chunks, each followed by the next chunk's or by the final ones.
  Tensor chunk_states = make::empty({in.rows, in.chunks, in.heads, in.head_dim, in.padded_states},
                                    in.rates.options());
  Tensor state =
      make::empty({in.rows, in.heads, in.head_dim, in.padded_states}, in.rates.options());
  Tensor first = in.chunks > 0 ? chunk_states.select(1, 0) : state;
  initial_state ? first.copy_(in.padded(*initial_state)) : first.zero_();
  Tensor scores = in.zero_scores(in.rows);
  for (int64_t index = 0; index < in.chunks; ++index) {
    const Tensor before = chunk_states.select(1, index);
    Tensor after = index + 1 < in.chunks ? chunk_states.select(1, index + 1) : state;
    dispatch(in.type, [&]<class T, class C>(T, C) {
      const auto input = chunk_input<T>(in, index, scores);
      T* to_y = mutable_data<T>(y);
      const cpu::SsdStates<const C> from{data<C>(before), before.stride(0)};
      const cpu::SsdStates<C> to{mutable_data<C>(after), after.stride(0)};
      parallel(in.rows * in.heads,
               in.head_dim * input.positions * (input.positions + in.padded_states),
               [&](int64_t begin, int64_t end) { cpu::ssd(input, to_y, from, to, begin, end); });
    });
  }
  return {y.to(x.scalar_type()), in.unpadded(state), in.unpadded(chunk_states)};
}

Gradients ssd_backward(const Tensor& grad_y, const Tensor& grad_final_state, const Tensor& x,
                       const Tensor& dt, const Tensor& rates, const Tensor& weight_in,
                       const Tensor& weight_out, const Tensor& direct, const Tensor& chunk_states,
                       int64_t chunk_size) {
  const SsdInputs in(x, dt, rates, weight_in, weight_out, direct, grad_final_state, chunk_size);
  in.check_gradients(grad_y, x, chunk_states);
#ifdef MBLM_CUDA
  if (on_gpu(x)) {
    return backward_on_device(in, grad_y, grad_final_state, chunk_states, x.scalar_type());
  }
#endif

  // Sums over heads are sums over groups of them, as many for any number of threads.
  constexpr int64_t kItems = 8;
  const int64_t wanted = std::max<int64_t>(divide_up(kItems, std::max<int64_t>(in.rows, 1)), 1);
  const int64_t each = std::max<int64_t>(divide_up(in.heads, wanted), 1);
  const int64_t groups = std::max<int64_t>(divide_up(in.heads, each), 1);

  const auto options = in.rates.options();
  const Tensor from_y = grad_y.to(in.type).contiguous(), states_before = in.padded(chunk_states);
  Tensor grad_state = make::empty({in.rows, in.heads, in.head_dim, in.padded_states}, options);
  grad_state.copy_(in.padded(grad_final_state));
  Tensor grad_x = make::empty(x.sizes(), in.x.options());
  Tensor grad_dt = make::empty(dt.sizes(), options);
  Tensor grad_weight_in = make::empty(in.weight_in.sizes(), in.x.options());
  Tensor grad_weight_out = make::empty(in.weight_in.sizes(), in.x.options());
  Tensor rates_and_direct = make::zeros({2, in.rows, in.heads}, options);
  // What the groups of heads give to the scores, to weight_in and to weight_out.
  Tensor scores = in.zero_scores(in.rows), grad_scores = in.zero_scores(in.rows * groups);
  Tensor weights = make::zeros({2, in.rows * groups, scores.size(1), in.padded_states}, options);
  for (int64_t index = in.chunks - 1; index >= 0; --index) {
    const Tensor before = states_before.select(1, index);
    dispatch(in.type, [&]<class T, class C>(T, C) {
      const auto input = chunk_input<T>(in, index, scores);
      const int64_t positions = input.positions;
      const int64_t scores_each = positions * input.padded_positions();
      const int64_t weights_each = positions * in.padded_states;
      C* sums = mutable_data<C>(rates_and_direct);
      const cpu::SsdGradients<T> first{data<T>(from_y),
                                       {data<C>(before), before.stride(0)},
                                       mutable_data<C>(grad_state),
                                       mutable_data<T>(grad_x),
                                       mutable_data<C>(grad_dt),
                                       sums,
                                       sums + in.rows * in.heads,
                                       mutable_data<C>(grad_scores),
                                       mutable_data<C>(weights),
                                       mutable_data<C>(weights) + weights.stride(0)};
      parallel(in.rows * groups, each * in.head_dim * positions * (positions + in.padded_states),
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t group = item % groups;
                   auto grad = first;
                   grad.scores += item * scores_each;
                   grad.weight_in += item * weights_each;
                   grad.weight_out += item * weights_each;
                   cpu::ssd_backward(input, grad, item / groups, group * each,
                                     std::min((group + 1) * each, in.heads));
                 }
               });
      T* to_in = mutable_data<T>(grad_weight_in);
      T* to_out = mutable_data<T>(grad_weight_out);
      parallel(in.rows, positions * positions * in.padded_states, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          cpu::ssd_backward_weights(input, groups, first.scores + row * groups * scores_each,
                                    first.weight_in + row * groups * weights_each,
                                    first.weight_out + row * groups * weights_each, to_in, to_out,
                                    row);
        }
      });
    });
  }
  const Tensor sums = rates_and_direct.sum(1);
  return {grad_x.to(x.scalar_type()),
          grad_dt,
          sums[0].clone(),
          in.unpadded(grad_weight_in.to(x.scalar_type())),
          in.unpadded(grad_weight_out.to(x.scalar_type())),
          sums[1].clone(),
          in.unpadded(grad_state)};
}

}  // namespace mblm
