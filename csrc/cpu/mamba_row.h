// A row of a Mamba stage's call, and what both kinds of stage have in common.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/matrix.h"

namespace mblm::cpu {

// One of the rows of a call, and its state, which is written to.
struct MambaRow {
  int64_t count = 1;        // positions of this call, at least 1
  float* ssm = nullptr;     // of the first layer, Mamba-1 (inner, states), Mamba-2 (.., P, states)
  float* window = nullptr;  // (taps - 1, channels of the convolution)
  int64_t ssm_stride = 0, window_stride = 0;  // from there to the next layer's
};

template <class Layer>
class MambaStage {
 public:
  using Row = MambaRow;

  int64_t dim = 0, inner = 0, states = 0, taps = 0;
  std::vector<Layer> layers;

  // As TransformerStage's.
  int64_t weights() const { return weights_of<Layer>(layers); }
  int64_t prepared_floats(int64_t positions) const {
    return cpu::prepared_floats<Layer>(layers, positions);
  }
};

}  // namespace mblm::cpu
