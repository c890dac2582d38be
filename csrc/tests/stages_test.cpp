// Tests of every stage: several positions have the bits of one after the other. And of runs with
// three of them, one above the other: a team of threads gives the bits of one thread, and rows that
// run side by side those of rows alone. Under the thread sanitizer, that no barrier is missing.
#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>
#include <thread>

#include "check.h"
#include "cpu/mamba1_stage.h"
#include "cpu/mamba2_stage.h"
#include "cpu/run.h"
#include "cpu/transformer_stage.h"
#include "pack.h"

using namespace mblm;

// Of widths that two threads share evenly, and three do not.
constexpr int64_t kDim = 24, kInner = 96, kHeads = 4, kHeadDim = 8, kStates = 20, kTaps = 3;
constexpr int64_t kRank = 2, kLayers = 2, kVocabulary = 50, kPatch = 5, kPatches = 4;
// Of the stages: the bytes that a position stands for.
constexpr int64_t kPatchSizes[] = {kPatch * kPatches, kPatch, 1};
constexpr auto kNever = cpu::Team::Clock::time_point::max();

// Of matrices.
cpu::WeightType weight_type = cpu::WeightType::kFloat32;

// Random weights that live as long as the stages that point to them.
class Weights {
 public:
  float* vector(int64_t size, double scale = 1) {
    auto& values = kept_.emplace_back(numbers_.vector<float>(size));
    for (float& value : values) value = float(value * scale);
    return values.data();
  }

  cpu::Matrix matrix(int64_t outputs, int64_t inputs) {
    cpu::Matrix matrix;
    matrix.outputs = outputs;
    matrix.inputs = inputs;
    matrix.type = weight_type;
    matrix.bias = vector(outputs);
    if (weight_type == cpu::WeightType::kFloat32) {
      matrix.weight = vector(outputs * inputs, 0.3);
    } else {
      std::vector<int8_t> rows(outputs * inputs);
      for (int8_t& value : rows) value = int8_t(127 * numbers_.next());
      kept_bytes_.push_back(test::pack(rows, outputs, inputs));
      matrix.weight = kept_bytes_.back().data();
      matrix.scale = vector(outputs, 0.3 / 127);
    }
    return matrix;
  }

 private:
  test::Numbers numbers_;
  std::deque<std::vector<float>> kept_;
  std::deque<std::vector<int8_t>> kept_bytes_;
};

cpu::TransformerStage make_stage(Weights& weights, const cpu::TransformerStage&) {
  cpu::TransformerStage stage;
  stage.dim = kDim;
  stage.heads = kHeads;
  stage.head_dim = kHeadDim;
  stage.norm = weights.vector(kDim);
  const int64_t width = kHeads * kHeadDim;
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    stage.layers.push_back({weights.vector(kDim), weights.matrix(width, kDim),
                            weights.matrix(2 * width, kDim), weights.matrix(kDim, width),
                            weights.vector(kDim), weights.matrix(kInner, kDim),
                            weights.matrix(kDim, kInner)});
  }
  return stage;
}

cpu::Mamba1Stage make_stage(Weights& weights, const cpu::Mamba1Stage&) {
  cpu::Mamba1Stage stage;
  stage.dim = kDim;
  stage.inner = kInner;
  stage.states = kStates;
  stage.rank = kRank;
  stage.taps = kTaps;
  for (int64_t index = 0; index < kLayers; ++index) {
    cpu::Mamba1Layer layer{};
    layer.norm = weights.vector(kDim);
    layer.eps = 1e-5f;
    layer.in = weights.matrix(2 * kInner, kDim);
    layer.x = weights.matrix(kRank + 2 * kStates, kInner);
    layer.dt = weights.matrix(kInner, kRank);
    layer.out = weights.matrix(kDim, kInner);
    layer.conv = weights.vector(kInner * kTaps);
    layer.conv_bias = weights.vector(kInner);
    layer.rates = weights.vector(kInner * kStates, 0.1);
    layer.direct = weights.vector(kInner);
    stage.layers.push_back(layer);
  }
  return stage;
}

cpu::Mamba2Stage make_stage(Weights& weights, const cpu::Mamba2Stage&) {
  cpu::Mamba2Stage stage;
  stage.dim = kDim;
  stage.inner = kInner;
  stage.states = kStates;
  stage.heads = kHeads;
  stage.taps = kTaps;
  stage.eps = 1e-5f;
  stage.norm = weights.vector(kDim);
  const int64_t channels = kInner + 2 * kStates;
  for (int64_t index = 0; index < kLayers; ++index) {
    cpu::Mamba2Layer layer{};
    layer.norm = weights.vector(kDim);
    layer.in = weights.matrix(kInner + channels + kHeads, kDim);
    layer.out = weights.matrix(kDim, kInner);
    layer.conv = weights.vector(channels * kTaps);
    layer.conv_bias = weights.vector(channels);
    layer.dt_bias = weights.vector(kHeads);
    layer.rates = weights.vector(kHeads, 0.1);
    layer.direct = weights.vector(kHeads);
    layer.gated_norm = weights.vector(kInner);
    stage.layers.push_back(layer);
  }
  return stage;
}

// Calls function(worker) on so many threads of a team.
template <class Function>
void on_team(int64_t threads, Function function) {
  cpu::Team team(threads);
  std::vector<std::thread> others;
  for (int64_t index = 1; index < threads; ++index) {
    others.emplace_back([&team, &function, index] { function(cpu::Worker{team, index}); });
  }
  function(cpu::Worker{team, 0});
  for (std::thread& other : others) other.join();
}

// Of a row's cache.
constexpr int64_t kPage = cpu::kPagePositions, kPages = 2, kMorePositions = 8;

template <class Row>
using Rows = std::vector<cpu::BoundRow<Row>>;

// A row without positions, its cache cut from zeros.
void add_row(Weights& zeros, Rows<cpu::TransformerRow>& rows) {
  const int64_t delayed = kLayers * kDim, of_page = kLayers * kHeads * kPage * kHeadDim;
  cpu::BoundRow<cpu::TransformerRow>& bound = rows.emplace_back();
  for (int64_t page = 0; page < 2 * kPages; ++page) bound.pages.push_back(zeros.vector(of_page, 0));
  bound.row.position = 1;
  bound.row.keys = bound.pages.data();
  bound.row.values = bound.pages.data() + kPages;
  bound.row.layer_stride = kHeads * kPage * kHeadDim;
  bound.row.head_stride = kPage * kHeadDim;
  bound.row.delayed = zeros.vector(delayed, 0);
  bound.row.part_stride = kDim / 2;
  bound.start = {{zeros.vector(delayed, 0), bound.row.delayed, delayed}};
}

void add_row(Weights& zeros, Rows<cpu::MambaRow>& rows) {
  const int64_t ssm = kInner * kStates, window = (kTaps - 1) * (kInner + 2 * kStates);
  const int64_t of_ssm = kLayers * ssm, of_window = kLayers * window;
  cpu::MambaRow& row = rows.emplace_back().row;
  row = {1, zeros.vector(of_ssm, 0), zeros.vector(of_window, 0), ssm, window};
  rows.back().start = {{zeros.vector(of_ssm, 0), row.ssm, of_ssm},
                       {zeros.vector(of_window, 0), row.window, of_window}};
}

// What a run leaves of a row.
struct Left {
  std::vector<int64_t> ids;
  std::vector<float> outputs[3];

  bool operator==(const Left&) const = default;
};

// What a stage needs whose positions stand for so many bytes: upper ones embed patches.
cpu::RunStage make_part(Weights& weights, Weights& zeros, int64_t patch_size, bool is_most_global,
                        size_t rows) {
  const bool is_upper = patch_size > 1;
  cpu::RunStage part;
  part.dim = kDim;
  part.seq_len = is_upper ? kPatches : kPatch;
  part.patch_size = patch_size;
  part.table = weights.vector(kVocabulary * kDim);
  part.positions.fixed = weights.vector(part.seq_len * kDim);
  if (is_upper) {
    const int64_t flat = patch_size * kDim, below = patch_size == kPatch ? kPatch : kPatches;
    part.flat_norm = {weights.vector(flat), weights.vector(flat), 1e-5f};
    part.project = weights.matrix(kDim, flat);
    part.norm = {weights.vector(kDim), weights.vector(kDim), 1e-5f};
    part.to_context = weights.matrix(below * kDim, kDim);
  }
  const float* start_output = weights.vector(kDim);
  for (size_t row = 0; row < rows; ++row) {
    float* output = zeros.vector(kDim, 0);
    std::copy_n(start_output, kDim, output);
    part.rows.push_back(
        {0, output, start_output, is_most_global ? nullptr : zeros.vector(part.seq_len * kDim, 0)});
  }
  return part;
}

// Each row begins with a byte of its own and samples as many more as are asked for; one that begins
// with byte k has k patches before it, of which the last is to be taken in. With a delay, all other
// threads wait for so long at each byte.
template <class Stage>
std::vector<Left> sample_bytes(const std::vector<int64_t>& pending,
                               const std::vector<int64_t>& counts, int64_t threads,
                               std::chrono::milliseconds delay = {},
                               cpu::Team::Clock::time_point until = kNever) {
  Weights weights, zeros;
  const size_t rows = pending.size();
  std::deque<Stage> stages;
  std::deque<cpu::BoundStageOf<Stage>> bound;
  cpu::Run run;
  for (const int64_t patch_size : kPatchSizes) {
    const Stage& stage = stages.emplace_back(make_stage(weights, Stage()));
    Rows<typename Stage::Row> cache;
    for (size_t row = 0; row < rows; ++row) add_row(zeros, cache);
    run.stages.push_back(make_part(weights, zeros, patch_size, run.stages.empty(), rows));
    for (size_t row = 0; row < rows && patch_size == kPatch; ++row) {
      const int64_t taken_in = std::max<int64_t>(pending[row] - 1, 0);
      cache[row].row.advance(taken_in);
      run.stages.back().rows[row].position = taken_in;
    }
    run.stages.back().model = &bound.emplace_back(stage, std::move(cache), kPages * kPage);
  }
  run.to_logits = weights.matrix(kVocabulary, kDim);
  run.sampling.top_k = 5;
  run.has_pending = true;
  const int64_t most = kPatch * kPatches * kPatches;
  std::vector<float> uniform(most * kVocabulary);
  for (size_t i = 0; i < uniform.size(); ++i) uniform[i] = float((i * 37) % 101 + 1) / 103;
  std::vector<char> drawn(most + 2);  // no atomic, so that the thread sanitizer sees who waits
  int64_t num_drawn = 0;
  run.draw_ahead = [&](int64_t) { drawn[num_drawn++] = 1; };
  run.uniform = [&](int64_t, int64_t n) {
    std::this_thread::sleep_for(delay);
    CHECK(drawn[n]);
    return uniform.data() + n * kVocabulary;
  };
  std::vector<Left> left(rows);
  for (size_t i = 0; i < rows; ++i) {
    left[i].ids.resize(counts[i]);
    cpu::RunRow row;
    row.max_tokens = counts[i];
    row.ids = left[i].ids.data();
    row.pending = pending[i];
    row.length = kPatch * pending[i];
    row.history.assign(row.length, 7);
    run.rows.push_back(row);
  }
  std::vector<float> scratch(run.scratch_size(threads));
  const auto work = [&](const cpu::Worker& worker) { run.work(worker, scratch.data(), until); };
  on_team(threads, work);
  const bool is_interrupted = delay.count() > 0 || until != kNever;
  CHECK(!is_interrupted || !run.is_done());  // others can crowd any team
  while (!run.is_done()) on_team(1, work);
  for (size_t i = 0; i < rows; ++i) {
    CHECK(run.rows[i].num_tokens == counts[i]);
    for (int64_t n : {0, 1, 2}) {
      const float* output = run.stages[n].rows[i].output;
      left[i].outputs[n].assign(output, output + kDim);
    }
  }
  return left;
}

// What a stage gives for the same positions of each row, taken in over some calls: calls[i][row] of
// them in the i-th. After each call's positions come so many wrong ones, which are rolled back. The
// last row's first position is the last of a page.
template <class Stage>
std::vector<std::vector<float>> take_in(const std::vector<std::vector<int64_t>>& calls,
                                        int64_t threads, std::optional<int64_t> wrong = {}) {
  Weights weights, zeros;
  Stage stage = make_stage(weights, Stage());
  const size_t count = calls.front().size();
  Rows<typename Stage::Row> cache;
  for (size_t row = 0; row < count; ++row) add_row(zeros, cache);
  cache.back().row.advance(kPage - 2);
  if constexpr (requires { stage.cos; }) {
    stage.cos = weights.vector(kPages * kPage * kHeadDim / 2);
    stage.sin = weights.vector(kPages * kPage * kHeadDim / 2);
  }
  std::vector<const float*> inputs;
  for (size_t row = 0; row < count; ++row) inputs.push_back(weights.vector(kMorePositions * kDim));
  std::vector<std::vector<float>> outputs(count);
  for (const std::vector<int64_t>& counts : calls) {
    std::vector<typename Stage::Row> rows;
    std::vector<size_t> which;
    std::vector<float> x;
    for (size_t row = 0; row < count; ++row) {
      const int64_t count = counts[row] + wrong.value_or(0);
      if (count == 0) continue;
      which.push_back(row);
      rows.push_back(cache[row].row);
      rows.back().count = count;
      const float* from = inputs[row] + outputs[row].size();
      x.insert(x.end(), from, from + counts[row] * kDim);
      x.resize(x.size() + wrong.value_or(0) * kDim, 0.7f);
    }
    const int64_t positions = int64_t(x.size()) / kDim;
    std::vector<float> scratch(stage.scratch_size(positions, kPages * kPage, threads));
    std::vector<float> trail(wrong ? stage.trail_size(int64_t(rows.size()), positions) : 0);
    on_team(threads, [&](const cpu::Worker& worker) {
      stage.prefill(worker, rows, x.data(), scratch.data(), wrong ? trail.data() : nullptr);
      if (worker.is_last()) stage.normalize(x.data(), positions, x.data());
    });
    auto from = x.begin();
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t kept = counts[which[i]];
      outputs[which[i]].insert(outputs[which[i]].end(), from, from + kept * kDim);
      if (wrong) stage.roll_back(rows, int64_t(i), trail.data(), kept);
      cache[which[i]].row.advance(kept);
      from += rows[i].count * kDim;
    }
  }
  return outputs;
}

template <class Stage>
void positions_at_once_and_rolled_back_have_the_bits_of_steps() {
  const auto steps = take_in<Stage>(std::vector(5, std::vector<int64_t>(3, 1)), 1);
  for (const int64_t threads : {1, 2, 3}) {
    using Calls = std::vector<std::vector<int64_t>>;
    for (const Calls& calls :
         {Calls{{5, 5, 5}}, Calls{{2, 1, 4}, {3, 4, 1}}, Calls{{0, 3, 1}, {5, 0, 0}, {0, 2, 4}}}) {
      CHECK(take_in<Stage>(calls, threads) == steps);
      for (const int64_t wrong : {0, 1, 3}) CHECK(take_in<Stage>(calls, threads, wrong) == steps);
    }
  }
}

template <class Stage>
void a_team_and_neighbors_change_no_bit() {
  const std::vector<int64_t> pending = {0, 3, 1}, counts = {67, 4, 31};
  const auto together = sample_bytes<Stage>(pending, counts, 1);
  for (const int64_t threads : {2, 3}) {
    CHECK(sample_bytes<Stage>(pending, counts, threads) == together);
  }
  for (size_t i = 0; i < pending.size(); ++i) {
    CHECK(sample_bytes<Stage>({pending[i]}, {counts[i]}, 1)[0] == together[i]);
    CHECK(sample_bytes<Stage>({pending[i]}, {counts[i]}, 3)[0] == together[i]);
  }
}

// A thread that is to look around after every byte goes on where it was.
template <class Stage>
void a_run_in_pieces_changes_no_bit() {
  const std::vector<int64_t> pending = {2, 0}, counts = {kPatch * kPatches - 1, 7};
  CHECK(sample_bytes<Stage>(pending, counts, 1, {}, cpu::Team::Clock::now()) ==
        sample_bytes<Stage>(pending, counts, 1));
}

// A team that waits for most of its time leaves the rest to one thread.
template <class Stage>
void a_crowded_team_changes_no_bit() {
  const std::vector<int64_t> pending = {2, 0}, counts = {kPatch * kPatches - 1, 7};
  const std::chrono::milliseconds delay(3);
  CHECK(sample_bytes<Stage>(pending, counts, 2, delay) == sample_bytes<Stage>(pending, counts, 1));
}

int main() {
  for (const auto type : {cpu::WeightType::kInt8, cpu::WeightType::kFloat32}) {
    weight_type = type;
    positions_at_once_and_rolled_back_have_the_bits_of_steps<cpu::TransformerStage>();
    a_team_and_neighbors_change_no_bit<cpu::TransformerStage>();
    a_run_in_pieces_changes_no_bit<cpu::TransformerStage>();
    a_crowded_team_changes_no_bit<cpu::TransformerStage>();
  }
  positions_at_once_and_rolled_back_have_the_bits_of_steps<cpu::Mamba1Stage>();
  positions_at_once_and_rolled_back_have_the_bits_of_steps<cpu::Mamba2Stage>();
  a_team_and_neighbors_change_no_bit<cpu::Mamba1Stage>();
  a_team_and_neighbors_change_no_bit<cpu::Mamba2Stage>();
  a_run_in_pieces_changes_no_bit<cpu::Mamba2Stage>();
  a_crowded_team_changes_no_bit<cpu::Mamba2Stage>();
  return test::result();
}
