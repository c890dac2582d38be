// Tests of units of decoding on a GPU, emulated: rows of any lengths go on side by side, and each
// has the bits that it has alone, whatever ends, waits or is dropped beside it.
#include "cuda_check.h"
// The emulation comes before the sources.
#include <deque>
#include <memory>
#include <utility>

#include "cuda/decode_attention.cu"
#include "cuda/decode_choose.cu"
#include "cuda/decode_product.cu"
#include "cuda/decode_product_mma.cu"
#include "cuda/decode_scan.cu"
#include "cuda/decode_slots.cu"
#include "cuda/stage_step.cpp"
#include "cuda/units.cpp"
#include "models.h"

using namespace mblm;
using test::Store;

constexpr test::Sizes kSizes = {16, 32, 2, 8, 12, 3, 2, 1};
constexpr int64_t kVocabulary = 23, kDim = kSizes.dim, kTokensOfTop = 12, kBytes = 5;
const std::vector<int64_t> kSeqLens = {kTokensOfTop, 3, 4};

enum class Kind { kTransformer, kMamba1, kMamba2 };

// Follows no byte but one, after which a row ends.
struct EndsAfter {
  std::vector<int32_t> classes = std::vector<int32_t>(kVocabulary, 0), next = {0, 1, 0, 1},
                       distance = {1, 0};

  explicit EndsAfter(int64_t id) {
    if (id >= 0) classes[id] = 1;
  }
  cuda::Automaton automaton() const { return {classes.data(), next.data(), distance.data(), 2, 0}; }
};

// Weights and states of a model with so many slots.
struct Cache {
  Store store{test::WeightType::kFloat32};
  std::deque<std::variant<cpu::TransformerStage, cpu::Mamba1Stage, cpu::Mamba2Stage>> models;
  std::vector<int64_t> patch_sizes, ids;
  std::vector<cuda::Drawn> drawn;
  std::vector<float> log_probs;
  std::vector<cuda::Slot> rows;
  std::vector<std::vector<int64_t>> grown;  // per slot
  cuda::Units units;

  Cache(const std::vector<Kind>& kinds, int64_t slots, test::WeightType type)
      : store(type), rows(slots), grown(slots) {
    const int64_t count = int64_t(kinds.size());
    cuda::Slots& all = units.slots;
    all.count = slots;
    all.num_tokens = kVocabulary;
    all.width = kDim;
    all.bytes = kBytes;
    units.stages.resize(count);
    patch_sizes.assign(count, 1);
    for (int64_t n = count - 2; n >= 0; --n) patch_sizes[n] = patch_sizes[n + 1] * length(n + 1);
    for (int64_t n = 0; n < count; ++n) add_stage(n, kinds[n]);
    units.to_logits = store.matrix(kVocabulary, kDim);
    all.schedule = {count, patch_sizes.data()};
    all.rows = rows.data();
    all.last_bytes = store.integers(slots * patch_sizes[0]);
    all.last_size = patch_sizes[0];
    all.begins = store.integers(count * slots);
    all.takes = store.integers(count * slots);
    all.positions = store.integers(slots);
    all.logits = store.vector(slots * kVocabulary, NAN);
    all.empty_logits = store.vector(kVocabulary);
    drawn.resize(slots * kBytes);
    ids.resize(slots * kBytes);
    log_probs.resize(slots * kBytes);
    all.drawn = drawn.data();
    all.ids = ids.data();
    all.log_probs = log_probs.data();
    for (cuda::UnitStage& stage : units.stages) {
      stage.workspace = store.vector(units.workspace_size(stage), NAN);
    }
  }

  int64_t length(int64_t n) const { return kSeqLens[kSeqLens.size() - units.stages.size() + n]; }

  void add_stage(int64_t n, Kind kind) {
    cuda::UnitStage& stage = units.stages[n];
    const int64_t slots = units.slots.count;
    stage.index = n;
    stage.dim = kDim;
    stage.patch_size = patch_sizes[n];
    stage.limit = units.stages.size() == 1 ? 200 : length(n);
    stage.table = store.vector(kVocabulary * kDim);
    (n % 2 ? stage.fixed : stage.rotation) = store.vector(stage.limit * kDim);
    stage.output = store.vector(slots * kDim, NAN);
    stage.start[0] = {store.vector(kDim), stage.output, 1, kDim};
    if (n > 0) stage.context = store.vector(slots * stage.limit * kDim, NAN);
    if (kind == Kind::kTransformer) models.emplace_back(cpu::TransformerStage());
    if (kind == Kind::kMamba1) models.emplace_back(cpu::Mamba1Stage());
    if (kind == Kind::kMamba2) models.emplace_back(cpu::Mamba2Stage());
    std::visit(
        [&](auto& model) {
          test::fill(store, kSizes, model);
          bind(model, stage);
        },
        models.back());
    if (n + 1 == int64_t(units.stages.size())) return;
    const int64_t flat = stage.patch_size * kDim;
    stage.flat_norm = {store.vector(flat), store.vector(flat), 1e-5f};
    stage.project = store.matrix(kDim, flat);
    stage.norm = {store.vector(kDim), store.vector(kDim), 1e-5f};
    stage.to_context = store.matrix(length(n + 1) * kDim, kDim);
  }

  void bind(const cpu::TransformerStage& model, cuda::UnitStage& stage) {
    const int64_t slots = units.slots.count, layers = int64_t(model.layers.size()), half = kDim / 2;
    const int64_t capacity = 1 + stage.limit, of_row = model.heads * capacity * model.head_dim;
    cuda::TransformerRow row;
    row.capacity = capacity;
    row.keys = store.zeros(layers * slots * of_row);
    row.values = store.zeros(layers * slots * of_row);
    row.layer_stride = slots * of_row;
    row.delayed = store.vector(layers * 2 * slots * half, NAN);
    row.part_stride = slots * half;
    row.cos = store.vector(capacity * (model.head_dim / 2));
    row.sin = store.vector(capacity * (model.head_dim / 2));
    row.tickets = reinterpret_cast<uint32_t*>(store.integers(slots * model.heads));
    stage.start[1] = {store.vector(layers * 2 * half), row.delayed, layers * 2, half};
    stage.model = cuda::ModelInSlots<cpu::TransformerStage, cuda::TransformerRow>{&model, row};
  }

  template <class Model>
  void bind(const Model& model, cuda::UnitStage& stage) {
    const int64_t slots = units.slots.count, layers = int64_t(model.layers.size());
    const bool is_first = std::is_same_v<Model, cpu::Mamba1Stage>;
    const int64_t channels = model.inner + (is_first ? 0 : 2 * model.states);
    const int64_t ssm = model.inner * model.states, window = (model.taps - 1) * channels;
    cuda::MambaRow row;
    row.ssm = store.vector(layers * slots * ssm, NAN);
    row.window = store.vector(layers * slots * window, NAN);
    row.ssm_stride = slots * ssm;
    row.window_stride = slots * window;
    stage.start[1] = {store.vector(layers * ssm), row.ssm, layers, ssm};
    stage.start[2] = {store.vector(layers * window), row.window, layers, window};
    stage.model = cuda::ModelInSlots<Model, cuda::MambaRow>{&model, row};
  }

  bool is_at_turn(const cuda::Slot& row) const {
    const bool has_above = patch_sizes.size() > 1;
    return has_above ? row.taken % patch_sizes[patch_sizes.size() - 2] == 0 : row.taken == 0;
  }

  // Feeds, then chooses; the n-th byte's numbers are at an offset that both know.
  void feed(int64_t slot, const std::vector<int64_t>& bytes, bool skips = false) {
    cuda::Slot& row = rows[slot];
    row.way = cuda::Way::kFeed;
    row.pending = bytes[0];
    for (size_t next = 1; next < bytes.size();) {
      row.done = row.skipped = 0;
      row.left = std::min(kBytes, int64_t(bytes.size() - next));
      std::copy_n(bytes.data() + next, row.left, ids.data() + slot * kBytes);
      const size_t above = patch_sizes.size() - 2;
      const int64_t end = skips ? patch_sizes[above] - row.taken % patch_sizes[above] : kBytes;
      if (end < row.left) row.left = row.skipped = end;
      queue();
      next += row.done;
    }
    row.skipped = 0;
  }

  void plan(int64_t slot, int64_t bytes) {
    cuda::Slot& row = rows[slot];
    row.way = cuda::Way::kChoose;
    row.left = row.planned = bytes;
    row.temperature = 0.7f + 0.1f * float(slot);
    row.top_k = slot % 3 == 0 ? 1 : 9;
    row.top_p = slot % 3 == 2 ? 0.8f : 0;
    if (slot % 2) row.least = std::log(0.01f);
    row.threads = 256;
    row.first_number = slot * kVocabulary;
    row.has_log_probs = true;
  }

  void queue() {
    bool has_turn = false;
    for (const cuda::Slot& row : rows) {
      has_turn |= row.left > 0 && row.pending >= 0 && is_at_turn(row);
    }
    for (int64_t slot = 0; slot < units.slots.count; ++slot) {
      for (int64_t n = 0; n < kBytes; ++n) {
        drawn[slot * kBytes + n] = {7 + uint64_t(slot), 4 * (grown[slot].size() + n)};
      }
    }
    CHECK(!units.queue(has_turn, kBytes, nullptr));
  }

  // Until nothing is left; between units, before(unit) may change rows.
  template <class Before>
  void work(Before before) {
    for (int64_t unit = 0; unit < 100; ++unit) {
      before(unit);
      bool is_over = unit > 1;
      for (cuda::Slot& row : rows) {
        row.done = 0;
        is_over &= row.left <= 0;
      }
      if (is_over) return;
      queue();
      for (int64_t slot = 0; slot < units.slots.count; ++slot) {
        const int64_t* const from = ids.data() + slot * kBytes;
        if (rows[slot].way == cuda::Way::kChoose) {
          grown[slot].insert(grown[slot].end(), from, from + rows[slot].done);
        }
      }
    }
    CHECK(false);
  }

  // Everything of a row that later bytes depend on.
  std::vector<float> state(int64_t slot) const {
    std::vector<float> all = {float(rows[slot].taken), float(rows[slot].pending)};
    for (const cuda::UnitStage& stage : units.stages) {
      for (const auto& part : stage.start) {
        for (int64_t layer = 0; layer < part.layers; ++layer) {
          const float* at = part.to + (layer * units.slots.count + slot) * part.size;
          all.insert(all.end(), at, at + part.size);
        }
      }
    }
    return all;
  }
};

std::vector<int64_t> prompt(int64_t slot) {
  std::vector<int64_t> bytes;
  for (int64_t i = 0; i < slot * 2 + slot / 3; ++i)
    bytes.push_back((5 * slot + 3 * i) % kVocabulary);
  return bytes;
}

constexpr int64_t kSlots = 5, kDropped = 1, kEnding = 2, kPausing = 3, kLate = 4;

// The rows from `first` to `last` alone or all together; one ends at a byte, one is dropped after a
// unit, one pauses there, one joins then.
std::unique_ptr<Cache> decode(const std::vector<Kind>& kinds, test::WeightType type, int64_t only,
                              int64_t ending) {
  auto cache = std::make_unique<Cache>(kinds, kSlots, type);
  const EndsAfter end(ending);
  const auto takes_part = [&](int64_t slot) { return only < 0 || slot == only; };
  const auto feed = [&](int64_t slot) {
    if (takes_part(slot) && !prompt(slot).empty()) cache->feed(slot, prompt(slot));
  };
  const auto plan = [&](int64_t slot) {
    if (!takes_part(slot)) return;
    cache->plan(slot, 6 + slot);
    if (slot == kEnding) cache->rows[slot].stop = end.automaton();
  };
  for (int64_t slot = 0; slot < kSlots; ++slot) {
    if (slot != kLate) feed(slot);
  }
  for (int64_t slot = 0; slot < kSlots; ++slot) {
    if (slot != kLate) plan(slot);
  }
  cache->work([&](int64_t unit) {
    if (unit != 1) return;
    if (takes_part(kDropped)) cache->rows[kDropped].left = 0;
    if (takes_part(kPausing)) {
      cache->rows[kPausing].way = cuda::Way::kPause;
      cache->rows[kPausing].left = cache->rows[kPausing].pending >= 0;
    }
    if (takes_part(kLate)) {
      std::vector<int64_t> left;
      for (cuda::Slot& row : cache->rows) left.push_back(std::exchange(row.left, 0));
      feed(kLate);
      plan(kLate);
      for (int64_t slot = 0; slot < kSlots; ++slot) {
        if (slot != kLate) cache->rows[slot].left = left[slot];
      }
    }
  });
  return cache;
}

void rows_have_the_bits_that_they_have_alone(const std::vector<Kind>& kinds, test::WeightType type,
                                             bool falls) {
  const int64_t ending = decode(kinds, type, kEnding, -1)->grown[kEnding].at(3);
  cuda::emulation::falling_order = falls;
  const auto together = decode(kinds, type, -1, ending);
  for (int64_t slot = 0; slot < kSlots; ++slot) {
    const auto alone = decode(kinds, type, slot, ending);
    const cuda::Slot &got = together->rows[slot], &want = alone->rows[slot];
    CHECK(got.taken == want.taken && got.pending == want.pending);
    CHECK(together->grown[slot] == alone->grown[slot]);
    CHECK(test::same_bits(together->state(slot), alone->state(slot)));
  }
  CHECK(together->grown[kEnding].back() == ending && together->rows[kEnding].pending == ending);
  CHECK(int64_t(together->grown[0].size()) == 6 && together->rows[0].taken == 5);
  CHECK(together->rows[kPausing].pending == -1);
  cuda::emulation::falling_order = false;
}

// The local stage takes no step up to the end of a patch that is fed.
void bytes_that_are_skipped_make_no_difference(const std::vector<Kind>& kinds) {
  const std::vector<int64_t> bytes = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7};
  Cache stepping(kinds, 2, test::WeightType::kFloat32);
  Cache skipping(kinds, 2, test::WeightType::kFloat32);
  int64_t begin = 0;
  for (const int64_t end : {2, 9, 10, 14}) {  // the last byte of a piece is the next one's first
    const std::vector<int64_t> piece(bytes.begin() + begin, bytes.begin() + end);
    stepping.feed(1, piece);
    skipping.feed(1, piece, true);
    CHECK(test::same_bits(stepping.state(1), skipping.state(1)));
    begin = end - 1;
  }
}

int main() {
  using enum Kind;
  const auto check = rows_have_the_bits_that_they_have_alone;
  check({kTransformer}, test::WeightType::kInt8, false);
  check({kMamba2, kTransformer}, test::WeightType::kFloat32, false);
  check({kTransformer, kMamba1}, test::WeightType::kBFloat16, true);
  check({kMamba1, kTransformer, kMamba2}, test::WeightType::kFloat32, true);
  bytes_that_are_skipped_make_no_difference({kTransformer, kMamba1});
  bytes_that_are_skipped_make_no_difference({kMamba2, kMamba1, kTransformer});
  return test::result();
}
