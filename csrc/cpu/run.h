// A run: bytes of the current patch, sampled one after another without leaving native code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/matrix.h"
#include "cpu/sampling.h"

namespace mblm::cpu {

// What the local stage takes in for a byte: its embedding, with positions and context added.
// Index 0 of positions, rotation and context is the position that the run begins with.
struct LocalInput {
  int64_t dim = 0;
  const float* table = nullptr;      // (num_tokens, dim)
  const float* positions = nullptr;  // (steps, dim), or null
  const float* rotation = nullptr;   // (steps, dim / 2, 2), cosine and sine of pairs, or null
  const float* context = nullptr;    // (rows, context_stride / dim, dim), or null
  int64_t context_stride = 0;

  void embed(int64_t row, int64_t step, int64_t token, float* out) const;
};

// What a run does and where it got to. The first thread writes, between barriers.
struct Run {
  int64_t rows = 0;
  int64_t max_tokens = 0;  // how many bytes to sample per row
  int64_t max_steps = 0;   // how many positions the patch has left
  LocalInput input;
  Matrix to_logits;
  Sampling sampling;
  const uint8_t* ends = nullptr;     // (num_tokens), 1 for bytes that end a run; or null
  std::function<void(float*)> draw;  // fills (rows, num_tokens) with uniform random numbers

  float* x = nullptr;          // (rows, dim), in: the last position's output; out: likewise
  int64_t* ids = nullptr;      // (rows, max_tokens), sampled
  int64_t* pending = nullptr;  // (rows), the byte to take in next
  bool has_pending = false;    // in: whether there is one

  int64_t num_tokens = 0, num_steps = 0;  // out: bytes sampled, positions taken in
  bool done = false;
  std::vector<float> logits, uniform;  // (rows, num_tokens)
  std::vector<int64_t> order;

  // Samples a byte for every row from the logits; the first thread alone.
  void sample_rows();
  // Embeds the pending bytes into x; the first thread alone.
  void embed_rows();
};

// All threads of the team call it.
template <class Stage>
void run_patch(const Worker& worker, const Stage& stage, const typename Stage::State& state,
               Run& run, float* scratch) {
  if (worker.is_first() && run.has_pending) run.embed_rows();
  worker.team.wait();
  for (bool is_pending = run.has_pending; !run.done; is_pending = true) {
    if (is_pending) {
      stage.step(worker, state, run.x, scratch);
      if (worker.is_first()) {
        ++run.num_steps;
        for (int64_t row = 0; row < run.rows; ++row) ++state.positions[row];
      }
    }
    multiply(worker, 0, run.to_logits, run.x, run.rows, run.logits.data());
    worker.team.wait();
    if (worker.is_first()) {
      run.sample_rows();
      if (!run.done) run.embed_rows();
    }
    worker.team.wait();
  }
}

}  // namespace mblm::cpu
