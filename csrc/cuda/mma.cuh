// Tensor cores: products of pieces of two matrices that the lanes of a warp hold together.
#pragma once

#include "cuda/kernel.cuh"

namespace mblm::cuda {

#ifdef __CUDACC__
// sums (16, 8) += a (16, 16) b (16, 8), of bfloat16. Lane l, with g = l / 4 and t = l % 4, holds
// pairs, the first in the lower bits: of a, columns 2t and 2t + 1 of rows g and g + 8, then columns
// 2t + 8 and 2t + 9 of both; of b, rows 2t and 2t + 1, then 2t + 8 and 2t + 9, of column g; of the
// sums, columns 2t and 2t + 1 of row g, then of g + 8.
MBLM_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Two floats as bfloat16, the first in the lower bits.
MBLM_DEVICE uint32_t pair_of(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return BFloat16(first).bits | uint32_t(BFloat16(second).bits) << 16;
#endif
}

MBLM_DEVICE float first_of(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
MBLM_DEVICE float second_of(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// What remains of two values. A number that is not finite is all in the upper half: it remains so
// if what is left of an infinity, NaN, becomes finite.
MBLM_DEVICE uint32_t rest_of(float first, float second, uint32_t upper) {
  constexpr float kMost = 0x1p120f;  // more than is left of any number
  return pair_of(fmaxf(first - first_of(upper), -kMost), fmaxf(second - second_of(upper), -kMost));
}

// Sums of two pairs.
MBLM_DEVICE uint32_t add_pairs(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  constexpr uint32_t kOnes = 0x3f803f80u;  // compute capability 8.0 adds only what it multiplies
  uint32_t sums;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sums) : "r"(a), "r"(kOnes), "r"(b));
  return sums;
#else
  return pair_of(first_of(a) + first_of(b), second_of(a) + second_of(b));
#endif
}

// Two int8 in bytes 0 and 2 as bfloat16, exactly. Of the bits above them, 128 plus the lower seven
// bits and minus 128, or 256 where the sign is set, can be put together.
MBLM_DEVICE uint32_t pair_of_bytes(uint32_t bytes) {
  return add_pairs(0x43004300u | (bytes & 0x007f007fu), 0xc300c300u | (bytes & 0x00800080u));
}

}  // namespace mblm::cuda
