// Short depthwise causal convolution and SiLU: see causal_conv.h.
//
// A thread takes one channel and walks along a block of positions with the last K inputs at hand.
#include <algorithm>

#include "cuda/causal_conv.h"
#include "cuda/kernel.cuh"

namespace mblm::cuda {
namespace {

using cpu::CausalConvGradients;
using cpu::CausalConvInput;
using cpu::kConvPositions;

constexpr int kConvThreads = 128;

// Some values of a thread: in registers for as many as the compiler knows; else, for kCount 0, in
// shared memory, a column for each thread.
template <class C, int kCount>
struct Values {
  C values[kCount] = {};
  MBLM_DEVICE Values(C*& /*shared*/, int64_t /*count*/) {}
  MBLM_DEVICE C& operator[](int64_t k) { return values[k]; }
};
template <class C>
struct Values<C, 0> {
  C* column;
  MBLM_DEVICE Values(C*& shared, int64_t count) : column(shared + threadIdx.x) {
    shared += count * kConvThreads;
  }
  MBLM_DEVICE C& operator[](int64_t k) { return column[k * kConvThreads]; }
};

// Drops the first value and puts one at the end.
template <class V, class C>
MBLM_DEVICE void push(V& values, int64_t count, C last) {
  for (int64_t k = 0; k + 1 < count; ++k) values[k] = values[k + 1];
  values[count - 1] = last;
}

// Entry e of concat(window, x) of one row and channel.
template <class T>
MBLM_DEVICE compute_t<T> entry(const CausalConvInput<T>& in, int64_t row, int64_t channel,
                               int64_t e) {
  const int64_t before = in.taps - 1;
  if (e >= before) {
    return value_of(in.x[row * in.x_row_stride + (e - before) * in.x_position_stride + channel]);
  }
  return in.window ? value_of(in.window[(row * before + e) * in.channels + channel])
                   : compute_t<T>(0);
}

// kTaps is 0 for a number that the compiler does not know.
template <class T, int kTaps>
__global__ void __launch_bounds__(kConvThreads, 1)
    forward(CausalConvInput<T> in, int64_t blocks, T* y) {
  using C = compute_t<T>;
  const int64_t taps = kTaps ? kTaps : in.taps, items = in.rows * blocks * in.channels;
  C* shared = kTaps ? nullptr : shared_memory<C>();
  Values<C, kTaps ? kTaps + 1 : 0> weight(shared, taps + 1);
  Values<C, kTaps> inputs(shared, taps);
  for (int64_t item = int64_t(blockIdx.x) * kConvThreads + threadIdx.x; item < items;
       item += int64_t(gridDim.x) * kConvThreads) {
    const int64_t unit = quotient(item, in.channels), channel = item - unit * in.channels;
    const int64_t row = quotient(unit, blocks), start = (unit - row * blocks) * kConvPositions;
    const int64_t stop = start + kConvPositions < in.length ? start + kConvPositions : in.length;
    for (int64_t k = 0; k <= taps; ++k) weight[k] = in.weight_bias[k * in.channels + channel];
    for (int64_t k = 1; k < taps; ++k) inputs[k] = entry(in, row, channel, start + k - 1);
    const T* x = in.x + row * in.x_row_stride + channel;
    T* to = y + row * in.length * in.channels + channel;
    MBLM_UNROLL
    for (int64_t t = start; t < stop; ++t) {
      push(inputs, taps, value_of(x[t * in.x_position_stride]));
      C sum = weight[taps];
      for (int64_t k = 0; k < taps; ++k) sum += weight[k] * inputs[k];
      to[t * in.channels] = rounded<T>(sum / (C(1) + exp(-sum)));
    }
  }
}

// A thread takes a channel in one part of the blocks of positions.
template <class T, int kTaps>
__global__ void __launch_bounds__(kConvThreads, 1)
    backward(CausalConvInput<T> in, CausalConvGradients<T> grad, int64_t blocks, int64_t parts) {
  using C = compute_t<T>;
  const int64_t taps = kTaps ? kTaps : in.taps, before = taps - 1, units = in.rows * blocks;
  const int64_t each = (units + parts - 1) / parts;
  C* shared = kTaps ? nullptr : shared_memory<C>();
  Values<C, kTaps ? kTaps + 1 : 0> weight(shared, taps + 1), sums(shared, taps + 1);
  Values<C, kTaps> inputs(shared, taps), grads(shared, taps);  // of the convolution, at t - k
  for (int64_t item = int64_t(blockIdx.x) * kConvThreads + threadIdx.x; item < parts * in.channels;
       item += int64_t(gridDim.x) * kConvThreads) {
    const int64_t part = quotient(item, in.channels), channel = item - part * in.channels;
    for (int64_t k = 0; k <= taps; ++k) {
      weight[k] = in.weight_bias[k * in.channels + channel];
      sums[k] = 0;
    }
    const int64_t end = (part + 1) * each < units ? (part + 1) * each : units;
    for (int64_t unit = part * each; unit < end; ++unit) {
      const int64_t row = quotient(unit, blocks), start = (unit - row * blocks) * kConvPositions;
      const int64_t stop = start + kConvPositions < in.length ? start + kConvPositions : in.length;
      const T* x = in.x + row * in.x_row_stride + channel;
      const T* from = grad.y + row * in.length * in.channels + channel;
      for (int64_t k = 0; k < taps; ++k) {
        grads[k] = 0;
        if (k > 0) inputs[k] = entry(in, row, channel, start + k - 1);
      }
      // Entry e of concat(window, x) takes part in positions e - before to e; those of the first
      // entries are known to the block before.
      const int64_t first = start > 0 ? start + before : 0;
      for (int64_t e = start; e < stop + before; ++e) {
        C g = 0;
        if (e < in.length) {
          push(inputs, taps, value_of(x[e * in.x_position_stride]));
          C sum = weight[taps];
          for (int64_t k = 0; k < taps; ++k) sum += weight[k] * inputs[k];
          const C gate = C(1) / (C(1) + exp(-sum));
          g = value_of(from[e * in.channels]) * gate * (C(1) + sum * (C(1) - gate));
        }
        push(grads, taps, g);
        if (e < stop) {
          for (int64_t k = 0; k < taps; ++k) sums[k] += g * inputs[k];
          sums[taps] += g;
        }
        if (e < first) continue;
        C sum = 0;
        if (grad.next_window && e >= in.length) {
          sum = value_of(grad.next_window[(row * before + e - in.length) * in.channels + channel]);
        }
        for (int64_t k = 0; k < taps; ++k) sum += weight[k] * grads[before - k];
        T* to = e < before ? grad.window + (row * before + e) * in.channels
                           : grad.x + (row * in.length + e - before) * in.channels;
        to[channel] = rounded<T>(sum);
      }
    }
    for (int64_t k = 0; k <= taps; ++k) {
      grad.weight_bias[(part * (taps + 1) + k) * in.channels + channel] = sums[k];
    }
  }
}

}  // namespace

template <class T>
Error causal_conv(const CausalConvInput<T>& in, T* y, Stream stream) {
  const auto kernel = in.taps == 4   ? forward<T, 4>
                      : in.taps == 3 ? forward<T, 3>
                      : in.taps == 2 ? forward<T, 2>
                                     : forward<T, 0>;
  const bool known = in.taps >= 2 && in.taps <= 4;
  const size_t shared = known ? 0 : size_t(2 * in.taps + 1) * kConvThreads * sizeof(compute_t<T>);
  const int64_t blocks = in.blocks();
  return launch(kernel, divide_up(in.rows * blocks * in.channels, kConvThreads), kConvThreads,
                shared, stream, in, blocks, y);
}

template <class T>
int64_t causal_conv_parts(const CausalConvInput<T>& in) {
  constexpr int64_t kMaxParts = 512;
  return std::min(in.rows * in.blocks(), kMaxParts);
}

template <class T>
Error causal_conv_backward(const CausalConvInput<T>& in, const CausalConvGradients<T>& grad,
                           Stream stream) {
  const auto kernel = in.taps == 4   ? backward<T, 4>
                      : in.taps == 3 ? backward<T, 3>
                      : in.taps == 2 ? backward<T, 2>
                                     : backward<T, 0>;
  const bool known = in.taps >= 2 && in.taps <= 4;
  const size_t shared = known ? 0 : size_t(4 * in.taps + 2) * kConvThreads * sizeof(compute_t<T>);
  const int64_t parts = causal_conv_parts(in);
  return launch(kernel, divide_up(parts * in.channels, kConvThreads), kConvThreads, shared, stream,
                in, grad, in.blocks(), parts);
}

MBLM_INSTANTIATE(causal_conv)
MBLM_INSTANTIATE(causal_conv_parts)
MBLM_INSTANTIATE(causal_conv_backward)

}  // namespace mblm::cuda
