// What one position of both Mamba blocks has in common: see mamba_step.h.
#include "cpu/mamba_step.h"

namespace mblm::cpu {

MBLM_CLONES void convolve_position(const float* x, const float* weight, const float* bias,
                                   float* window, int64_t channels, int64_t taps, float* out,
                                   int64_t begin, int64_t end) {
  for (int64_t channel = begin; channel < end; ++channel) {
    const float* tap = weight + channel * taps;
    float sum = bias[channel];
    for (int64_t t = 0; t + 1 < taps; ++t) sum += window[t * channels + channel] * tap[t];
    sum += x[channel] * tap[taps - 1];
    for (int64_t t = 0; t + 2 < taps; ++t) {
      window[t * channels + channel] = window[(t + 1) * channels + channel];
    }
    if (taps > 1) window[(taps - 2) * channels + channel] = x[channel];
    out[channel] = sum;
  }
  for (int64_t channel = begin; channel < end; ++channel) out[channel] = silu(out[channel]);
}

MBLM_CLONES void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const float factor = float(1 / std::sqrt(sum_of_squares(x, n) / double(n) + eps));
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

}  // namespace mblm::cpu
