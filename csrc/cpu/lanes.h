// Arithmetic on 32 bytes of values at once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernel.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {

using FloatLanes = float __attribute__((vector_size(32)));
using DoubleLanes = double __attribute__((vector_size(32)));

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

MBLM_INLINE FloatLanes exp(const FloatLanes& x) {
  return vector_exp(x);
}

MBLM_INLINE DoubleLanes exp(const DoubleLanes& argument) {
  DoubleLanes x = argument;
  for (int64_t lane = 0; lane < kLaneCount<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

}  // namespace mblm::cpu
