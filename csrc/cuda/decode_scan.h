// One position of the Mamba blocks' state updates, gated, in decoding on a GPU.
#pragma once

#include <cstdint>

#include "cpu/matrix.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// state = decay * state + step * x * b; out = (the sum of state * c + direct * x) * silu(gate).
struct StateUpdate {
  int64_t rows = 0, inner = 0, states = 0;
  const int64_t* positions = nullptr;  // (rows), negative where nothing is written; or null
  // Per row, each `stride` values after that of the row before: (inner), (inner), (states),
  // (states).
  const float *x = nullptr, *gate = nullptr, *b = nullptr, *c = nullptr;
  int64_t stride = 0, bc_stride = 0;
  float* state = nullptr;  // (rows, inner, states)
  float* out = nullptr;    // (rows, inner)
};

// Mamba-1: step = softplus(dt @ weight.T + bias) per channel, decay = exp(step * rates).
struct ChannelScan {
  StateUpdate update;
  const float* dt = nullptr;      // (rank) per row, bc_stride apart
  cpu::Matrix to_steps;           // (inner, rank)
  const float* rates = nullptr;   // (inner, states)
  const float* direct = nullptr;  // (inner)
};

// Mamba-2: step = softplus(dt + bias) and decay = exp(step * rate) per head.
struct HeadScan {
  StateUpdate update;
  int64_t heads = 1;
  const float* dt = nullptr;  // (heads) per row, stride apart
  const float *dt_bias = nullptr, *rates = nullptr, *direct = nullptr;  // (heads)
};

Error scan(const ChannelScan& scan, Stream stream);
Error scan(const HeadScan& scan, Stream stream);

}  // namespace mblm::cuda
