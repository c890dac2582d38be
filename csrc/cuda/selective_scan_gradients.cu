// The gradients of Mamba-1's selective scan: see selective_scan.cuh.
#include "cuda/selective_scan.cuh"

namespace mblm::cuda {
namespace {

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
  constexpr int kScanWarps = kScanThreads / kWarp;
  const int warp = threadIdx.x / kWarp, row_states = lanes * kStates;
  C* const sums = shared_memory<C>();  // (warps, 2, span, states)
  C* const own_sums = sums + warp * 2 * kSpan * row_states;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Lane<T> own(in, lanes, item);
    const auto rates = own.rates();
    const C direct = own.has_channel ? in.direct[own.channel] : C(0);
    C* const kept = kept_in_shared ? sums + kScanWarps * 2 * kSpan * row_states
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
        for (int w = 0; w < kScanWarps; ++w) {
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

}  // namespace

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
  const bool in_shared = keeps_in_shared(in);
  const int64_t sums = int64_t(kScanThreads / kWarp) * 2 * kSpan * lanes * kStates;
  const int64_t kept = in_shared ? int64_t(spans) * kScanThreads * kStates : 0;
  return first_error({launch(starts_of_chunks<T>, items, kScanThreads, 0, stream, in, lanes, items,
                             grad.y, grad.carries, grad.delta_sums),
                      join(in, true, grad.delta_sums, grad.carries, grad.state, stream),
                      launch(backward<T>, items, kScanThreads, size_t(sums + kept) * sizeof(C),
                             stream, in, lanes, items, spans, in_shared, grad)});
}

MBLM_INSTANTIATE(selective_scan_kept)
MBLM_INSTANTIATE(selective_scan_backward)

}  // namespace mblm::cuda
