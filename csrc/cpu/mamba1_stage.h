// A Mamba-1 stage in decoding: the next positions of every row.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "cpu/mamba_row.h"

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

class Mamba1Stage : public MambaStage<Mamba1Layer> {
 public:
  int64_t rank = 0;

  // As TransformerStage's.
  int64_t scratch_size(int64_t positions, int64_t end, int64_t threads) const;
  void prefill(const Worker& worker, std::span<const Row> rows, float* x, float* scratch,
               float* trail = nullptr) const;
  void roll_back(std::span<const Row> rows, int64_t row, float* trail, int64_t kept) const;
  int64_t trail_size(int64_t rows, int64_t positions) const;
  void normalize(const float* x, int64_t positions, float* out) const;
};

}  // namespace mblm::cpu
