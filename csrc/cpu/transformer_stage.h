// A Transformer stage in decoding: the next positions of every row.
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

// State of one of the rows that decode side by side, each at a position of its own.
struct TransformerRow {
  int64_t position = 0;  // the next one
  int64_t capacity = 0;
  float *keys = nullptr, *values = nullptr;  // (heads, capacity, head_dim), of the first layer
  int64_t layer_stride = 0;                  // from there to the next layer's
  float* delayed = nullptr;    // (dim / 2), what the shift before the first attention delays
  int64_t part_stride = 0;     // from there to the next shift's: there are two in a layer
  const float* cos = nullptr;  // (>= capacity, head_dim / 2), or null without rotary positions
  const float* sin = nullptr;
  const float* start_delayed = nullptr;  // as delayed, after the start token; null if never needed
  int64_t start_stride = 0;

  void advance(int64_t count) { position += count; }
};

struct TransformerState {
  std::vector<TransformerRow> rows;
};

class TransformerStage {
 public:
  using State = TransformerState;

  int64_t dim = 0, heads = 0, head_dim = 0;
  std::vector<TransformerLayer> layers;
  const float* norm = nullptr;  // (dim)
  // Of rotary positions, (angles, head_dim / 2), or null.
  const float *cos = nullptr, *sin = nullptr;
  int64_t angles = 0;

  // Weights of the matrices, with each of which a position is multiplied.
  int64_t weights() const;

  // Floats of working memory that a call with so many positions of every row needs.
  int64_t scratch_size(const State& state, int64_t count, int64_t threads) const;

  // Takes in x (rows, count, dim) and returns the output before the last norm: x or, of the calling
  // thread alone, a part of scratch. All threads of the team call it. The caller then advances the
  // rows. Several positions have the bits of as many calls with one; they read the weights once.
  const float* prefill(const Worker& worker, const State& state, int64_t count, float* x,
                       float* scratch) const;

  // The last norm, of so many positions; out may be x. Work of the calling thread alone.
  void normalize(const float* x, int64_t positions, float* out) const;

  // Goes back to the state after the start token, whose keys and values are still there.
  void restart(TransformerRow& row) const;
};

}  // namespace mblm::cpu
