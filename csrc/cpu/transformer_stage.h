// A Transformer stage in decoding: one position of every row.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/matrix.h"

namespace mblm::cpu {

struct TransformerLayer {
  const float* attention_norm;  // (dim)
  Matrix q, kv, out;
  const float* feed_forward_norm;  // (dim)
  Matrix expand, contract;
};

// State of rows that decode side by side, each at a position of its own.
struct TransformerState {
  int64_t rows = 0, capacity = 0;
  float* keys = nullptr;       // (layers, rows, heads, capacity, head_dim)
  float* values = nullptr;     // the same
  float* delayed = nullptr;    // (layers, 2, rows, dim / 2), what the shifts delay
  const float* cos = nullptr;  // (capacity, head_dim / 2), or null without rotary positions
  const float* sin = nullptr;
  int64_t* positions = nullptr;  // (rows), of the next position; the caller counts them up
};

class TransformerStage {
 public:
  using State = TransformerState;

  int64_t dim = 0, heads = 0, head_dim = 0;
  std::vector<TransformerLayer> layers;
  const float* norm = nullptr;  // (dim)

  // Floats of working memory that a call needs.
  int64_t scratch_size(const State& state, int64_t threads) const;

  // Takes in x (rows, dim) and replaces it by the output. All threads of the team call it; the
  // output is complete when it returns.
  void step(const Worker& worker, const State& state, float* x, float* scratch) const;
};

}  // namespace mblm::cpu
