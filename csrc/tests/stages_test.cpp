// Tests of every stage: several positions at once have the bits of one after the other, and so has
// what comes after positions that were rolled back.
#include <deque>
#include <optional>

#include "check.h"
#include "models.h"
#include "on_team.h"

using namespace mblm;
using test::on_team;

// Of widths that two threads share evenly, and three do not.
constexpr test::Sizes kSizes = {24, 96, 4, 8, 20, 3, 2, 2};
constexpr int64_t kDim = kSizes.dim, kLayers = kSizes.layers;
constexpr int64_t kPage = cpu::kPagePositions, kPages = 2, kMorePositions = 8;

// Rows without positions, whose states are zeros, and which have them as long as this lives.
class States {
 public:
  void add(cpu::TransformerRow& row) {
    auto& pages = pages_.emplace_back();
    const int64_t of_head = kPage * kSizes.head_dim, of_layer = kSizes.heads * of_head;
    for (int64_t i = 0; i < 2 * kPages; ++i) pages.push_back(store_.zeros(kLayers * of_layer));
    row.position = 1;
    row.keys = pages.data();
    row.values = pages.data() + kPages;
    row.layer_stride = of_layer;
    row.head_stride = of_head;
    row.delayed = store_.zeros(kLayers * kDim);
    row.part_stride = kDim / 2;
  }
  void add(cpu::MambaRow& row) {
    const int64_t ssm = kSizes.inner * kSizes.states;
    const int64_t window = (kSizes.taps - 1) * (kSizes.inner + 2 * kSizes.states);
    row = {1, store_.zeros(kLayers * ssm), store_.zeros(kLayers * window), ssm, window};
  }

 private:
  test::Store store_;
  std::deque<std::vector<float*>> pages_;
};

void advance(cpu::TransformerRow& row, int64_t by) {
  row.position += by;
}
void advance(cpu::MambaRow&, int64_t) {}

void add_tables(test::Store& store, cpu::TransformerStage& stage) {
  stage.angles = kPages * kPage;
  stage.cos = store.vector(stage.angles * kSizes.head_dim / 2);
  stage.sin = store.vector(stage.angles * kSizes.head_dim / 2);
}
template <class Stage>
void add_tables(test::Store&, Stage&) {}

// What a stage gives for the same positions of each row, taken in over some calls: calls[i][row] of
// them in the i-th. After each call's positions come so many wrong ones, which are rolled back. The
// last row's first position is the last of a page.
template <class Stage>
std::vector<std::vector<float>> take_in(test::WeightType type,
                                        const std::vector<std::vector<int64_t>>& calls,
                                        int64_t threads, std::optional<int64_t> wrong = {}) {
  test::Store store(type, test::Device::kCpu);
  Stage stage;
  test::fill(store, kSizes, stage);
  add_tables(store, stage);
  const size_t count = calls.front().size();
  States states;
  std::vector<typename Stage::Row> all(count);
  for (auto& row : all) states.add(row);
  advance(all.back(), kPage - 2);
  std::vector<const float*> inputs;
  for (size_t row = 0; row < count; ++row) inputs.push_back(store.vector(kMorePositions * kDim));
  std::vector<std::vector<float>> outputs(count);
  for (const std::vector<int64_t>& counts : calls) {
    std::vector<typename Stage::Row> rows;
    std::vector<size_t> which;
    std::vector<float> x;
    for (size_t row = 0; row < count; ++row) {
      const int64_t positions = counts[row] + wrong.value_or(0);
      if (positions == 0) continue;
      which.push_back(row);
      rows.push_back(all[row]);
      rows.back().count = positions;
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
      advance(all[which[i]], kept);
      from += rows[i].count * kDim;
    }
  }
  return outputs;
}

template <class Stage>
void positions_at_once_and_rolled_back_have_the_bits_of_steps(test::WeightType type) {
  const auto steps = take_in<Stage>(type, std::vector(5, std::vector<int64_t>(3, 1)), 1);
  for (const int64_t threads : {1, 2, 3}) {
    using Calls = std::vector<std::vector<int64_t>>;
    for (const Calls& calls :
         {Calls{{5, 5, 5}}, Calls{{2, 1, 4}, {3, 4, 1}}, Calls{{0, 3, 1}, {5, 0, 0}, {0, 2, 4}}}) {
      CHECK(take_in<Stage>(type, calls, threads) == steps);
      for (const int64_t wrong : {0, 1, 3}) {
        CHECK(take_in<Stage>(type, calls, threads, wrong) == steps);
      }
    }
  }
}

int main() {
  const auto float32 = test::WeightType::kFloat32;
  for (const auto type : {test::WeightType::kInt8, float32}) {
    positions_at_once_and_rolled_back_have_the_bits_of_steps<cpu::TransformerStage>(type);
  }
  positions_at_once_and_rolled_back_have_the_bits_of_steps<cpu::Mamba1Stage>(float32);
  positions_at_once_and_rolled_back_have_the_bits_of_steps<cpu::Mamba2Stage>(float32);
  return test::result();
}
