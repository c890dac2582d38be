// A run: bytes sampled one after another without leaving native code.
//
// Rows are sequences that run side by side, each at its own position of its own patch. A row whose
// patch is complete waits until the others' are; then the stages above take in what is complete,
// for all rows at once, and hand down new contexts. Without stages above, the row has come to its
// end.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/bound_stage.h"
#include "cpu/cache_lines.h"
#include "cpu/matrix.h"
#include "cpu/sampling.h"

namespace mblm::cpu {

// Positions of a stage's tokens: fixed ones are added, a rotation turns pairs.
struct Positions {
  const float* fixed = nullptr;     // (positions, dim), or null
  const float* rotation = nullptr;  // (positions, dim / 2, 2), cosines and sines, or null

  void add(int64_t position, int64_t dim, float* x) const;
};

struct LayerNorm {
  const float* weight;  // (n)
  const float* bias;    // (n)
  float eps;
};

// One row's sequence in one stage.
struct StageRow {
  int64_t position = 0;                 // tokens taken in since the start token
  float* output = nullptr;              // (dim), of the last position
  const float* start_output = nullptr;  // (dim), of the start token
  float* context = nullptr;             // (positions, dim), or null
};

// A stage of the hierarchy: its model, and what lies between it and the next.
struct RunStage {
  int64_t dim = 0;
  int64_t seq_len = 0;     // positions of a sequence
  int64_t patch_size = 1;  // bytes that a position stands for
  BoundStage* model = nullptr;
  const float* table = nullptr;  // (num_tokens, width of the local stage)
  Positions positions;
  // Of the stages above the local one alone:
  LayerNorm flat_norm{};  // (patch_size * width)
  Matrix project;
  LayerNorm norm{};
  Matrix to_context;

  std::vector<StageRow> rows;
};

struct RunRow {
  int64_t max_tokens = 0;        // how many bytes to sample
  int64_t room = 0;              // how many positions the patch has left
  int64_t length = 0;            // bytes taken in so far
  std::vector<int64_t> history;  // the last of them
  int64_t pending = 0;           // the byte to take in next
  int64_t* ids = nullptr;        // (max_tokens), out
  int64_t num_tokens = 0;        // out
};

class Run {
 public:
  std::vector<RunStage> stages;  // the local one last
  std::vector<RunRow> rows;
  bool has_pending = false;  // whether there are bytes to take in at the beginning
  Matrix to_logits;
  Sampling sampling;
  const uint8_t* ends = nullptr;  // (num_tokens), 1 for bytes that end the run; or null
  // Uniform random numbers (num_tokens) for the n-th byte of a row.
  std::function<const float*(int64_t row, int64_t n)> uniform;
  // Called before the first byte and at every byte, to draw the next one's numbers while another
  // thread samples with those there are; so many bytes' at once, if there are none ahead. Or null.
  std::function<void(int64_t at_once)> draw_ahead;

  // Products of weights and values that a byte of every row takes.
  int64_t products() const;
  int64_t bytes_of_weights() const;
  // Floats of working memory.
  int64_t scratch_size(int64_t threads) const;

  // All threads of the team call it. It returns when the run is done, or before: at the given time,
  // or if the team waits so long for a thread without a core that one thread is quicker. Another
  // team goes on.
  void work(const Worker& worker, float* scratch,
            Team::Clock::time_point until = Team::Clock::time_point::max());
  bool is_done() const { return progress_.is_begun && active.empty() && waiting.empty(); }

 private:
  using Rows = std::vector<int64_t>;

  // For one stage, what the first byte of a patch asks for.
  struct Plan {
    Rows begin_anew, take_in;
  };

  Plan plan_for(size_t stage) const;
  RunStage& local() { return stages.back(); }
  const RunStage& local() const { return stages.back(); }
  bool has_stages_above() const { return stages.size() > 1; }

  // These are the first thread's alone.
  void begin();
  static bool has_passed(Team::Clock::time_point time);
  void sample_rows(const float* outputs);
  void take_pending();
  void restart(RunStage& stage, const Rows& rows);

  // These are called by all threads.
  std::vector<float> embed_patches(const RunStage& stage, const Rows& rows) const;
  void begin_patches(const Worker& worker, float* scratch);
  void begin_anew(const Worker& worker, size_t stage, const Rows& rows);
  void take_in(const Worker& worker, size_t stage, const Rows& rows, float* scratch);

  // In a line that is written to at every byte: others read what is beside it.
  struct alignas(cache_lines::kBytesApart) Progress {
    bool is_begun = false, is_pending = false, is_interrupted = false;
  };
  Progress progress_;
  Rows active, waiting;
  cache_lines::Vector<float> x_;       // (active, dim)
  cache_lines::Vector<float> logits_;  // (active, num_tokens)
  cache_lines::Vector<float> inputs_, upper_;
  SampleMemory sample_memory_{0};
};

}  // namespace mblm::cpu
