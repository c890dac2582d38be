// Tests of runs on a GPU, emulated: hierarchies of one to three stages sample the bytes that the
// CPU does, and what has ended changes nothing more.
#include "cuda_check.h"
// The emulation comes before the sources.
#include <memory>

#include "cuda/decode_attention.cu"
#include "cuda/decode_product.cu"
#include "cuda/decode_product_mma.cu"
#include "cuda/decode_rows.cu"
#include "cuda/decode_sample.cu"
#include "cuda/decode_scan.cu"
#include "cuda/run.cpp"
#include "cuda/stage_step.cpp"
#include "cuda_run_models.h"
#include "torch/bound_rows.h"

using namespace mblm;
using test::Store;

constexpr test::Sizes kSizes = {16, 32, 2, 8, 12, 3, 2, 1};
constexpr int64_t kVocabulary = 40, kDim = kSizes.dim;
const std::vector<int64_t> kSeqLens = {6, 3, 4};

enum class Kind { kTransformer, kMamba1, kMamba2 };

// A model's weights, in the order that a device reads.
struct Model {
  Store store;
  std::vector<std::variant<cpu::TransformerStage, cpu::Mamba1Stage, cpu::Mamba2Stage>> stages;
  std::vector<cpu::RunStage> parts;
  cpu::Matrix to_logits;

  Model(test::WeightType type, const std::vector<Kind>& kinds,
        test::Device device = test::Device::kGpu)
      : store(type, device) {
    const size_t count = kinds.size();
    parts.resize(count);
    int64_t patch_size = 1;
    for (size_t n = count; n-- > 0;) {
      cpu::RunStage& part = parts[n];
      part.dim = kDim;
      part.seq_len = kSeqLens[kSeqLens.size() - count + n];
      part.patch_size = patch_size;
      patch_size *= part.seq_len;
      part.table = store.vector(kVocabulary * kDim);
      if (n % 2 == 0) part.positions.fixed = store.vector(200 * kDim);
      if (n % 2 == 1) part.positions.rotation = store.vector(200 * kDim);
    }
    for (size_t n = 0; n < count; ++n) {
      if (kinds[n] == Kind::kTransformer) stages.emplace_back(cpu::TransformerStage());
      if (kinds[n] == Kind::kMamba1) stages.emplace_back(cpu::Mamba1Stage());
      if (kinds[n] == Kind::kMamba2) stages.emplace_back(cpu::Mamba2Stage());
      std::visit([&](auto& stage) { test::fill(store, kSizes, stage); }, stages.back());
      if (n + 1 == count) continue;
      cpu::RunStage& part = parts[n];
      const int64_t flat = part.patch_size * kDim;
      part.flat_norm = {store.vector(flat), store.vector(flat), 1e-5f};
      part.project = store.matrix(kDim, flat);
      part.norm = {store.vector(kDim), store.vector(kDim), 1e-5f};
      part.to_context = store.matrix(parts[n + 1].seq_len * kDim, kDim);
    }
    to_logits = store.matrix(kVocabulary, kDim);
  }
};

// What a run leaves.
struct Left {
  std::vector<int64_t> ids;  // (bytes, rows)
  std::vector<std::vector<float>> outputs;

  Left(int64_t bytes, int64_t rows) : ids(bytes * rows, -7) {}
};

constexpr int64_t kCapacity = 100;

Left on_cpu(const Model& model, int64_t rows, int64_t bytes, const float* uniform,
            const cpu::Sampling& sampling) {
  Store store;
  cpu::Run run;
  run.stages = model.parts;
  run.to_logits = model.to_logits;
  run.sampling = sampling;
  run.has_pending = true;
  run.uniform = [&](int64_t row, int64_t n) { return uniform + (n * rows + row) * kVocabulary; };
  std::vector<std::unique_ptr<cpu::BoundStage>> bound;
  for (size_t n = 0; n < model.parts.size(); ++n) {
    std::visit(
        [&](const auto& stage) {
          using Stage = std::decay_t<decltype(stage)>;
          const auto state = test::make_state(store, stage, rows, kCapacity);
          bound.push_back(std::make_unique<cpu::BoundStageOf<Stage>>(
              bind_rows(stage, state, std::vector<int64_t>(rows, 1))));
        },
        model.stages[n]);
    run.stages[n].model = bound.back().get();
    const float* start = store.vector(rows * kDim);
    for (int64_t row = 0; row < rows; ++row) {
      float* output = store.zeros(kDim);
      std::copy_n(start + row * kDim, kDim, output);
      run.stages[n].rows.push_back({0, output, start + row * kDim,
                                    n > 0 ? store.zeros(run.stages[n].seq_len * kDim) : nullptr});
    }
  }
  Left left(bytes, rows);
  std::vector<std::vector<int64_t>> ids(rows, std::vector<int64_t>(bytes));
  for (int64_t row = 0; row < rows; ++row) {
    cpu::RunRow of;
    of.max_tokens = bytes;
    of.room = model.parts.size() == 1 ? bytes : 0;
    of.ids = ids[row].data();
    of.pending = row % kVocabulary;
    run.rows.push_back(of);
  }
  std::vector<float> scratch(run.scratch_size(1));
  cpu::Team team(1);
  run.work(cpu::Worker{team, 0}, scratch.data());
  for (int64_t n = 0; n < bytes; ++n) {
    for (int64_t row = 0; row < rows; ++row) left.ids[n * rows + row] = ids[row][n];
  }
  for (const cpu::RunStage& stage : run.stages) {
    auto& outputs = left.outputs.emplace_back();
    for (const auto& row : stage.rows) outputs.insert(outputs.end(), row.output, row.output + kDim);
  }
  return left;
}

// A run with memory of its own.
struct OnDevice {
  const int64_t rows, bytes;
  Store store, states;  // states as the CPU's are made
  cuda::Run run;
  int now = 0, latched = 0;
  std::unique_ptr<bool[]> ends = std::make_unique<bool[]>(kVocabulary);
  int64_t length = 0;
  Left left;

  OnDevice(const Model& model, int64_t rows, int64_t bytes, const float* uniform,
           const float* settings)
      : rows(rows), bytes(bytes), left(bytes, rows) {
    run.rows = rows;
    run.num_tokens = kVocabulary;
    run.to_logits = model.to_logits;
    run.halted = {&now, &latched};
    run.settings = settings;
    run.ends = ends.get();
    run.uniform = uniform;
    run.pending = store.integers(rows);
    for (int64_t row = 0; row < rows; ++row) run.pending[row] = row % kVocabulary;
    run.ids = left.ids.data();
    run.logits = store.vector(rows * kVocabulary, NAN);
    run.ordered = store.vector(rows * 2 * kVocabulary, NAN);
    const int64_t size = model.parts[0].patch_size;
    run.history = {store.integers(rows * size), size, store.integers(rows)};
    for (size_t n = 0; n < model.parts.size(); ++n) {
      cuda::DeviceStage stage;
      stage.part = model.parts[n];
      std::visit([&](const auto& of) { stage.model = bind(states, of, rows); }, model.stages[n]);
      stage.limit = n > 0 ? stage.part.seq_len : 60;
      stage.positions = store.integers(rows);
      const float* start = states.vector(rows * kDim);
      stage.start_output = start;
      stage.output = store.zeros(rows * kDim);
      std::copy_n(start, rows * kDim, stage.output);
      if (n > 0) stage.context = store.vector(rows * stage.part.seq_len * kDim, NAN);
      stage.workspace =
          store.vector(cuda::Run::workspace_size(stage.part, stage.model, rows, kDim), NAN);
      run.stages.push_back(stage);
    }
  }

  static cuda::AnyModel bind(Store& store, const cpu::TransformerStage& stage, int64_t rows) {
    return cuda::ModelOnDevice<cpu::TransformerStage, cuda::TransformerRow>{
        &stage, test::make_state(store, stage, rows, kCapacity)[0]};
  }
  template <class Stage>
  static cuda::AnyModel bind(Store& store, const Stage& stage, int64_t rows) {
    return cuda::ModelOnDevice<Stage, cuda::MambaRow>{
        &stage, test::make_state(store, stage, rows, kCapacity)[0]};
  }

  // The stages above the local one, which see that `length` bytes are complete.
  void above() {
    for (size_t n = 0; n + 1 < run.stages.size(); ++n) {
      const cpu::RunStage& part = run.stages[n].part;
      if (n > 0 && length % (part.patch_size * part.seq_len) == 0) {
        CHECK(!run.begin_anew(n, nullptr));
      } else if (length > 0 && length % part.patch_size == 0) {
        CHECK(!run.take_patch(n, nullptr));
      }
    }
  }

  // Takes in a byte and samples the next, what the stages above do coming beside or before it.
  void take_byte(int64_t slot) {
    const bool is_last =
        run.stages.size() > 1 && (length + 1) % run.stages.back().part.seq_len == 0;
    CHECK(!run.embed_byte(nullptr));
    ++length;
    if (is_last) above();
    CHECK(!run.step_and_sample(slot, nullptr));
    if (is_last) CHECK(!run.begin_anew(run.stages.size() - 1, nullptr));
  }

  Left& work() {
    above();
    if (run.stages.size() > 1) CHECK(!run.begin_anew(run.stages.size() - 1, nullptr));
    for (int64_t slot = 0; slot < bytes; ++slot) take_byte(slot);
    for (const auto& stage : run.stages) {
      left.outputs.emplace_back(stage.output, stage.output + rows * kDim);
    }
    return left;
  }
};

void samples_the_bytes_of_the_cpu(test::WeightType type, const std::vector<Kind>& kinds,
                                  int64_t rows, int64_t bytes, const cpu::Sampling& sampling) {
  const Model model(type, kinds), cpu_model(type, kinds, test::Device::kCpu);
  Store numbers;
  float* uniform = numbers.vector(bytes * rows * kVocabulary);
  for (int64_t i = 0; i < bytes * rows * kVocabulary; ++i) uniform[i] = (uniform[i] + 1) / 2;
  const float settings[] = {sampling.temperature, sampling.top_p, float(sampling.top_k)};
  const Left expected = on_cpu(cpu_model, rows, bytes, uniform, sampling);
  const auto [ids, outputs] = test::in_both_orders([&] {
    OnDevice device(model, rows, bytes, uniform, settings);
    const Left& left = device.work();
    return std::tuple(left.ids, left.outputs.back());
  });
  CHECK(ids == expected.ids);
  // The last byte was not of a patch's end, so that the local stage stands where the CPU's does.
  const double error =
      test::relative_error(outputs.data(), expected.outputs.back().data(), rows * kDim);
  if (!(error < test::tolerance(type))) std::printf("error %g of %d rows\n", error, int(rows));
  CHECK(error < test::tolerance(type));
}

void what_has_ended_changes_nothing_more() {
  const Model model(test::WeightType::kFloat32, {Kind::kMamba2, Kind::kTransformer});
  const int64_t rows = 2, bytes = 7;
  Store numbers;
  float* uniform = numbers.vector(bytes * rows * kVocabulary);
  const float settings[] = {1, 0, 1};
  OnDevice free(model, rows, bytes, uniform, settings),
      ended(model, rows, bytes, uniform, settings), stopped(model, rows, 3, uniform, settings);
  free.work();
  // The fourth of its bytes ends the run, wherever it came first.
  const int64_t ending = free.left.ids[3 * rows];
  int64_t last = 0;
  while (free.left.ids[last * rows] != ending && free.left.ids[last * rows + 1] != ending) ++last;
  ended.ends[ending] = true;
  ended.work();
  for (int64_t i = 0; i < bytes * rows; ++i) {
    CHECK(ended.left.ids[i] == (i / rows <= last ? free.left.ids[i] : -1));
  }
  OnDevice same(model, rows, last + 1, uniform, settings);
  same.work();
  CHECK(std::equal(same.run.pending, same.run.pending + rows, ended.run.pending));
  for (size_t n = 0; n < 2; ++n) {
    const auto &one = same.run.stages[n], &other = ended.run.stages[n];
    const bool is_ahead = (last + 1) % model.parts[1].seq_len == 0;
    if (!is_ahead) CHECK(std::equal(one.output, one.output + rows * kDim, other.output));
    if (!is_ahead) CHECK(one.positions[0] == other.positions[0]);
  }
}

int main() {
  const std::vector<Kind> kinds[] = {
      {Kind::kTransformer},
      {Kind::kMamba1},
      {Kind::kMamba2},
      {Kind::kMamba2, Kind::kTransformer},
      {Kind::kTransformer, Kind::kMamba1},
      {Kind::kTransformer, Kind::kMamba2},
      {Kind::kMamba1, Kind::kTransformer, Kind::kMamba2},
      {Kind::kMamba2, Kind::kMamba1, Kind::kTransformer},
  };
  for (const auto& stages : kinds) {
    samples_the_bytes_of_the_cpu(test::WeightType::kFloat32, stages, 1, 27, {1, 1, 0});
    samples_the_bytes_of_the_cpu(test::WeightType::kBFloat16, stages, 3, 6, {0.8f, 9, 0});
    samples_the_bytes_of_the_cpu(test::WeightType::kInt8, stages, 2, 6, {1, 1, 0.8f});
  }
  what_has_ended_changes_nothing_more();
  return test::result();
}
