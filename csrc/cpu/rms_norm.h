// RMSNorm of a few rows, with the mean of squares bounded from below or with an epsilon added to
// it.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

MBLM_INLINE double sum_of_squares(const float* x, int64_t n) {
  return sum_in_lanes(n, [&](int64_t i) MBLM_INLINE_LAMBDA { return double(x[i]) * x[i]; });
}

// x / sqrt(mean(x^2) + eps) * weight, as torch.nn.RMSNorm has it; out may be x.
MBLM_INLINE void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const float factor = float(1 / std::sqrt(sum_of_squares(x, n) / double(n) + eps));
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

}  // namespace mblm::cpu
