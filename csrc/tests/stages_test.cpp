// Tests of every stage: several positions have the bits of one after the other. And of runs with
// three of them, one above the other: a team of threads gives the bits of one thread, and rows that
// run side by side those of rows alone. Under the thread sanitizer, that no barrier is missing.
#include <algorithm>
#include <chrono>
#include <deque>
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
bool has_halves = false;  // those that can be cut so

// Random weights that live as long as the stages that point to them.
class Weights {
 public:
  float* vector(int64_t size, double scale = 1) {
    auto& values = kept_.emplace_back(numbers_.vector<float>(size));
    for (float& value : values) value = float(value * scale);
    return values.data();
  }

  cpu::Matrix matrix(int64_t outputs, int64_t inputs, bool may_be_halved = false) {
    cpu::Matrix matrix;
    matrix.is_halved = may_be_halved && has_halves;
    matrix.outputs = outputs;
    matrix.inputs = inputs;
    matrix.type = weight_type;
    matrix.bias = vector(outputs);
    if (weight_type == cpu::WeightType::kFloat32) {
      matrix.weight = vector(outputs * inputs, 0.3);
    } else {
      std::vector<int8_t> rows(outputs * inputs);
      for (int8_t& value : rows) value = int8_t(127 * numbers_.next());
      kept_bytes_.push_back(matrix.is_halved ? test::pack_in_halves(rows, outputs, inputs)
                                             : test::pack(rows, outputs, inputs));
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
                            weights.matrix(2 * width, kDim), weights.matrix(kDim, width, true),
                            weights.vector(kDim), weights.matrix(kInner, kDim),
                            weights.matrix(kDim, kInner, true)});
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

// A row's empty cache, cut from zeros.
void add_row(Weights& zeros, cpu::TransformerState& state) {
  const int64_t capacity = 1 + std::max(kPatch, kPatches);
  const int64_t of_layer = kHeads * capacity * kHeadDim;
  cpu::TransformerRow row;
  row.capacity = capacity;
  row.position = 1;
  row.keys = zeros.vector(kLayers * of_layer, 0);
  row.values = zeros.vector(kLayers * of_layer, 0);
  row.layer_stride = of_layer;
  row.delayed = zeros.vector(kLayers * kDim, 0);
  row.part_stride = row.start_stride = kDim / 2;
  row.start_delayed = zeros.vector(kLayers * kDim, 0);
  state.rows.push_back(row);
}

void add_row(Weights& zeros, cpu::MambaState& state) {
  const int64_t ssm = kInner * kStates, window = (kTaps - 1) * (kInner + 2 * kStates);
  state.rows.push_back({zeros.vector(kLayers * ssm, 0), zeros.vector(kLayers * window, 0), ssm,
                        window, zeros.vector(kLayers * ssm, 0), zeros.vector(kLayers * window, 0)});
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
    typename Stage::State state;
    for (size_t row = 0; row < rows; ++row) add_row(zeros, state);
    run.stages.push_back(make_part(weights, zeros, patch_size, run.stages.empty(), rows));
    for (size_t row = 0; row < rows && patch_size == kPatch; ++row) {
      const int64_t taken_in = std::max<int64_t>(pending[row] - 1, 0);
      state.rows[row].advance(taken_in);
      run.stages.back().rows[row].position = taken_in;
    }
    run.stages.back().model = &bound.emplace_back(stage, state);
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

// Outputs (rows, positions, dim) of a stage that takes in the same positions in pieces, the last
// row being one position behind the others.
template <class Stage>
std::vector<float> take_in(const std::vector<int64_t>& pieces, int64_t threads) {
  constexpr int64_t kRows = 3, kPositions = 5;
  Weights weights, zeros;
  const Stage stage = make_stage(weights, Stage());
  typename Stage::State state;
  for (int64_t row = 0; row < kRows; ++row) add_row(zeros, state);
  state.rows.back().advance(-1);
  std::vector<float> outputs(kRows * kPositions * kDim);
  const float* inputs = weights.vector(kRows * kPositions * kDim);
  int64_t first = 0;
  for (const int64_t count : pieces) {
    std::vector<float> x(kRows * count * kDim);
    for (int64_t row = 0; row < kRows; ++row) {
      std::copy_n(inputs + (row * kPositions + first) * kDim, count * kDim,
                  x.data() + row * count * kDim);
    }
    std::vector<float> scratch(stage.scratch_size(state, count, threads));
    on_team(threads, [&](const cpu::Worker& worker) {
      const float* out = stage.prefill(worker, state, count, x.data(), scratch.data());
      if (worker.is_last()) stage.normalize(out, kRows * count, x.data());
    });
    for (int64_t row = 0; row < kRows; ++row) {
      std::copy_n(x.data() + row * count * kDim, count * kDim,
                  outputs.data() + (row * kPositions + first) * kDim);
      state.rows[row].advance(count);
    }
    first += count;
  }
  CHECK(first == kPositions);
  return outputs;
}

template <class Stage>
void positions_at_once_have_the_bits_of_steps() {
  const auto steps = take_in<Stage>({1, 1, 1, 1, 1}, 1);
  for (const int64_t threads : {1, 2, 3}) {
    for (const auto& pieces : {std::vector<int64_t>{5}, {2, 3}, {1, 4}, {4, 1}}) {
      CHECK(take_in<Stage>(pieces, threads) == steps);
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
  for (const bool halves : {true, false}) {
    has_halves = halves;
    for (const auto type : {cpu::WeightType::kInt8, cpu::WeightType::kFloat32}) {
      weight_type = type;
      positions_at_once_have_the_bits_of_steps<cpu::TransformerStage>();
      a_team_and_neighbors_change_no_bit<cpu::TransformerStage>();
      a_run_in_pieces_changes_no_bit<cpu::TransformerStage>();
      a_crowded_team_changes_no_bit<cpu::TransformerStage>();
    }
  }
  positions_at_once_have_the_bits_of_steps<cpu::Mamba1Stage>();
  positions_at_once_have_the_bits_of_steps<cpu::Mamba2Stage>();
  a_team_and_neighbors_change_no_bit<cpu::Mamba1Stage>();
  a_team_and_neighbors_change_no_bit<cpu::Mamba2Stage>();
  a_run_in_pieces_changes_no_bit<cpu::Mamba2Stage>();
  a_crowded_team_changes_no_bit<cpu::Mamba2Stage>();
  return test::result();
}
