// A Mamba-1 stage in decoding: the next positions of every row.
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
  // The same after the start token; null if never needed.
  const float *start_ssm = nullptr, *start_window = nullptr;

  void advance(int64_t) {}
};

struct MambaState {
  std::vector<MambaRow> rows;
};

// Goes back to the state after the start token; the sizes are those of a layer.
void restart(const MambaRow& row, int64_t layers, int64_t ssm_size, int64_t window_size);

class Mamba1Stage {
 public:
  using State = MambaState;

  int64_t dim = 0, inner = 0, states = 0, rank = 0, taps = 0;
  std::vector<Mamba1Layer> layers;

  // As TransformerStage's.
  int64_t weights() const;
  int64_t scratch_size(const State& state, int64_t count, int64_t threads) const;
  const float* prefill(const Worker& worker, const State& state, int64_t count, float* x,
                       float* scratch) const;
  void normalize(const float* x, int64_t positions, float* out) const;
  void restart(MambaRow& row) const;
};

}  // namespace mblm::cpu
