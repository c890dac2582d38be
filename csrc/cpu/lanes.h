// Arithmetic on 32 bytes of values at once, and an exponential that is fast on them.
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

using FloatLanes = float __attribute__((vector_size(32)));
using DoubleLanes = double __attribute__((vector_size(32)));
using IntLanes = int32_t __attribute__((vector_size(32)));

template <class C>
using Lanes = std::conditional_t<std::is_same_v<C, double>, DoubleLanes, FloatLanes>;
template <class C>
constexpr int64_t kLaneCount = int64_t(32 / sizeof(C));

template <class C>
MBLM_INLINE Lanes<C> load(const C* values) {
  Lanes<C> lanes;
  std::memcpy(&lanes, values, sizeof(lanes));
  return lanes;
}

template <class V, class C>
MBLM_INLINE void store(C* values, const V& lanes) {
  static_assert(std::is_same_v<V, Lanes<C>>);
  std::memcpy(values, &lanes, sizeof(lanes));
}

MBLM_INLINE float sum(const FloatLanes& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
MBLM_INLINE double sum(const DoubleLanes& v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// exp(x) as 2^k 2^f with k whole and f in [-1/2, 1/2], 2^f by its polynomial of least relative
// error, 2e-9. Within 1e-7 (1 + |x|) of exp(x), relatively; exactly 1 for 0; 0 below -87, where
// floats begin to lose digits; NaN for NaN.
MBLM_INLINE FloatLanes exp(const FloatLanes& argument) {
  constexpr float kLog2E = 1.44269504f, kLowest = -87.6f, kHighest = 88.8f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  FloatLanes x = argument < kLowest ? FloatLanes{} + kLowest : argument;
  x = x > kHighest ? FloatLanes{} + kHighest : x;
  const FloatLanes shifted = x * kLog2E + kRound;
  const FloatLanes f = x * kLog2E - (shifted - kRound);
  FloatLanes power = f * 3.0694640e-4f + 2.6800309e-3f;  // of 2 * 2^f
  power = power * f + 1.9236969e-2f;
  power = power * f + 1.1100656e-1f;
  power = power * f + 4.8045293e-1f;
  power = power * f + 1.3862944f;
  power = power * f + 2.0f;
  // k is in the low bits of shifted; 2^(k - 1) is representable for k up to 128.
  const IntLanes bits = ((IntLanes)shifted << 23) + (126 << 23);
  return power * (FloatLanes)bits;
}

MBLM_INLINE DoubleLanes exp(const DoubleLanes& argument) {
  DoubleLanes x = argument;
  for (int64_t lane = 0; lane < kLaneCount<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

}  // namespace mblm::cpu
