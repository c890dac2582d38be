// Mamba-1's selective scan: see selective_scan.h.
//
// A channel's states are walked in lanes, its positions one after the other. A tile of channels is
// read and written together, so that whole cache lines are used.
#include "cpu/selective_scan.h"

#include <algorithm>
#include <vector>

#include "cpu/lanes.h"

namespace mblm::cpu {

// What one tile reads or writes at the positions of one chunk: (positions, kScanTile).
template <class C, class T>
MBLM_INLINE void read_tile(const T* from, int64_t stride, int64_t positions, int64_t channels,
                           C* to) {
  for (int64_t t = 0; t < positions; ++t) convert(from + t * stride, channels, to + t * kScanTile);
}

template <class C, class T>
MBLM_INLINE void write_tile(const C* from, int64_t stride, int64_t positions, int64_t channels,
                            T* to) {
  for (int64_t t = 0; t < positions; ++t) convert(from + t * kScanTile, channels, to + t * stride);
}

// One channel over the positions of a chunk, from state and to state; y is (positions, kScanTile).
template <class C>
MBLM_INLINE void scan_channel(int64_t positions, int64_t states, const C* delta, const C* x,
                              const C* rates, const C* weight_in, const C* weight_out, C direct,
                              C* state, C* y) {
  for (int64_t t = 0; t < positions; ++t) {
    const C step = delta[t * kScanTile], input = x[t * kScanTile];
    const C arriving = step * input;
    const C* b = weight_in + t * states;
    const C* c = weight_out + t * states;
    Lanes<C> out{};
    for (int64_t n = 0; n < states; n += kLaneCount<C>) {
      const Lanes<C> h = exp(load(rates + n) * step) * load(state + n) + load(b + n) * arriving;
      store(state + n, h);
      out += load(c + n) * h;
    }
    y[t * kScanTile] = sum(out) + direct * input;
  }
}

template <class T>
MBLM_CLONES void selective_scan(const SelectiveScanInput<T>& in, T* y, compute_t<T>* state,
                                compute_t<T>* chunk_states, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t tiles = (in.channels + kScanTile - 1) / kScanTile;
  const int64_t chunks = (in.length + in.chunk_size - 1) / in.chunk_size;
  const int64_t span = std::min(in.chunk_size, in.length) * kScanTile;
  std::vector<C> x(span), delta(span), out(span), states(kScanTile * in.padded_states);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / tiles, channel = item % tiles * kScanTile;
    const int64_t channels = std::min(kScanTile, in.channels - channel);
    C* own_state = state + (row * in.channels + channel) * in.states;
    for (int64_t c = 0; c < channels; ++c) {
      std::copy_n(own_state + c * in.states, in.states, states.data() + c * in.padded_states);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t position = row * in.length + chunk * in.chunk_size;
      const int64_t positions = std::min(in.chunk_size, in.length - chunk * in.chunk_size);
      const int64_t at = position * in.channels + channel;
      C* kept = chunk_states + ((row * chunks + chunk) * in.channels + channel) * in.states;
      read_tile(in.x + at, in.channels, positions, channels, x.data());
      read_tile(in.delta + at, in.channels, positions, channels, delta.data());
      for (int64_t c = 0; c < channels; ++c) {
        C* h = states.data() + c * in.padded_states;
        std::copy_n(h, in.states, kept + c * in.states);
        scan_channel(
            positions, in.padded_states, delta.data() + c, x.data() + c,
            in.rates + (channel + c) * in.padded_states, in.weight_in + position * in.padded_states,
            in.weight_out + position * in.padded_states, in.direct[channel + c], h, out.data() + c);
      }
      write_tile(out.data(), in.channels, positions, channels, y + at);
    }
    for (int64_t c = 0; c < channels; ++c) {
      std::copy_n(states.data() + c * in.padded_states, in.states, own_state + c * in.states);
    }
  }
}

// The decay and the state at each position of a chunk, (positions, states); before is the state
// that precedes the first and lies just before `after`.
template <class C>
MBLM_INLINE void recompute(int64_t positions, int64_t states, const C* delta, const C* x,
                           const C* rates, const C* weight_in, C* decay, C* after) {
  for (int64_t t = 0; t < positions; ++t) {
    const C step = delta[t * kScanTile], arriving = step * x[t * kScanTile];
    const C* b = weight_in + t * states;
    const int64_t at = t * states;
    for (int64_t n = 0; n < states; n += kLaneCount<C>) {
      const Lanes<C> kept = exp(load(rates + n) * step);
      store(decay + at + n, kept);
      store(after + at + n, kept * load(after + at - states + n) + load(b + n) * arriving);
    }
  }
}

// One channel's part in the gradients of a chunk. With g the gradient of the state after position
// t and e that of delta_t A, per state:
//   g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1},  e_t = g_t exp(delta_t A) h_{t-1},
//   dC_t += dy_t h_t, dB_t += delta_t x_t g_t, dA += delta_t e_t,
//   d(delta_t x_t) = sum g_t B_t, ddelta_t = x_t d(delta_t x_t) + sum e_t A.
template <class C>
struct ChannelGradients {
  const C* y;     // (positions, kScanTile)
  C* x;           // the same
  C* delta;       // the same
  C* state;       // (states)
  C* rates;       // (states)
  C* direct;      // one
  C* weight_in;   // (positions, states)
  C* weight_out;  // (positions, states)
};

template <class C>
MBLM_INLINE void channel_backward(int64_t positions, int64_t states, const C* delta, const C* x,
                                  const C* rates, const C* weight_in, const C* weight_out, C direct,
                                  const C* decay, const C* after, const ChannelGradients<C>& grad) {
  for (int64_t t = positions - 1; t >= 0; --t) {
    const C step = delta[t * kScanTile], input = x[t * kScanTile], out = grad.y[t * kScanTile];
    const C arriving = step * input;
    const int64_t at = t * states;
    Lanes<C> through_input{}, through_rate{};
    for (int64_t n = 0; n < states; n += kLaneCount<C>) {
      const Lanes<C> g = load(weight_out + at + n) * out + load(grad.state + n);
      const Lanes<C> before = g * load(decay + at + n);
      const Lanes<C> e = before * load(after + at - states + n);
      store(grad.state + n, before);
      store(grad.weight_out + at + n, load(grad.weight_out + at + n) + load(after + at + n) * out);
      store(grad.weight_in + at + n, load(grad.weight_in + at + n) + g * arriving);
      store(grad.rates + n, load(grad.rates + n) + e * step);
      through_input += g * load(weight_in + at + n);
      through_rate += e * load(rates + n);
    }
    const C grad_arriving = sum(through_input);
    grad.x[t * kScanTile] = step * grad_arriving + direct * out;
    grad.delta[t * kScanTile] = input * grad_arriving + sum(through_rate);
    *grad.direct += out * input;
  }
}

template <class T>
MBLM_CLONES void selective_scan_backward(const SelectiveScanInput<T>& in,
                                         const compute_t<T>* chunk_states, int64_t chunk,
                                         const SelectiveScanGradients<T>& grad, int64_t row_begin,
                                         int64_t row_end, int64_t channel_begin,
                                         int64_t channel_end) {
  using C = compute_t<T>;
  const int64_t start = chunk * in.chunk_size, padded = in.padded_states;
  const int64_t positions = std::min(in.chunk_size, in.length - start);
  const int64_t chunks = (in.length + in.chunk_size - 1) / in.chunk_size;
  const int64_t span = positions * kScanTile;
  std::vector<C> x(span), delta(span), grad_y(span), grad_x(span), grad_delta(span);
  std::vector<C> decay(positions * padded), states((positions + 1) * padded), carry(padded);
  C* after = states.data() + padded;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t position = row * in.length + start;
    const C* weight_in = in.weight_in + position * padded;
    const C* weight_out = in.weight_out + position * padded;
    for (int64_t channel = channel_begin; channel < channel_end; channel += kScanTile) {
      const int64_t channels = std::min(kScanTile, channel_end - channel);
      const int64_t at = position * in.channels + channel;
      read_tile(in.x + at, in.channels, positions, channels, x.data());
      read_tile(in.delta + at, in.channels, positions, channels, delta.data());
      read_tile(grad.y + at, in.channels, positions, channels, grad_y.data());
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t own = channel + c;
        const C* rates = in.rates + own * padded;
        const C* before = chunk_states + ((row * chunks + chunk) * in.channels + own) * in.states;
        C* grad_state = grad.state + (row * in.channels + own) * in.states;
        std::copy_n(before, in.states, states.data());
        std::copy_n(grad_state, in.states, carry.data());
        recompute(positions, padded, delta.data() + c, x.data() + c, rates, weight_in, decay.data(),
                  after);
        channel_backward<C>(positions, padded, delta.data() + c, x.data() + c, rates, weight_in,
                            weight_out, in.direct[own], decay.data(), after,
                            {grad_y.data() + c, grad_x.data() + c, grad_delta.data() + c,
                             carry.data(), grad.rates + own * padded, grad.direct + own,
                             grad.weight_in + row * positions * padded,
                             grad.weight_out + row * positions * padded});
        std::copy_n(carry.data(), in.states, grad_state);
      }
      write_tile(grad_x.data(), in.channels, positions, channels, grad.x + at);
      write_tile(grad_delta.data(), in.channels, positions, channels, grad.delta + at);
    }
  }
}

MBLM_INSTANTIATE(selective_scan)
MBLM_INSTANTIATE(selective_scan_backward)

}  // namespace mblm::cpu
