// What the kernels of decoding share: which rows take part, RMSNorm from a row's sum of squares.
#pragma once

#include "cuda/decode_product.h"
#include "cuda/kernel.cuh"

namespace mblm::cuda {

// Whether a row takes no part in a call.
MBLM_DEVICE bool is_masked(const int64_t* positions, int64_t row, bool there_is = true) {
  return positions && there_is && positions[row] < 0;
}

MBLM_DEVICE float factor_of(const RowNorm& norm, float squares, int64_t count) {
  const float mean = squares / float(count);
  return norm.is_bounded ? 1 / fmaxf(sqrtf(mean), 1e-8f) : 1 / sqrtf(mean + norm.eps);
}

}  // namespace mblm::cuda
