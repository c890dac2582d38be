// Draws the next byte of every row from its logits, on a GPU: see cpu/sampling.h.
#pragma once

#include <cstdint>

#include "cuda/decode_rows.h"
#include "cuda/stream.h"

namespace mblm::cuda {

struct SampleRows {
  int64_t rows = 0, num_tokens = 0;
  Halted halted;                    // now becomes 1 after a byte that ends; latched decides
  const float* settings = nullptr;  // temperature, top_p, top_k: read when the kernel runs
  const float* logits = nullptr;    // (rows, num_tokens)
  const float* uniform = nullptr;   // (rows, num_tokens)
  const bool* ends = nullptr;       // (num_tokens)
  float* ordered = nullptr;         // (rows, 2, num_tokens), working memory
  int64_t* pending = nullptr;       // (rows), out
  int64_t* ids = nullptr;           // (rows), out: the same, or -1 where the run has ended
};

Error sample(const SampleRows& rows, Stream stream);

}  // namespace mblm::cuda
