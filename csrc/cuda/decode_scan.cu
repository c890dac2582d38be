// State updates of one position: see decode_scan.h.
//
// A warp takes a channel of a row, its lanes the states.
#include <cmath>

#include "cuda/decode.cuh"
#include "cuda/decode_scan.h"
#include "cuda/kernel.cuh"

namespace mblm::cuda {
namespace {

using cpu::Matrix;
using cpu::WeightType;

// torch's softplus: the identity above 20.
MBLM_DEVICE float softplus(float x) {
  return x > 20 ? x : log1pf(expf(x));
}

MBLM_DEVICE float weight_at(const Matrix& matrix, int64_t index) {
  switch (matrix.type) {
    case WeightType::kFloat32:
      return static_cast<const float*>(matrix.weight)[index];
    case WeightType::kBFloat16:
      return value_of(static_cast<const BFloat16*>(matrix.weight)[index]);
    default:
      return float(static_cast<const int8_t*>(matrix.weight)[index]);
  }
}

// decay(i) is that of a state.
template <class Decay>
MBLM_DEVICE void update(const StateUpdate& in, int64_t row, int64_t channel, float step,
                        float direct, Decay decay) {
  const int lane = threadIdx.x % kWarp;
  const float x = in.x[row * in.stride + channel], gate = in.gate[row * in.stride + channel];
  float* state = in.state + (row * in.inner + channel) * in.states;
  float sum = 0;
  MBLM_UNROLL
  for (int64_t i = lane; i < in.states; i += kWarp) {
    const float value = decay(i) * state[i] + step * x * in.b[row * in.bc_stride + i];
    state[i] = value;
    sum += value * in.c[row * in.bc_stride + i];
  }
  const float y = warp_sum(sum) + x * direct;
  if (lane == 0) in.out[row * in.inner + channel] = y * (gate / (1 + expf(-gate)));
}

// function(row, channel) for this warp's channels.
template <class Function>
MBLM_DEVICE void for_each_channel(const StateUpdate& in, Function function) {
  release_dependents();
  wait_for_inputs();
  const int64_t items = in.rows * in.inner;
  for (int64_t item = first_item_of_warp(); item < items; item += warp_stride()) {
    const int64_t row = quotient(item, in.inner);
    if (is_masked(in.positions, row)) continue;
    function(row, item - row * in.inner);
  }
}

__global__ void __launch_bounds__(kThreads) scan_channels(ChannelScan in) {
  const StateUpdate& of = in.update;
  for_each_channel(of, [&](int64_t row, int64_t channel) {
    const int64_t rank = in.to_steps.inputs;
    float dot = 0;
    for (int64_t i = threadIdx.x % kWarp; i < rank; i += kWarp) {
      dot += in.dt[row * of.bc_stride + i] * weight_at(in.to_steps, channel * rank + i);
    }
    dot = warp_sum(dot);
    if (in.to_steps.scale) dot *= in.to_steps.scale[channel];
    if (in.to_steps.bias) dot += in.to_steps.bias[channel];
    const float step = softplus(dot);
    const float* rates = in.rates + channel * of.states;
    update(of, row, channel, step, in.direct[channel],
           [&](int64_t i) { return expf(step * rates[i]); });
  });
}

__global__ void __launch_bounds__(kThreads) scan_heads(HeadScan in) {
  const StateUpdate& of = in.update;
  const int64_t width = of.inner / in.heads;
  for_each_channel(of, [&](int64_t row, int64_t channel) {
    const int64_t head = quotient(channel, width);
    const float step = softplus(in.dt[row * of.stride + head] + in.dt_bias[head]);
    const float decay = expf(step * in.rates[head]);
    update(of, row, channel, step, in.direct[head], [&](int64_t) { return decay; });
  });
}

int64_t blocks_of(const StateUpdate& in) {
  return divide_up(in.rows * in.inner, kWarps);
}

}  // namespace

Error scan(const ChannelScan& in, Stream stream) {
  return launch_dependent(scan_channels, blocks_of(in.update), kThreads, 0, stream, in);
}

Error scan(const HeadScan& in, Stream stream) {
  return launch_dependent(scan_heads, blocks_of(in.update), kThreads, 0, stream, in);
}

}  // namespace mblm::cuda
