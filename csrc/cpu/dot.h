// The sum that decoding is made of: a row of values times a row of weights.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

// Sum of x * weight in interleaved sums, as many as keep the loads of a core's memory busy.
template <class C, class X, class W>
MBLM_INLINE C dot(const X* __restrict x, const W* __restrict weight, int64_t n) {
  constexpr int64_t kLanes = 32;
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += C(x[i + lane]) * C(weight[i + lane]);
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] += C(x[i]) * C(weight[i]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace mblm::cpu
