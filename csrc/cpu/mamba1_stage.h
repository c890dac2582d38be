// A Mamba-1 stage in decoding: one position of every row.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/matrix.h"

namespace mblm::cpu {

struct Mamba1Layer {
  const float* norm;  // (dim)
  float eps;
  Matrix in, x, dt, out;  // the projections; their biases, where they have some, included
  const float* conv;      // (inner, taps)
  const float* conv_bias;
  const float* rates;   // (inner, states), -exp(A_log)
  const float* direct;  // (inner), D
};

// State of one of the rows that decode side by side.
struct MambaRow {
  float* ssm = nullptr;     // of the first layer, Mamba-1 (inner, states), Mamba-2 (.., P, states)
  float* window = nullptr;  // (taps - 1, channels of the convolution)
  int64_t ssm_stride = 0, window_stride = 0;  // from there to the next layer's

  void advance() {}
};

struct MambaState {
  std::vector<MambaRow> rows;
};

class Mamba1Stage {
 public:
  using State = MambaState;

  int64_t dim = 0, inner = 0, states = 0, rank = 0, taps = 0;
  std::vector<Mamba1Layer> layers;

  // Floats of working memory that a call needs.
  int64_t scratch_size(const State& state, int64_t threads) const;

  // As TransformerStage::step.
  void step(const Worker& worker, const State& state, float* x, float* scratch) const;
};

}  // namespace mblm::cpu
