// What one position of both Mamba blocks has in common.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {

// One position of the causal convolution and SiLU, for channels [begin, end) of `channels`:
// window (taps - 1, channels) holds the inputs before, oldest first, and moves on by one.
// weight (channels, taps), bias (channels), x and out (channels).
void convolve_position(const float* x, const float* weight, const float* bias, float* window,
                       int64_t channels, int64_t taps, float* out, int64_t begin, int64_t end);

// x / sqrt(mean(x^2) + eps) * weight, as torch.nn.RMSNorm has it; out may be x.
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out);

// Floats of a thread's own values of all positions, and a cache line more: threads write apart.
inline int64_t floats_of_thread(int64_t positions, int64_t width) {
  return positions * width / 16 * 16 + 32;
}

// state = decay * state + input * b, all (n); returns the sum of state * c.
template <class Decay>
MBLM_INLINE float update_state(float* __restrict state, Decay decay, float input,
                               const float* __restrict b, const float* __restrict c, int64_t n) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t j = i + lane;
      state[j] = decay(j) * state[j] + input * b[j];
      lanes[lane] += state[j] * c[j];
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    state[i] = decay(i) * state[i] + input * b[i];
    lanes[lane] += state[i] * c[i];
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace mblm::cpu
