// Layout of rows' state, and copying what is shared before it is written: see memory.h.
#include "decode/memory.h"

#include <algorithm>
#include <utility>

namespace mblm::decode {

StageLayout::StageLayout(const Parts& parts, int64_t n) {
  using cpu::cache_lines::round_up;
  const StageParts& stage = parts.stages[n];
  dim = stage.dim;
  seq_len = parts.schedule.seq_len(n);
  const auto add = [&](const char* name, std::vector<int64_t> shape) {
    int64_t size = 1;
    for (const int64_t of : shape) size *= of;
    saved.push_back({name, std::move(shape), state});
    state += size;
  };
  if (const auto* model = std::get_if<cpu::TransformerStage>(&stage.model)) {
    const bool is_bounded = n > 0 || parts.max_length > 0;
    layers = int64_t(model->layers.size());
    add("delayed", {layers, 2, dim / 2});
    planes = layers * model->heads;
    head_dim = model->head_dim;
    page_positions = is_bounded ? std::min(cpu::kPagePositions, 1 + seq_len) : cpu::kPagePositions;
    plane = page_positions * head_dim;
    values = round_up(planes * plane);
    page = 2 * values;
    saved.push_back({"keys", {layers, model->heads, 0, head_dim}, 0, true});
    saved.push_back({"values", {layers, model->heads, 0, head_dim}, values, true});
  } else if (const auto* model = std::get_if<cpu::Mamba1Stage>(&stage.model)) {
    layers = int64_t(model->layers.size());
    add("ssm", {layers, model->inner, model->states});
    ssm = state;
    add("window", {layers, model->taps - 1, model->inner});
  } else if (const auto* model = std::get_if<cpu::Mamba2Stage>(&stage.model)) {
    layers = int64_t(model->layers.size());
    add("ssm", {layers, model->heads, model->inner / model->heads, model->states});
    ssm = state;
    add("window", {layers, model->taps - 1, model->inner + 2 * model->states});
  }
  output = round_up(state);
  saved.push_back({"output", {dim}, output});
  context = output + round_up(dim);
  if (n > 0) saved.push_back({"context", {seq_len, dim}, context});
  context_size = n > 0 ? seq_len * dim : 0;
  blob = context + context_size;
}

Memory::Memory(const Parts& parts) {
  for (int64_t n = 0; n < parts.schedule.stages(); ++n) {
    layouts_.emplace_back(parts, n);
    blobs_.push_back(std::make_unique<Pool>(layouts_.back().blob));
    pages_.push_back(std::make_unique<Pool>(layouts_.back().page));
  }
}

void Memory::copy_positions(int64_t n, const float* from, float* to, int64_t begin,
                            int64_t end) const {
  const StageLayout& layout = layouts_[n];
  const int64_t first = begin % layout.page_positions * layout.head_dim;
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t plane = 0; plane < layout.planes; ++plane) {
      const int64_t at = half * layout.values + plane * layout.plane + first;
      std::copy_n(from + at, (end - begin) * layout.head_dim, to + at);
    }
  }
}

void Memory::own_blob(int64_t n, StageState& stage) {
  if (stage.blob && !stage.blob.is_shared()) return;
  Block own(*blobs_[n]);
  if (stage.blob) std::copy_n(stage.blob.data(), layouts_[n].blob, own.data());
  stage.blob = std::move(own);
}

// Of positions, the start token counted, [begin, end) are to be written; before `kept` they matter.
void Memory::own_pages(const Parts& parts, int64_t n, StageState& stage, int64_t kept,
                       int64_t begin, int64_t end) {
  const StageLayout& layout = layouts_[n];
  const int64_t size = layout.page_positions, count = (end + size - 1) / size;
  if (count > int64_t(stage.pages.size())) {
    stage.keys.resize(count);
    stage.values.resize(count);
    stage.pages.resize(count);
  }
  for (int64_t index = begin / size; index < count; ++index) {
    const Block& before = stage.pages[index];
    const bool is_new = !before;
    if (!is_new && !before.is_shared()) continue;
    Block own(*pages_[n]);
    const int64_t end_kept = std::min(kept, (index + 1) * size);
    if (!is_new && index * size < end_kept) {
      copy_positions(n, before.data(), own.data(), index * size, end_kept);
    }
    stage.keys[index] = own.data();
    stage.values[index] = own.data() + layout.values;
    stage.pages[index] = std::move(own);
    if (is_new && index == 0) write_start(parts, n, stage);
  }
}

void Memory::write_start(const Parts& parts, int64_t n, StageState& stage) const {
  copy_positions(n, parts.stages[n].start.page, stage.pages[0].data(), 0, 1);
  stage.start_id = parts.start_id;
}

void Memory::allocate(const Parts& parts, int64_t n, StageState& stage, int64_t positions) {
  own_blob(n, stage);
  if (layouts_[n].has_pages()) own_pages(parts, n, stage, 0, 0, positions);
}

void Memory::reserve(const Parts& parts, Row& row, int64_t to, bool jumps) {
  const Schedule& schedule = parts.schedule;
  const int64_t from = row.taken, room = to - from + 1;
  for (int64_t n = 0; n < schedule.stages(); ++n) {
    if (!schedule.touches(n, from, to)) continue;
    StageState& stage = row.stages[n];
    const bool begins = schedule.begins_anew(n, from, to);
    own_blob(n, stage);
    if (!layouts_[n].has_pages()) continue;
    // Also what is about to begin anew is kept: what comes next may fail.
    const int64_t kept = 1 + schedule.position(n, from);
    int64_t end = 1 + schedule.position(n, to);
    // Then it goes through the end of a sequence.
    if (!jumps && schedule.begin(n, from) < schedule.begin(n, to)) end = 1 + schedule.seq_len(n);
    own_pages(parts, n, stage, kept, begins ? 0 : kept, end);
  }
  reserve_lists(row, room);
}

void Memory::reserve_lists(Row& row, int64_t room) const {
  row.bytes.reserve(*bytes_, room);
  if (!row.plan) return;
  if (row.plan->proposer) row.plan->proposer->reserve(row.bytes, row.bytes.size() + room);
  row.ids.reserve(row.ids.size() + room);
  if (row.plan->wants_log_probs) row.log_probs.reserve(row.log_probs.size() + room);
}

}  // namespace mblm::decode
