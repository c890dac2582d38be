// A Mamba-2 stage in decoding: the next positions of every row.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "cpu/mamba_row.h"

namespace mblm::cpu {

struct Mamba2Layer {
  const float* norm;  // (dim)
  Matrix in, out;
  const float* conv;  // (inner + 2 states, taps)
  const float* conv_bias;
  const float* dt_bias;     // (heads)
  const float* rates;       // (heads), -exp(A_log)
  const float* direct;      // (heads), D
  const float* gated_norm;  // (inner)

  std::array<const Matrix*, 2> matrices() const { return {&in, &out}; }
};

class Mamba2Stage : public MambaStage<Mamba2Layer> {
 public:
  int64_t heads = 0;
  float eps = 0;
  const float* norm = nullptr;  // (dim)

  // As TransformerStage's.
  int64_t scratch_size(int64_t positions, int64_t end, int64_t threads) const;
  void prefill(const Worker& worker, std::span<const Row> rows, float* x, float* scratch,
               float* trail = nullptr) const;
  void roll_back(std::span<const Row> rows, int64_t row, float* trail, int64_t kept) const;
  int64_t trail_size(int64_t rows, int64_t positions) const;
  void normalize(const float* x, int64_t positions, float* out) const;
};

}  // namespace mblm::cpu
