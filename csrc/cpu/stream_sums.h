// The sums over the lanes of four streams at once: fewer instructions than one after another, which
// is much where rows are short.
#pragma once

#include <emmintrin.h>

#include <cstdint>

#include "cpu/matrix_kernels.h"

namespace mblm::cpu {

static_assert(kStreams == 4);

// (v[0] + v[2]) + (v[1] + v[3]) of each vector v, stored next to each other.
inline void store_sums(__m128 a, __m128 b, __m128 c, __m128 d, float* sums) {
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

}  // namespace mblm::cpu
