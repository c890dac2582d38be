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
static_assert(kLaneCount<float> == kMostLanes);

template <class V, class C>
MBLM_INLINE V load(const C* values) {
  V lanes;
  std::memcpy(&lanes, values, sizeof(lanes));
  return lanes;
}

template <class C>
MBLM_INLINE Lanes<C> load(const C* values) {
  return load<Lanes<C>>(values);
}

template <class V, class C>
MBLM_INLINE void store(C* values, const V& lanes) {
  static_assert(std::is_same_v<std::decay_t<decltype(lanes[0])>, C>);
  std::memcpy(values, &lanes, sizeof(lanes));
}

// Values of another type. Kernels copy what they work on to buffers of whole lanes.
template <class To, class From>
MBLM_INLINE void convert(const From* __restrict from, int64_t count, To* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = To(from[i]);
}

MBLM_INLINE float sum(const FloatLanes& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
MBLM_INLINE double sum(const DoubleLanes& v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// The sums of eight, each in the order of `sum`.
MBLM_INLINE FloatLanes sums(const FloatLanes v[8]) {
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define MBLM_SHUFFLE(...) FloatLanes(__builtin_shufflevector(__VA_ARGS__))
  // Pairs of vectors: a[0 + 4], .. a[3 + 7], then the same of b.
  FloatLanes halves[4];
  for (int k = 0; k < 4; ++k) {
    const FloatLanes &a = v[k], &b = v[k + 4];
    halves[k] = MBLM_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
                MBLM_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
  // Of vectors k and k + 1: (0 + 4) + (2 + 6) and (1 + 5) + (3 + 7) of each.
  FloatLanes quarters[2];
  for (int k = 0; k < 2; ++k) {
    const FloatLanes &a = halves[2 * k], &b = halves[2 * k + 1];
    quarters[k] = MBLM_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                  MBLM_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  const FloatLanes &a = quarters[0], &b = quarters[1];
  return MBLM_SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         MBLM_SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#undef MBLM_SHUFFLE
#endif
#endif
  FloatLanes all;
  for (int k = 0; k < 8; ++k) all[k] = sum(v[k]);
  return all;
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
