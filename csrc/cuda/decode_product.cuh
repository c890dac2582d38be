// What the kernels of decode_product.h share: how weights are read, and what becomes of a sum.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/copy_async.cuh"
#include "cuda/decode.cuh"
#include "cuda/decode_product.h"
#include "cuda/kernel.cuh"

namespace mblm::cuda {

constexpr int kQuad = 4;  // floats that are read at once

// A row of weights: those of a column of the results.
template <class W>
MBLM_DEVICE const W* weights_of(const Product& in, int64_t column) {
  const int64_t of_second = column - in.matrix.outputs;
  return of_second < 0 ? static_cast<const W*>(in.matrix.weight) + column * in.matrix.inputs
                       : static_cast<const W*>(in.second.weight) + of_second * in.matrix.inputs;
}

// Asks for what later kernels read, each block for its share.
MBLM_DEVICE void ask_ahead(const Product& in) {
  constexpr uint32_t kLine = 128;
  if (threadIdx.x > 0) return;
  MBLM_UNROLL_ALL
  for (const Ahead::Part& ahead : in.ahead.parts) {
    const uint32_t share = (ahead.bytes / gridDim.x + kLine) / kLine * kLine;
    const uint64_t begin = uint64_t(blockIdx.x) * share;
    if (begin >= ahead.bytes) continue;
    const uint32_t left = ahead.bytes - uint32_t(begin);
    prefetch(static_cast<const char*>(ahead.from) + begin, left < share ? left : share);
  }
}

// A column of one of the two matrices, and what does not depend on the row.
struct Column {
  bool is_second;
  int64_t index, outputs;
  const void* weight;
  float scale = 1, bias = 0;

  MBLM_DEVICE Column(const Product& in, int64_t column) {
    is_second = column >= in.matrix.outputs;
    const cpu::Matrix& matrix = is_second ? in.second : in.matrix;
    index = is_second ? column - in.matrix.outputs : column;
    outputs = matrix.outputs;
    weight = matrix.weight;
    if (matrix.scale) scale = matrix.scale[index];
    if (matrix.bias) bias = matrix.bias[index];
  }
};

// One position of the convolution of a channel, and SiLU.
MBLM_DEVICE float convolve(const Convolution& in, int64_t row, int64_t channel, float x,
                           bool is_left_out) {
  const float* weight = in.weight + channel * in.taps;
  float* window = in.window + row * (in.taps - 1) * in.channels + channel;
  float sum = in.bias[channel];
  for (int64_t t = 0; t + 1 < in.taps; ++t) {
    const float value = window[t * in.channels];
    sum += value * weight[t];
    if (t > 0 && !is_left_out) window[(t - 1) * in.channels] = value;
  }
  if (in.taps > 1 && !is_left_out) window[(in.taps - 2) * in.channels] = x;
  sum += x * weight[in.taps - 1];
  return sum / (1 + expf(-sum));
}

MBLM_DEVICE void finish(const Product& in, const Column& column, int64_t row, float sum,
                        float residual, bool is_left_out) {
  float value = sum * column.scale + column.bias;
  if (in.residual) {
    value += residual;
    const int64_t half = column.outputs / 2, kept = column.index - (column.outputs - half);
    if (in.keep && kept >= 0 && !is_left_out) in.keep[row * half + kept] = residual;
  }
  if (in.then == cpu::Then::kGelu) value = 0.5f * value * (1 + erff(value * 0.70710678f));
  const Convolution& convolution = in.convolution;
  const int64_t channel = column.index - convolution.first;
  if (channel >= 0 && channel < convolution.channels) {
    value = convolve(convolution, row, channel, value, is_left_out);
  }
  float* out = column.is_second ? in.out_second : in.out;
  if (!is_left_out) out[row * column.outputs + column.index] = value;
}

Error multiply_on_tensor_cores(const Product& product, Stream stream);

}  // namespace mblm::cuda
