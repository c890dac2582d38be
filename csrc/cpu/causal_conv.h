// Short depthwise causal convolution and SiLU, forward and backward.
//
// With e = concat(window, x), y_t = silu(bias + sum over k of weight_k e_{t+k}), per channel.
// T is float, double or BFloat16.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

// Work is cut into blocks of positions and tiles of channels.
constexpr int64_t kConvPositions = 32, kConvTile = 64;

template <class T>
struct CausalConvInput {
  int64_t rows, length, channels, taps;
  const T* x;  // (rows, L, D), channels contiguous
  int64_t x_row_stride, x_position_stride;
  const T* window;                  // (rows, K - 1, D), contiguous; null for zeros
  const compute_t<T>* weight_bias;  // (K + 1, D): a row per tap, then the bias

  // A row without positions has one block, which is empty.
  int64_t blocks() const { return length > 0 ? (length + kConvPositions - 1) / kConvPositions : 1; }
  int64_t tiles() const { return (channels + kConvTile - 1) / kConvTile; }
};

// Items [begin, end) of rows * blocks * tiles. y is (rows, L, D).
template <class T>
void causal_conv(const CausalConvInput<T>& in, T* y, int64_t begin, int64_t end);

template <class T>
struct CausalConvGradients {
  const T* y;                 // (rows, L, D), contiguous, given
  const T* next_window;       // (rows, K - 1, D), contiguous, given; null for zeros
  T* x;                       // (rows, L, D), set
  T* window;                  // (rows, K - 1, D), set
  compute_t<T>* weight_bias;  // (K + 1, D), set for the tile's channels to the blocks' sum
};

// One tile of channels in blocks [begin, end) of rows * blocks.
template <class T>
void causal_conv_backward(const CausalConvInput<T>& in, const CausalConvGradients<T>& grad,
                          int64_t tile, int64_t begin, int64_t end);

}  // namespace mblm::cpu
