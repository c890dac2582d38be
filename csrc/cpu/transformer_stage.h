// A Transformer stage in decoding: the next positions of every row.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/matrix.h"

namespace mblm::cpu {

struct TransformerLayer {
  const float* attention_norm;  // (dim)
  Matrix q, kv, out;
  const float* feed_forward_norm;  // (dim)
  Matrix expand, contract;

  std::array<const Matrix*, 5> matrices() const { return {&q, &kv, &out, &expand, &contract}; }
};

// Keys and values are kept in pages of so many positions, or of fewer where a sequence is shorter.
constexpr int64_t kPagePositions = 64;

// One of the rows of a call, and its state, which is written to.
struct TransformerRow {
  int64_t position = 0;  // of the first in the cache, start token counted
  int64_t count = 1;     // positions of this call, at least 1
  // For each page, where its (heads, positions, head_dim) of the first layer begin.
  float* const* keys = nullptr;
  float* const* values = nullptr;
  int64_t layer_stride = 0, head_stride = 0;  // within a page
  float* delayed = nullptr;  // (dim / 2), what the shift before the first attention delays
  int64_t part_stride = 0;   // from there to the next shift's: there are two in a layer
};

class TransformerStage {
 public:
  using Row = TransformerRow;

  int64_t dim = 0, heads = 0, head_dim = 0;
  std::vector<TransformerLayer> layers;
  const float* norm = nullptr;  // (dim)
  // Rotary tables (angles, head_dim / 2), as long as any row's positions; null without.
  const float *cos = nullptr, *sin = nullptr;
  int64_t angles = 0;

  // Weights of the matrices, with each of which a position is multiplied.
  int64_t weights() const { return weights_of<TransformerLayer>(layers); }

  // Floats that each worker prepares for so many positions of all rows together.
  int64_t prepared_floats(int64_t positions) const {
    return cpu::prepared_floats<TransformerLayer>(layers, positions);
  }

  // Floats of working memory for calls with at most so many positions of all rows together, after
  // which no row has more than `end` in its cache.
  int64_t scratch_size(int64_t positions, int64_t end, int64_t threads) const;

  // Takes in x (positions, dim), those of one row after the other; the output before the last norm
  // replaces it. All threads of the team call it. A position's bits do not depend on how positions
  // are cut into calls, nor on other rows; each call reads the weights once. A trail, memory of
  // trail_size floats, is what to roll back with.
  void prefill(const Worker& worker, std::span<const Row> rows, float* x, float* scratch,
               float* trail = nullptr) const;

  // After a call with a trail, brings one of its rows to the state, bit by bit, in which only the
  // first `kept` of its positions had been taken in. `rows` are those of the call. Once for each
  // row. Work of the calling thread alone.
  void roll_back(std::span<const Row> rows, int64_t row, float* trail, int64_t kept) const;
  int64_t trail_size(int64_t rows, int64_t positions) const;

  // The last norm, of so many positions; out may be x. Work of the calling thread alone.
  void normalize(const float* x, int64_t positions, float* out) const;
};

}  // namespace mblm::cpu
