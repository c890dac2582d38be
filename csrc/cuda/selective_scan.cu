// Mamba-1's selective scan, forwards: see selective_scan.cuh.
#include "cuda/selective_scan.cuh"

namespace mblm::cuda {
namespace {

// The state at the end of each chunk from zero at its beginning, and the sum of delta.
template <class T>
__global__ void __launch_bounds__(kScanThreads)
    ends_of_chunks(SelectiveScanInput<T> in, int lanes, int64_t items, compute_t<T>* ends,
                   compute_t<T>* delta_sums) {
  using C = compute_t<T>;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Lane<T> own(in, lanes, item);
    const auto rates = own.rates();
    Pack<C, kStates> h = {}, decay;
    C sum = 0;
    MBLM_UNROLL
    for (int t = 0; t < own.positions; ++t) {
      const C step = own.of_channel(in.delta, t);
      advance(rates, step, step * own.of_channel_rounded(in.x, t), own.weights(in.weight_in, t),
              decay, h);
      sum += step;
    }
    own.write(h, ends + own.place());
    if (own.is_first_of_channel()) delta_sums[own.chunk_channel()] = sum;
  }
}

// A thread takes a state.
template <class T>
__global__ void __launch_bounds__(kThreads)
    join_chunks(SelectiveScanInput<T> in, int64_t chunks, bool backwards,
                const compute_t<T>* delta_sums, compute_t<T>* parts, compute_t<T>* state) {
  using C = compute_t<T>;
  const int64_t channel_states = in.channels * in.states;
  for (int64_t item = first_item(); item < in.rows * channel_states; item += item_stride()) {
    const int64_t row = quotient(item, channel_states), rest = item - row * channel_states;
    const int64_t channel = quotient(rest, in.states);
    const C rate = in.rates[channel * in.padded_states + rest - channel * in.states];
    C h = state[item];
    MBLM_UNROLL
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t chunk = row * chunks + (backwards ? chunks - 1 - i : i);
      const C own = parts[chunk * channel_states + rest];
      parts[chunk * channel_states + rest] = h;
      h = exp(rate * delta_sums[chunk * in.channels + channel]) * h + own;
    }
    state[item] = h;
  }
}

// y, and the state after the last chunk, from the states before the chunks.
template <class T>
__global__ void __launch_bounds__(kScanThreads)
    forward(SelectiveScanInput<T> in, int lanes, int64_t items, const compute_t<T>* chunk_states,
            T* y) {
  using C = compute_t<T>;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Lane<T> own(in, lanes, item);
    const auto rates = own.rates();
    const C direct = own.has_channel ? in.direct[own.channel] : C(0);
    Pack<C, kStates> h = own.read(chunk_states + own.place()), decay;
    MBLM_UNROLL
    for (int t = 0; t < own.positions; ++t) {
      const C step = own.of_channel(in.delta, t), input = own.of_channel_rounded(in.x, t);
      advance(rates, step, step * input, own.weights(in.weight_in, t), decay, h);
      const auto weight_out = own.weights(in.weight_out, t);
      C out = 0;
      for (int n = 0; n < kStates; ++n) out += weight_out.values[n] * h.values[n];
      out = own.sum_of_channel(out);
      if (own.is_first_of_channel()) {
        y[(own.position + t) * in.channels + own.channel] = rounded<T>(out + direct * input);
      }
    }
  }
}

}  // namespace

template <class T>
Error join(const SelectiveScanInput<T>& in, bool backwards, const compute_t<T>* delta_sums,
           compute_t<T>* parts, compute_t<T>* state, Stream stream) {
  return launch(join_chunks<T>, divide_up(in.rows * in.channels * in.states, kThreads), kThreads, 0,
                stream, in, divide_up(in.length, in.chunk_size), backwards, delta_sums, parts,
                state);
}

int64_t selective_scan_parts(int64_t channels, int64_t padded_states) {
  return divide_up(channels, kScanThreads / lanes_for(padded_states));
}

template <class T>
Error selective_scan(const SelectiveScanInput<T>& in, T* y, compute_t<T>* state,
                     compute_t<T>* chunk_states, compute_t<T>* delta_sums, Stream stream) {
  const int lanes = lanes_for(in.padded_states);
  const int64_t items = item_count(in);
  return first_error(
      {launch(ends_of_chunks<T>, items, kScanThreads, 0, stream, in, lanes, items, chunk_states,
              delta_sums),
       join(in, false, delta_sums, chunk_states, state, stream),
       launch(forward<T>, items, kScanThreads, 0, stream, in, lanes, items, chunk_states, y)});
}

MBLM_INSTANTIATE(join)
MBLM_INSTANTIATE(selective_scan)

}  // namespace mblm::cuda
