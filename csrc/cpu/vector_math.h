// exp, erf and what is made of them, for one value, in operations that a loop over values turns
// into vector instructions. Errors are a few units in the last place of a float.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

// 2^n e^r with |r| <= ln(2) / 2; 0 below the smallest normal number.
MBLM_INLINE float vector_exp(float x) {
  constexpr float kHighest = 88.3762589f, kLowest = -87.3365402f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float low = x < kLowest ? kLowest : x;
  const float bounded = low > kHighest ? kHighest : low;
  const float rounded = bounded * 1.44269504f + kRound;
  const float n = rounded - kRound;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  const uint32_t power = std::bit_cast<uint32_t>(rounded) - std::bit_cast<uint32_t>(kRound);
  const float y = p * std::bit_cast<float>((power + 127u) << 23);
  return x < kLowest ? 0.f : y;
}

// A rational function of x^2 times x on [-4, 4], beyond which erf is 1 in a float.
MBLM_INLINE float vector_erf(float x) {
  const float low = x < -4.f ? -4.f : x;
  const float t = low > 4.f ? 4.f : low;
  const float s = t * t;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return t * p / q;
}

MBLM_INLINE float gelu(float x) {
  return 0.5f * x * (1.f + vector_erf(x * 0.707106781f));
}

MBLM_INLINE float silu(float x) {
  return x / (1.f + vector_exp(-x));
}

// torch's softplus: the identity above 20.
inline float softplus(float x) {
  return x > 20.f ? x : std::log1p(std::exp(x));
}

}  // namespace mblm::cpu
