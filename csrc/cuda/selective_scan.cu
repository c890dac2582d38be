// Mamba-1's selective scan: see selective_scan.h.
//
// All chunks are worked on at once: first each from a zero state, to its end; then the states
// before the chunks follow from those ends, one after the other; then each chunk again, from the
// state before it. Gradients go the other way likewise.
//
// Four states of a channel are in a lane, the lanes of a channel next to each other, a power of two
// of them. A block takes a tile of channels of one chunk; all its threads take every turn of every
// loop, those beyond the channels or states with zeros.
#include "cuda/kernel.cuh"
#include "cuda/selective_scan.h"

namespace mblm::cuda {
namespace {

using cpu::SelectiveScanInput;

constexpr int kStates = 4;  // of a lane
constexpr int kScanThreads = 128;

int lanes_for(int64_t padded_states) {
  int lanes = 1;
  while (lanes * kStates < padded_states) lanes *= 2;
  return lanes;
}

// What a thread works on.
template <class T>
struct Lane {
  using C = compute_t<T>;
  using States = Pack<C, kStates>;
  const SelectiveScanInput<T>& in;
  int lanes;         // of a channel
  int state;         // the lane's first
  int positions;     // of the chunk
  int64_t unit;      // the chunk, among all rows'
  int64_t position;  // the chunk's first, among all rows'
  int64_t tile, channel;
  bool has_channel, has_states;

  MBLM_DEVICE Lane(const SelectiveScanInput<T>& in, int lanes, int64_t item)
      : in(in), lanes(lanes) {
    const int64_t chunks = (in.length + in.chunk_size - 1) / in.chunk_size;
    const int64_t tile_channels = kScanThreads / lanes;
    const int64_t tiles = (in.channels + tile_channels - 1) / tile_channels;
    unit = quotient(item, tiles);
    tile = item - unit * tiles;
    const int64_t row = quotient(unit, chunks), chunk = unit - row * chunks;
    channel = tile * tile_channels + threadIdx.x / lanes;
    state = threadIdx.x % lanes * kStates;
    const int64_t start = chunk * in.chunk_size, left = in.length - start;
    position = row * in.length + start;
    positions = int(left < in.chunk_size ? left : in.chunk_size);
    has_channel = channel < in.channels;
    has_states = has_channel && state < in.padded_states;
  }

  MBLM_DEVICE C of_channel(const C* values, int t) const {
    return has_channel ? values[(position + t) * in.channels + channel] : C(0);
  }
  MBLM_DEVICE C of_channel_rounded(const T* values, int t) const {
    return has_channel ? value_of(values[(position + t) * in.channels + channel]) : C(0);
  }

  // Of B or C, at a position.
  MBLM_DEVICE States weights(const C* values, int t) const {
    if (!has_states) return {};
    return load_pack<kStates>(values + (position + t) * in.padded_states + state);
  }
  // Of A.
  MBLM_DEVICE States rates() const {
    if (!has_states) return {};
    return load_pack<kStates>(in.rates + channel * in.padded_states + state);
  }

  // Of this chunk and channel, in a tensor (rows, chunks, D).
  MBLM_DEVICE int64_t chunk_channel() const { return unit * in.channels + channel; }
  // These states in a tensor (rows, chunks, D, N).
  MBLM_DEVICE int64_t place() const { return chunk_channel() * in.states + state; }
  MBLM_DEVICE States read(const C* from) const {
    States states = {};
    for (int n = 0; n < kStates; ++n) {
      if (has_channel && state + n < in.states) states.values[n] = from[n];
    }
    return states;
  }
  MBLM_DEVICE void write(const States& states, C* to) const {
    for (int n = 0; n < kStates; ++n) {
      if (has_channel && state + n < in.states) to[n] = states.values[n];
    }
  }

  // The same sum in all lanes of a channel.
  MBLM_DEVICE C sum_of_channel(C value) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
  }
  // The same sum over the warp's channels, for each of their lanes.
  MBLM_DEVICE C sum_over_channels(C value) const {
    for (int offset = kWarp / 2; offset >= lanes; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
  }

  MBLM_DEVICE bool is_first_of_channel() const { return has_channel && state == 0; }
};

// exp(delta_t A) and h_t from h_{t-1}.
template <class C>
MBLM_DEVICE void advance(const Pack<C, kStates>& rates, C step, C arriving,
                         const Pack<C, kStates>& weight_in, Pack<C, kStates>& decay,
                         Pack<C, kStates>& h) {
  for (int n = 0; n < kStates; ++n) {
    decay.values[n] = exp(rates.values[n] * step);
    h.values[n] = decay.values[n] * h.values[n] + weight_in.values[n] * arriving;
  }
}

template <class T>
int64_t item_count(const SelectiveScanInput<T>& in) {
  const int64_t chunks = divide_up(in.length, in.chunk_size);
  return in.rows * chunks * selective_scan_parts(in.channels, in.padded_states);
}

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

// The gradient of the state before each chunk from zero for the one after it, and the sum of delta.
template <class T>
__global__ void __launch_bounds__(kScanThreads)
    starts_of_chunks(SelectiveScanInput<T> in, int lanes, int64_t items, const T* grad_y,
                     compute_t<T>* starts, compute_t<T>* delta_sums) {
  using C = compute_t<T>;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Lane<T> own(in, lanes, item);
    const auto rates = own.rates();
    Pack<C, kStates> carry = {};
    C sum = 0;
    MBLM_UNROLL
    for (int t = own.positions - 1; t >= 0; --t) {
      const C step = own.of_channel(in.delta, t), out = own.of_channel_rounded(grad_y, t);
      const auto weight_out = own.weights(in.weight_out, t);
      for (int n = 0; n < kStates; ++n) {
        carry.values[n] =
            exp(rates.values[n] * step) * (weight_out.values[n] * out + carry.values[n]);
      }
      sum += step;
    }
    own.write(carry, starts + own.place());
    if (own.is_first_of_channel()) delta_sums[own.chunk_channel()] = sum;
  }
}

// Puts the parts of the chunks together: state is what enters the first, in the order of the walk,
// and becomes what leaves the last; parts (rows, chunks, D, N) become what enters each chunk. A
// thread takes a state.
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

// Positions whose states are kept in registers on the way back.
constexpr int kSpan = 4;

// All gradients but that of the first state, given what enters each chunk from the end. The
// formulas are in cpu/selective_scan.cpp. `kept`, a pack for each thread and span of a chunk, is in
// shared memory where it fits.
template <class T>
__global__ void __launch_bounds__(kScanThreads)
    backward(SelectiveScanInput<T> in, int lanes, int64_t items, int spans, bool kept_in_shared,
             SelectiveScanGradients<T> grad) {
  using C = compute_t<T>;
  using States = Pack<C, kStates>;
  constexpr int kWarps = kScanThreads / kWarp;
  const int warp = threadIdx.x / kWarp, row_states = lanes * kStates;
  C* const sums = shared_memory<C>();  // (warps, 2, span, states)
  C* const own_sums = sums + warp * 2 * kSpan * row_states;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Lane<T> own(in, lanes, item);
    const auto rates = own.rates();
    const C direct = own.has_channel ? in.direct[own.channel] : C(0);
    C* const kept = kept_in_shared ? sums + kWarps * 2 * kSpan * row_states
                                   : grad.kept + item * spans * kScanThreads * kStates;
    const auto kept_at = [&](int span) {
      return kept + (span * kScanThreads + threadIdx.x) * kStates;
    };

    States h = own.read(grad.chunk_states + own.place()), ignored;
    for (int t = 0; t < own.positions; ++t) {
      if (t % kSpan == 0) store_pack(kept_at(t / kSpan), h);
      const C step = own.of_channel(in.delta, t);
      advance(rates, step, step * own.of_channel_rounded(in.x, t), own.weights(in.weight_in, t),
              ignored, h);
    }

    States carry = own.read(grad.carries + own.place()), grad_rates = {};
    C grad_direct = 0;
    for (int start = (own.positions - 1) / kSpan * kSpan; start >= 0; start -= kSpan) {
      const int positions = own.positions - start;  // from here on, kSpan of which are in the span
      const States before = load_pack<kStates>(kept_at(start / kSpan));
      States decays[kSpan], after[kSpan];
      h = before;
      MBLM_UNROLL_ALL
      for (int i = 0; i < kSpan; ++i) {
        const bool is_there = i < positions;
        const C step = is_there ? own.of_channel(in.delta, start + i) : C(0);
        const C input = is_there ? own.of_channel_rounded(in.x, start + i) : C(0);
        const States weight_in = is_there ? own.weights(in.weight_in, start + i) : States{};
        advance(rates, step, step * input, weight_in, decays[i], h);
        after[i] = h;
      }
      MBLM_UNROLL_ALL
      for (int i = kSpan - 1; i >= 0; --i) {
        if (i >= positions) continue;
        const int t = start + i;
        const C step = own.of_channel(in.delta, t), input = own.of_channel_rounded(in.x, t);
        const C out = own.of_channel_rounded(grad.y, t);
        const States weight_in = own.weights(in.weight_in, t);
        const States weight_out = own.weights(in.weight_out, t);
        C through_input = 0, through_rate = 0;
        for (int n = 0; n < kStates; ++n) {
          const C g = weight_out.values[n] * out + carry.values[n];
          const C entering = g * decays[i].values[n];
          const C e = entering * (i > 0 ? after[i > 0 ? i - 1 : 0] : before).values[n];
          carry.values[n] = entering;
          grad_rates.values[n] += e * step;
          through_input += g * weight_in.values[n];
          through_rate += e * rates.values[n];
          const C of_in = own.sum_over_channels(g * step * input);
          const C of_out = own.sum_over_channels(after[i].values[n] * out);
          if (threadIdx.x % kWarp < unsigned(lanes)) {
            own_sums[i * row_states + own.state + n] = of_in;
            own_sums[(kSpan + i) * row_states + own.state + n] = of_out;
          }
        }
        through_input = own.sum_of_channel(through_input);
        through_rate = own.sum_of_channel(through_rate);
        grad_direct += out * input;
        if (own.is_first_of_channel()) {
          const int64_t at = (own.position + t) * in.channels + own.channel;
          grad.x[at] = rounded<T>(step * through_input + direct * out);
          grad.delta[at] = input * through_input + through_rate;
        }
      }
      __syncthreads();
      // Over the warps, to the part of this tile of channels.
      const int here = positions < kSpan ? positions : kSpan;
      const int64_t to = own.tile * in.rows * in.length + own.position + start;
      for (int i = threadIdx.x; i < 2 * here * int(in.padded_states); i += kScanThreads) {
        const int which = i / (here * int(in.padded_states)),
                  rest = i % (here * int(in.padded_states));
        const int t = rest / int(in.padded_states), n = rest % int(in.padded_states);
        C sum = 0;
        for (int w = 0; w < kWarps; ++w) {
          sum += sums[((w * 2 + which) * kSpan + t) * row_states + n];
        }
        (which == 0 ? grad.weight_in : grad.weight_out)[(to + t) * in.padded_states + n] = sum;
      }
      __syncthreads();
    }
    if (own.has_states) {
      store_pack(grad.rates + own.chunk_channel() * in.padded_states + own.state, grad_rates);
    }
    if (own.is_first_of_channel()) grad.direct[own.chunk_channel()] = grad_direct;
  }
}

template <class T>
int spans_of(const SelectiveScanInput<T>& in) {
  const int64_t positions = in.length < in.chunk_size ? in.length : in.chunk_size;
  return int(divide_up(positions, kSpan));
}

template <class T>
bool keeps_in_shared(const SelectiveScanInput<T>& in) {
  constexpr size_t kMaxKept = 64 * 1024;
  return spans_of(in) * kScanThreads * kStates * sizeof(compute_t<T>) <= kMaxKept;
}

template <class T>
Error join(const SelectiveScanInput<T>& in, bool backwards, const compute_t<T>* delta_sums,
           compute_t<T>* parts, compute_t<T>* state, Stream stream) {
  return launch(join_chunks<T>, divide_up(in.rows * in.channels * in.states, kThreads), kThreads, 0,
                stream, in, divide_up(in.length, in.chunk_size), backwards, delta_sums, parts,
                state);
}

}  // namespace

int64_t selective_scan_parts(int64_t channels, int64_t padded_states) {
  return divide_up(channels, kScanThreads / lanes_for(padded_states));
}

template <class T>
Error selective_scan(const SelectiveScanInput<T>& in, T* y, compute_t<T>* state,
                     compute_t<T>* chunk_states, compute_t<T>* delta_sums, Stream stream) {
  const int lanes = lanes_for(in.padded_states);
  const int64_t items = item_count(in);
  if (const Error error = launch(ends_of_chunks<T>, items, kScanThreads, 0, stream, in, lanes,
                                 items, chunk_states, delta_sums)) {
    return error;
  }
  if (const Error error = join(in, false, delta_sums, chunk_states, state, stream)) return error;
  return launch(forward<T>, items, kScanThreads, 0, stream, in, lanes, items, chunk_states, y);
}

template <class T>
int64_t selective_scan_kept(const SelectiveScanInput<T>& in) {
  return keeps_in_shared(in) ? 0 : item_count(in) * spans_of(in) * kScanThreads * kStates;
}

template <class T>
Error selective_scan_backward(const SelectiveScanInput<T>& in,
                              const SelectiveScanGradients<T>& grad, Stream stream) {
  using C = compute_t<T>;
  const int lanes = lanes_for(in.padded_states), spans = spans_of(in);
  const int64_t items = item_count(in);
  if (const Error error = launch(starts_of_chunks<T>, items, kScanThreads, 0, stream, in, lanes,
                                 items, grad.y, grad.carries, grad.delta_sums)) {
    return error;
  }
  if (const Error error = join(in, true, grad.delta_sums, grad.carries, grad.state, stream)) {
    return error;
  }
  const bool in_shared = keeps_in_shared(in);
  const int64_t sums = int64_t(kScanThreads / kWarp) * 2 * kSpan * lanes * kStates;
  const int64_t kept = in_shared ? int64_t(spans) * kScanThreads * kStates : 0;
  return launch(backward<T>, items, kScanThreads, size_t(sums + kept) * sizeof(C), stream, in,
                lanes, items, spans, in_shared, grad);
}

#define MBLM_INSTANTIATE(T)                                                                        \
  template Error selective_scan<T>(const SelectiveScanInput<T>&, T*, compute_t<T>*, compute_t<T>*, \
                                   compute_t<T>*, Stream);                                         \
  template int64_t selective_scan_kept<T>(const SelectiveScanInput<T>&);                           \
  template Error selective_scan_backward<T>(const SelectiveScanInput<T>&,                          \
                                            const SelectiveScanGradients<T>&, Stream)
MBLM_FOR_EACH_TYPE(MBLM_INSTANTIATE)
#undef MBLM_INSTANTIATE

}  // namespace mblm::cuda
