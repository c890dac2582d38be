// exp, erf and what is made of them, for one value, in operations that a loop over values turns
// into vector instructions. Errors are a few units in the last place of a float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernel.h"

// How lanes are passed depends on the instruction set. Here no function with them is ever called:
// all are inlined. GCC's remark on parameters cannot be turned off, hence the references.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace mblm::cpu {

using BitLanes = uint32_t __attribute__((vector_size(32)));

template <class To, class From>
MBLM_INLINE To same_bits(const From& from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// exp(x) of a float, or of eight in lanes, as 2^k 2^f with k whole and f in [-1/2, 1/2], 2^f by its
// polynomial of least relative error, 2e-9. Within 1e-7 (1 + |x|) of exp(x), relatively; exactly 1
// for 0; 0 below -87, where floats begin to lose digits; NaN for NaN.
template <class V>
MBLM_INLINE V vector_exp(const V& argument) {
  using Bits = std::conditional_t<sizeof(V) == sizeof(float), uint32_t, BitLanes>;
  constexpr float kLog2E = 1.44269504f, kLowest = -87.6f, kHighest = 88.8f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  V x = argument < kLowest ? V{} + kLowest : argument;
  x = x > kHighest ? V{} + kHighest : x;
  const V shifted = x * kLog2E + kRound;
  const V f = x * kLog2E - (shifted - kRound);
  V power = f * 3.0694640e-4f + 2.6800309e-3f;  // of 2 * 2^f
  power = power * f + 1.9236969e-2f;
  power = power * f + 1.1100656e-1f;
  power = power * f + 4.8045293e-1f;
  power = power * f + 1.3862944f;
  power = power * f + 2.0f;
  // k is in the low bits of shifted; 2^(k - 1) is representable for k up to 128.
  const Bits bits = (same_bits<Bits>(shifted) << 23) + (uint32_t(126) << 23);
  return power * same_bits<V>(bits);
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
