// Tests of runs with every stage: a team of threads gives the bits of one thread, and rows that run
// side by side those of rows alone. Under the thread sanitizer, that no barrier is missing.
#include <deque>
#include <thread>

#include "check.h"
#include "cpu/mamba1_stage.h"
#include "cpu/mamba2_stage.h"
#include "cpu/run.h"
#include "cpu/transformer_stage.h"

using namespace mblm;

constexpr int64_t kDim = 24, kInner = 72, kHeads = 3, kHeadDim = 8, kStates = 20, kTaps = 3;
constexpr int64_t kRank = 2, kLayers = 2, kVocabulary = 50, kRoom = 6;

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
    matrix.weight = vector(outputs * inputs, 0.3);
    matrix.bias = vector(outputs);
    return matrix;
  }

 private:
  test::Numbers numbers_;
  std::deque<std::vector<float>> kept_;
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

// A row's empty cache, cut from zeros.
void add_row(Weights& zeros, cpu::TransformerState& state) {
  const int64_t of_layer = kHeads * kRoom * kHeadDim;
  cpu::TransformerRow row;
  row.capacity = kRoom;
  row.keys = zeros.vector(kLayers * of_layer, 0);
  row.values = zeros.vector(kLayers * of_layer, 0);
  row.layer_stride = of_layer;
  row.delayed = zeros.vector(kLayers * kDim, 0);
  row.part_stride = kDim / 2;
  state.rows.push_back(row);
}

void add_row(Weights& zeros, cpu::MambaState& state) {
  const int64_t ssm = kInner * kStates, window = (kTaps - 1) * (kInner + 2 * kStates);
  state.rows.push_back(
      {zeros.vector(kLayers * ssm, 0), zeros.vector(kLayers * window, 0), ssm, window});
}

// What a run leaves of a row.
struct Left {
  std::vector<int64_t> ids;
  std::vector<float> x;

  bool operator==(const Left&) const = default;
};

// Each row samples bytes from its first position in its patch to the patch's end.
template <class Stage>
std::vector<Left> sample_bytes(const std::vector<int64_t>& firsts, int64_t threads) {
  Weights weights, zeros;
  const Stage stage = make_stage(weights, Stage());
  cpu::Run run;
  run.input.dim = kDim;
  run.input.table = weights.vector(kVocabulary * kDim);
  run.input.positions = weights.vector(kRoom * kDim);
  run.to_logits = weights.matrix(kVocabulary, kDim);
  run.sampling.top_k = 5;
  run.has_pending = true;
  const float* numbers = weights.vector(kRoom * kVocabulary, 0.5);
  std::vector<float> uniform(numbers, numbers + kRoom * kVocabulary);
  for (float& number : uniform) number += 0.5f;
  run.uniform = [&](int64_t, int64_t n) { return uniform.data() + n * kVocabulary; };
  typename Stage::State state;
  std::vector<Left> left(firsts.size());
  for (size_t i = 0; i < firsts.size(); ++i) {
    add_row(zeros, state);
    left[i].ids.resize(kRoom - firsts[i]);
    left[i].x.resize(kDim);
    cpu::RunRow row;
    row.first = firsts[i];
    row.max_tokens = row.max_steps = kRoom - firsts[i];
    row.x = left[i].x.data();
    row.ids = left[i].ids.data();
    row.pending = firsts[i];
    run.rows.push_back(row);
  }
  std::vector<float> scratch(stage.scratch_size(state, threads));
  cpu::Team team(threads);
  std::vector<std::thread> others;
  const auto work = [&](int64_t index) {
    cpu::run_patch(cpu::Worker{team, index}, stage, state, run, scratch.data());
  };
  for (int64_t index = 1; index < threads; ++index) others.emplace_back(work, index);
  work(0);
  for (std::thread& other : others) other.join();
  return left;
}

template <class Stage>
void a_team_and_neighbors_change_no_bit() {
  const std::vector<int64_t> firsts = {0, 3, 1};
  const auto together = sample_bytes<Stage>(firsts, 1);
  for (const int64_t threads : {2, 3}) CHECK(sample_bytes<Stage>(firsts, threads) == together);
  for (size_t i = 0; i < firsts.size(); ++i) {
    CHECK(sample_bytes<Stage>({firsts[i]}, 1)[0] == together[i]);
    CHECK(sample_bytes<Stage>({firsts[i]}, 3)[0] == together[i]);
  }
}

int main() {
  a_team_and_neighbors_change_no_bit<cpu::TransformerStage>();
  a_team_and_neighbors_change_no_bit<cpu::Mamba1Stage>();
  a_team_and_neighbors_change_no_bit<cpu::Mamba2Stage>();
  return test::result();
}
