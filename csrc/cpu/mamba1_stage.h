// A Mamba-1 stage in decoding: the next positions of every row.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/mamba_row.h"
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

  std::array<const Matrix*, 4> matrices() const { return {&in, &x, &dt, &out}; }
};

class Mamba1Stage {
 public:
  using Row = MambaRow;

  int64_t dim = 0, inner = 0, states = 0, rank = 0, taps = 0;
  std::vector<Mamba1Layer> layers;

  // As TransformerStage's.
  int64_t weights() const { return weights_of<Mamba1Layer>(layers); }
  int64_t prepared_floats(int64_t positions) const {
    return cpu::prepared_floats<Mamba1Layer>(layers, positions);
  }
  int64_t scratch_size(int64_t positions, int64_t end, int64_t threads) const;
  void prefill(const Worker& worker, std::span<const Row> rows, float* x, float* scratch,
               float* trail = nullptr) const;
  void roll_back(std::span<const Row> rows, int64_t row, float* trail, int64_t kept) const;
  int64_t trail_size(int64_t rows, int64_t positions) const;
  void normalize(const float* x, int64_t positions, float* out) const;
};

}  // namespace mblm::cpu
