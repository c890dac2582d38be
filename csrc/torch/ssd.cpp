// Glue of ssd: checks, allocation, the kernels' registration.
#include "cpu/ssd.h"

#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "common.h"
#include "cuda/ssd.h"

namespace mblm {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check(const Tensor& x, const Tensor& dt, const Tensor& rates, const Tensor& weight_in,
           const Tensor& weight_out, const Tensor& direct, const OptionalTensor& initial_state,
           int64_t chunk_size) {
  check_floating("x", x);
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (B, L, H, P), got shape ", x.sizes());
  const at::ScalarType compute = rates.scalar_type();
  TORCH_CHECK_TYPE(compute == at::kFloat || compute == at::kDouble,
                   "A must be float32 or float64, got ", compute);
  const int64_t rows = x.size(0), length = x.size(1), heads = x.size(2), head_dim = x.size(3);
  TORCH_CHECK_VALUE(weight_in.dim() == 3, "B must be (", rows, ", ", length, ", N), got shape ",
                    weight_in.sizes());
  TORCH_CHECK_VALUE(chunk_size >= 1, "chunk_size must be at least 1, got ", chunk_size);
  const int64_t states = weight_in.size(2);
  check_device("A", rates, "x", x);
  const auto expect = [&x](const char* name, const Tensor& tensor, at::IntArrayRef shape,
                           at::ScalarType type) {
    check_shape(name, tensor, shape);
    check_type(name, tensor, type);
    check_device(name, tensor, "x", x);
  };
  expect("dt", dt, {rows, length, heads}, compute);
  expect("A", rates, {heads}, compute);
  expect("B", weight_in, {rows, length, states}, x.scalar_type());
  expect("C", weight_out, {rows, length, states}, x.scalar_type());
  expect("D", direct, {heads}, compute);
  if (initial_state) {
    expect("initial_state", *initial_state, {rows, heads, head_dim, states}, compute);
  }
}

int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// x as it is, copied only if its heads and channels are not contiguous.
Tensor with_contiguous_heads(const Tensor& x) {
  const bool fits = x.stride(3) == 1 && x.stride(2) == x.size(3);
  return fits ? x : x.contiguous();
}

// The tensors as the kernels want them.
struct Inputs {
  at::ScalarType compute, type;
  int64_t rows, length, heads, head_dim, states, padded_states, chunk_size, chunks;
  Tensor x, dt, rates, weight_in, weight_out, direct;

  Inputs(const Tensor& x_, const Tensor& dt_, const Tensor& rates_, const Tensor& weight_in_,
         const Tensor& weight_out_, const Tensor& direct_, int64_t chunk_size)
      : compute(rates_.scalar_type()),
        type(compute == at::kFloat && x_.scalar_type() == at::kBFloat16 ? at::kBFloat16 : compute),
        rows(x_.size(0)),
        length(x_.size(1)),
        heads(x_.size(2)),
        head_dim(x_.size(3)),
        states(weight_in_.size(2)),
        padded_states(divide_up(states, cpu::kSsdStatesMultiple) * cpu::kSsdStatesMultiple),
        chunk_size(chunk_size),
        chunks(divide_up(length, chunk_size)),
        x(with_contiguous_heads(x_.to(type))),
        dt(dt_.contiguous()),
        rates(rates_.contiguous()),
        weight_in(padded(weight_in_)),
        weight_out(padded(weight_out_)),
        direct(direct_.contiguous()) {}

  Tensor padded(const Tensor& tensor) const {
    const Tensor whole = tensor.to(compute).contiguous();
    return padded_states == states ? whole
                                   : at::constant_pad_nd(whole, {0, padded_states - states});
  }
};

// One chunk of positions: where it lies, and its scores C_i B_j.
struct Chunk {
  int64_t start, positions;
  Tensor weight_in, weight_out;  // (rows, positions, padded N)
  Tensor scores;                 // (rows, positions, positions)

  Chunk(const Inputs& in, int64_t index)
      : start(index * in.chunk_size),
        positions(std::min(in.chunk_size, in.length - start)),
        weight_in(in.weight_in.narrow(1, start, positions)),
        weight_out(in.weight_out.narrow(1, start, positions)),
        scores(at::bmm(weight_out, weight_in.transpose(1, 2)).contiguous()) {}

  template <class T>
  cpu::SsdInput<T> kernel_input(const Inputs& in) const {
    using C = cpu::compute_t<T>;
    return {in.rows,
            in.length,
            in.heads,
            in.head_dim,
            in.states,
            in.padded_states,
            start,
            positions,
            data<T>(in.x),
            in.x.stride(0),
            in.x.stride(1),
            data<C>(in.dt),
            data<C>(in.rates),
            data<C>(in.weight_in),
            data<C>(in.weight_out),
            data<C>(in.direct),
            data<C>(scores)};
  }
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

#ifdef MBLM_CUDA
// The inputs of a GPU's kernels, with their scratch; chunks are no longer than the sequences.
struct DeviceInputs {
  const Inputs& in;
  int64_t chunk_size;
  Tensor sums, scores;

  explicit DeviceInputs(const Inputs& in)
      : in(in),
        chunk_size(std::min(in.chunk_size, std::max<int64_t>(in.length, 1))),
        sums(at::empty({in.rows, in.length, in.heads}, in.rates.options().dtype(at::kDouble))),
        scores(at::empty({in.rows, in.chunks, chunk_size, chunk_size}, in.rates.options())) {}

  template <class T>
  cuda::SsdInput<T> kernel_input() {
    using C = cpu::compute_t<T>;
    return {in.rows,
            in.length,
            in.heads,
            in.head_dim,
            in.states,
            in.padded_states,
            chunk_size,
            in.chunks,
            data<T>(in.x),
            in.x.stride(0),
            in.x.stride(1),
            data<C>(in.dt),
            data<C>(in.rates),
            data<C>(in.weight_in),
            data<C>(in.weight_out),
            data<C>(in.direct),
            mutable_data<double>(sums),
            mutable_data<C>(scores)};
  }
};

void forward_on_device(const Inputs& in, Tensor& y, Tensor& state, Tensor& chunk_states) {
  DeviceInputs own(in);
  dispatch(in.type, [&](auto zero) {
    using T = decltype(zero);
    using C = cpu::compute_t<T>;
    launch(in.x.device(), [&](cuda::Stream stream) {
      return cuda::ssd(own.kernel_input<T>(), mutable_data<T>(y), mutable_data<C>(state),
                       mutable_data<C>(chunk_states), stream);
    });
  });
}

Gradients backward_on_device(const Inputs& in, const Tensor& from_y, const Tensor& states_before,
                             Tensor grad_state, at::ScalarType x_type, at::ScalarType weight_type) {
  DeviceInputs own(in);
  const auto options = in.rates.options();
  Tensor grad_x = at::empty(in.x.sizes(), in.x.options());
  Tensor grad_dt = at::empty_like(in.dt);
  Tensor grad_in = at::empty({in.rows, in.length, in.states}, options);
  Tensor grad_out = at::empty_like(grad_in);
  Tensor rates = at::empty({in.rows, in.chunks, in.heads}, options);
  Tensor direct = at::empty_like(rates);
  dispatch(in.type, [&](auto zero) {
    using T = decltype(zero);
    using C = cpu::compute_t<T>;
    Tensor carries = at::empty_like(states_before), scores = at::empty_like(own.scores);
    Tensor terms = at::empty({4, in.rows, in.length, in.heads}, own.sums.options());
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
  return {grad_x.to(x_type),
          grad_dt,
          rates.sum(rows_and_chunks),
          grad_in.to(weight_type),
          grad_out.to(weight_type),
          direct.sum(rows_and_chunks),
          grad_state};
}
#endif

// Autocast would lower the precision of the products here.
using WithoutAutocast = c10::impl::ExcludeDispatchKeyGuard;

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& dt, const Tensor& rates,
                                           const Tensor& weight_in, const Tensor& weight_out,
                                           const Tensor& direct,
                                           const OptionalTensor& initial_state,
                                           int64_t chunk_size) {
  check(x, dt, rates, weight_in, weight_out, direct, initial_state, chunk_size);
  const WithoutAutocast guard(c10::autocast_dispatch_keyset);
  const c10::DeviceGuard device(x.device());
  const Inputs in(x, dt, rates, weight_in, weight_out, direct, chunk_size);
  const auto options = in.rates.options();
  Tensor y = at::empty(x.sizes(), in.x.options());
  Tensor state = at::zeros({in.rows, in.heads, in.head_dim, in.states}, options);
  if (initial_state) state.copy_(*initial_state);
  Tensor chunk_states = at::empty({in.rows, in.chunks, in.heads, in.head_dim, in.states}, options);
#ifdef MBLM_CUDA
  if (on_gpu(x)) {
    forward_on_device(in, y, state, chunk_states);
    return {y.to(x.scalar_type()), state, chunk_states};
  }
#endif
  for (int64_t index = 0; index < in.chunks; ++index) {
    chunk_states.select(1, index).copy_(state);
    const Chunk chunk(in, index);
    dispatch(in.type, [&](auto zero) {
      using T = decltype(zero);
      const auto input = chunk.kernel_input<T>(in);
      T* to_y = mutable_data<T>(y);
      auto* to_state = mutable_data<cpu::compute_t<T>>(state);
      parallel(in.rows * in.heads,
               in.head_dim * chunk.positions * (chunk.positions + in.padded_states),
               [&](int64_t begin, int64_t end) { cpu::ssd(input, to_y, to_state, begin, end); });
    });
  }
  return {y.to(x.scalar_type()), state, chunk_states};
}

Gradients backward(const Tensor& grad_y, const Tensor& grad_final_state, const Tensor& x,
                   const Tensor& dt, const Tensor& rates, const Tensor& weight_in,
                   const Tensor& weight_out, const Tensor& direct, const Tensor& chunk_states,
                   int64_t chunk_size) {
  check(x, dt, rates, weight_in, weight_out, direct, grad_final_state, chunk_size);
  const WithoutAutocast guard(c10::autocast_dispatch_keyset);
  const c10::DeviceGuard device(x.device());
  const Inputs in(x, dt, rates, weight_in, weight_out, direct, chunk_size);
  check_shape("grad_y", grad_y, x.sizes());
  check_like("grad_y", grad_y, "x", x);
  check_shape("chunk_states", chunk_states, {in.rows, in.chunks, in.heads, in.head_dim, in.states});
  check_like("chunk_states", chunk_states, "A", rates);

  const auto options = in.rates.options();
  const Tensor from_y = grad_y.to(in.type).contiguous(), states_before = chunk_states.contiguous();
  Tensor grad_state = at::empty(grad_final_state.sizes(), options);
  grad_state.copy_(grad_final_state);
#ifdef MBLM_CUDA
  if (on_gpu(x)) {
    return backward_on_device(in, from_y, states_before, grad_state, x.scalar_type(),
                              weight_in.scalar_type());
  }
#endif

  // Sums over heads are sums over groups of them, as many for any number of threads.
  constexpr int64_t kItems = 32;
  const int64_t wanted = std::max<int64_t>(divide_up(kItems, std::max<int64_t>(in.rows, 1)), 1);
  const int64_t each = std::max<int64_t>(divide_up(in.heads, wanted), 1);
  const int64_t groups = divide_up(in.heads, each);

  Tensor grad_x = at::empty(x.sizes(), in.x.options());
  Tensor grad_dt = at::empty(dt.sizes(), options);
  Tensor grad_weight_in = at::empty(weight_in.sizes(), weight_in.options());
  Tensor grad_weight_out = at::empty(weight_in.sizes(), weight_in.options());
  Tensor rates_and_direct = at::zeros({2, in.rows, in.heads}, options);
  for (int64_t index = in.chunks - 1; index >= 0; --index) {
    const Chunk chunk(in, index);
    const int64_t positions = chunk.positions;
    Tensor scores = at::zeros({groups, in.rows, positions, positions}, options);
    // Of weight_in and of weight_out, what does not go through the scores.
    Tensor weights = at::zeros({2, groups, in.rows, positions, in.padded_states}, options);
    const Tensor before = states_before.select(1, index);
    dispatch(in.type, [&](auto zero) {
      using T = decltype(zero);
      using C = cpu::compute_t<T>;
      const auto input = chunk.kernel_input<T>(in);
      C* sums = mutable_data<C>(rates_and_direct);
      const cpu::SsdGradients<T> first{data<T>(from_y),
                                       data<C>(before),
                                       before.stride(0),
                                       mutable_data<C>(grad_state),
                                       mutable_data<T>(grad_x),
                                       mutable_data<C>(grad_dt),
                                       sums,
                                       sums + in.rows * in.heads,
                                       mutable_data<C>(scores),
                                       mutable_data<C>(weights),
                                       mutable_data<C>(weights) + weights.stride(0)};
      parallel(in.rows * groups, each * in.head_dim * positions * (positions + in.padded_states),
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t row = item / groups, group = item % groups;
                   auto grad = first;
                   grad.scores += group * scores.stride(0);
                   grad.weight_in += group * weights.stride(1);
                   grad.weight_out += group * weights.stride(1);
                   cpu::ssd_backward(input, grad, row, group * each,
                                     std::min((group + 1) * each, in.heads));
                 }
               });
    });
    const Tensor grad_scores = scores.sum(0), direct_parts = weights.sum(1);
    const Tensor of_in =
        at::baddbmm(direct_parts[0], grad_scores.transpose(1, 2), chunk.weight_out);
    const Tensor of_out = at::baddbmm(direct_parts[1], grad_scores, chunk.weight_in);
    grad_weight_in.narrow(1, chunk.start, positions).copy_(of_in.narrow(2, 0, in.states));
    grad_weight_out.narrow(1, chunk.start, positions).copy_(of_out.narrow(2, 0, in.states));
  }
  const Tensor sums = rates_and_direct.sum(1);
  return {
      grad_x.to(x.scalar_type()),   grad_dt,         sums[0].clone(), grad_weight_in.contiguous(),
      grad_weight_out.contiguous(), sums[1].clone(), grad_state};
}

void add(torch::Library& library) {
  library.impl("ssd", forward);
  library.impl("ssd_backward", backward);
}

}  // namespace

MBLM_REGISTER(add)

}  // namespace mblm
