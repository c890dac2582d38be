// A Mamba-1 stage in decoding: the next positions of every row.
#pragma once

#include <cstdint>
#include <span>
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

// One of the rows of a call, and its state, which is written to.
struct MambaRow {
  int64_t count = 1;        // positions of this call, at least 1
  float* ssm = nullptr;     // of the first layer, Mamba-1 (inner, states), Mamba-2 (.., P, states)
  float* window = nullptr;  // (taps - 1, channels of the convolution)
  int64_t ssm_stride = 0, window_stride = 0;  // from there to the next layer's

  void advance(int64_t) {}
};

class Mamba1Stage {
 public:
  using Row = MambaRow;

  int64_t dim = 0, inner = 0, states = 0, rank = 0, taps = 0;
  std::vector<Mamba1Layer> layers;

  // As TransformerStage's.
  int64_t weights() const;
  int64_t scratch_size(int64_t positions, int64_t end, int64_t threads) const;
  void prefill(const Worker& worker, std::span<const Row> rows, float* x, float* scratch) const;
  void normalize(const float* x, int64_t positions, float* out) const;
};

}  // namespace mblm::cpu
