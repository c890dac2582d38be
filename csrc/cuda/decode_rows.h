// Norms of whole rows, in decoding on a GPU.
#pragma once

#include <cstdint>

#include "cuda/decode_product.h"
#include "cuda/stream.h"

namespace mblm::cuda {

struct LayerNormOf {
  const float *weight = nullptr, *bias = nullptr;
  float eps = 0;
};

struct FinalNorm {
  int64_t rows = 0, dim = 0;
  const int64_t* positions = nullptr;  // (rows), negative where nothing is written; or null
  RowNorm norm;
  float* x = nullptr;  // (rows, dim), in place
};

Error normalize(const FinalNorm& norm, Stream stream);

}  // namespace mblm::cuda
