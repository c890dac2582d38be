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
struct LocalInput {
  int64_t dim = 0;
  const float* table = nullptr;      // (num_tokens, dim)
  const float* positions = nullptr;  // (positions of a patch, dim), or null
  const float* rotation = nullptr;   // (.., dim / 2, 2), cosine and sine of pairs, or null

  // context is (.., dim), or null.
  void embed(int64_t position, int64_t token, const float* context, float* out) const;
};

// One of the sequences that run side by side, each at its own position of its own patch.
struct RunRow {
  int64_t first = 0;       // the position in its patch that it begins with
  int64_t max_tokens = 0;  // how many bytes to sample
  int64_t max_steps = 0;   // how many positions the patch has left
  const float* context = nullptr;
  float* x = nullptr;      // (dim), in: the last position's output; out: likewise
  int64_t* ids = nullptr;  // (max_tokens), sampled
  int64_t pending = 0;     // the byte to take in next

  int64_t num_tokens = 0, num_steps = 0;  // out: bytes sampled, positions taken in
};

// What a run does and where it got to. The first thread writes, between barriers.
struct Run {
  std::vector<RunRow> rows;
  bool has_pending = false;  // in: whether there are bytes to take in
  LocalInput input;
  Matrix to_logits;
  Sampling sampling;
  const uint8_t* ends = nullptr;  // (num_tokens), 1 for bytes that end the run; or null
  // Uniform random numbers (num_tokens) for the n-th byte of a row.
  std::function<const float*(int64_t row, int64_t n)> uniform;

  std::vector<int64_t> active;  // rows that go on
  std::vector<float> x;         // (active, dim)
  std::vector<float> logits;    // (active, num_tokens)
  std::vector<int64_t> order;

  // The functions below are the first thread's alone.
  void begin();
  // Counts the step, samples a byte for every active row from the logits and lets go of those that
  // have come to their end, whose places in the state's rows it returns.
  std::vector<int64_t> sample_rows(bool has_stepped);
  // Embeds the pending bytes into x.
  void embed_rows();
};

// All threads of the team call it.
template <class Stage>
void run_patch(const Worker& worker, const Stage& stage, typename Stage::State& state, Run& run,
               float* scratch) {
  if (worker.is_first()) {
    run.begin();
    if (run.has_pending) run.embed_rows();
  }
  worker.team.wait();
  for (bool is_pending = run.has_pending; !run.active.empty(); is_pending = true) {
    if (is_pending) stage.step(worker, state, run.x.data(), scratch);
    multiply(worker, 0, run.to_logits, run.x.data(), int64_t(run.active.size()), run.logits.data());
    worker.team.wait();
    if (worker.is_first()) {
      if (is_pending) {
        for (auto& row : state.rows) row.advance();
      }
      for (const int64_t place : run.sample_rows(is_pending)) {
        state.rows.erase(state.rows.begin() + place);
      }
      run.embed_rows();
    }
    worker.team.wait();
  }
}

}  // namespace mblm::cpu
