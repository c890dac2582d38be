// Checks and binds the arguments of a run, and runs it: see bound_run.h.
#include "bound_run.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "bound_rows.h"
#include "common.h"
#include "decoding_team.h"
#include "stage_state.h"

namespace mblm {
namespace {

using at::Tensor;

int64_t largest(at::IntArrayRef values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

void check_range(const char* name, int64_t value, int64_t least) {
  constexpr int64_t kMost = int64_t(1) << 40;  // so that sums do not overflow
  TORCH_CHECK_VALUE(value >= least && value <= kMost, name, " must be at least ", least, ", got ",
                    value);
}

// A contiguous copy that the run may write to.
Tensor copy_of(const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  check_shape(name, tensor, shape);
  check_type(name, tensor, at::kFloat);
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU");
  Tensor copy = make::empty(shape, tensor.options());
  return copy.copy_(tensor);
}

bool is_given(const Tensor& tensor) {
  return tensor.numel() > 0;
}

// Fixed positions or rotations, with a row for each of `count` positions.
cpu::Positions bind_positions(const Tensor& fixed, const Tensor& rotation, int64_t dim,
                              int64_t count) {
  cpu::Positions positions;
  if (is_given(fixed)) {
    TORCH_CHECK_VALUE(fixed.size(0) >= count, "positions must have a row for each of ", count,
                      ", got ", fixed.sizes());
    positions.fixed = check_state("positions", fixed, {fixed.size(0), dim}).const_data_ptr<float>();
  }
  if (is_given(rotation)) {
    TORCH_CHECK_VALUE(rotation.size(0) >= count, "rotation must have a row for each of ", count,
                      " positions, got ", rotation.sizes());
    TORCH_CHECK_VALUE(dim % 2 == 0, "rotation needs an even width, got ", dim);
    positions.rotation =
        check_state("rotation", rotation, {rotation.size(0), dim / 2, 2}).const_data_ptr<float>();
  }
  return positions;
}

// How many tensors of the state, from the first on, are one cache's.
size_t tensors_of_cache(bool is_transformer, bool may_restart, Group state) {
  if (!is_transformer) return may_restart ? 4 : 2;
  const bool has_rotary = state.size() > 3 && state[3].dim() == 2;
  return 3 + (has_rotary ? 2 : 0) + (may_restart ? 1 : 0);
}

}  // namespace

BoundRun::BoundRun(const Hierarchy& hierarchy, const RunArguments& given)
    : hierarchy_(hierarchy),
      given_(given),
      caches_(given.lengths.size()),
      vocabulary_(hierarchy.to_logits.outputs) {
  check_arguments();
  num_rows_ = given_.outputs[0].size(0);
  run_.stages = hierarchy_.parts;
  run_.to_logits = hierarchy_.to_logits;
  for (size_t n = 0; n < run_.stages.size(); ++n) bind_stage(n);
  TORCH_CHECK_VALUE(next_tensor_ == given_.state.size(), "state must hold ", next_tensor_,
                    " tensors, got ", given_.state.size());
  bind_sampling();
  bind_rows();
}

void BoundRun::check_arguments() const {
  const size_t count = hierarchy_.stages.size();
  TORCH_CHECK_VALUE(caches_ > 0, "lengths must not be empty");
  check_count("max_tokens", given_.max_tokens.size(), caches_);
  check_count("room", given_.room.size(), caches_);
  check_count("history", given_.history.size(), caches_);
  check_count("cached", given_.cached.size(), count * caches_);
  check_count("positions", given_.positions.size(), count * caches_);
  check_count("outputs", given_.outputs.size(), count);
  check_count("start_outputs", given_.start_outputs.size(), count);
  check_count("contexts", given_.contexts.size(), count);
  check_count("tables", given_.tables.size(), 2 * count);
  TORCH_CHECK_VALUE(given_.temperature > 0 && given_.top_k > 0,
                    "temperature and top_k must be positive");
  for (size_t cache = 0; cache < caches_; ++cache) {
    check_range("max_tokens", given_.max_tokens[cache], 1);
    check_range("room", given_.room[cache], given_.pending && !has_stages_above() ? 1 : 0);
    check_range("lengths", given_.lengths[cache], given_.pending ? 0 : 1);
  }
  TORCH_CHECK_VALUE(given_.outputs[0].dim() == 2, "outputs[0] must have shape [B, D], got ",
                    given_.outputs[0].sizes());
}

void BoundRun::bind_stage(size_t n) {
  cpu::RunStage& stage = run_.stages[n];
  // The positions that each cache may come to.
  std::vector<int64_t> ends(caches_, stage.seq_len);
  for (size_t cache = 0; cache < caches_; ++cache) {
    const int64_t position = given_.positions[n * caches_ + cache], room = given_.room[cache];
    check_range("positions", position, 0);
    if (!has_stages_above()) {
      ends[cache] = position + room;
    } else if (n == 0) {
      const int64_t length = given_.lengths[cache] + given_.max_tokens[cache];
      ends[cache] = std::max(position, length / stage.patch_size);
    } else {
      TORCH_CHECK_VALUE(position <= stage.seq_len, "positions must be at most ", stage.seq_len,
                        ", got ", position);
    }
    if (has_stages_above() && n + 1 == run_.stages.size()) {
      TORCH_CHECK_VALUE(room <= stage.seq_len - position || room == 0,
                        "room must be what the patch has left");
    }
  }
  const int64_t end = largest(ends);
  stage.positions = bind_positions(given_.tables[2 * n], given_.tables[2 * n + 1], stage.dim, end);
  bind_model(n, ends);
  bind_stage_rows(n, end);
}

void BoundRun::bind_model(size_t n, const std::vector<int64_t>& ends) {
  std::vector<int64_t> firsts, counts;
  for (size_t cache = 0; cache < caches_; ++cache) {
    const size_t index = n * caches_ + cache;
    firsts.push_back(given_.cached[index]);
    int64_t count = ends[cache] - given_.positions[index];
    // From the position after the start token, a whole sequence.
    if (may_restart(n)) count = std::max(count, 1 + run_.stages[n].seq_len - firsts.back());
    counts.push_back(count);
  }
  const Group left = Group(given_.state).slice(next_tensor_);
  TORCH_CHECK_VALUE(!left.empty(), "state must hold more than ", given_.state.size(), " tensors");
  std::visit(
      [&](const auto& model) {
        using Model = std::decay_t<decltype(model)>;
        constexpr bool kIsTransformer = std::is_same_v<Model, cpu::TransformerStage>;
        const size_t size = tensors_of_cache(kIsTransformer, may_restart(n), left) * caches_;
        TORCH_CHECK_VALUE(size <= left.size(), "state must hold more than ", given_.state.size(),
                          " tensors");
        next_tensor_ += size;
        const auto groups = bind_groups(model, left.slice(0, size), firsts, counts, num_rows_);
        sizes_ = groups.sizes;
        models_.push_back(std::make_unique<cpu::BoundStageOf<Model>>(
            mblm::bind_rows(model, groups.rows, groups.positions)));
      },
      hierarchy_.stages[n]->stage);
  run_.stages[n].model = models_.back().get();
}

void BoundRun::bind_stage_rows(size_t n, int64_t end) {
  cpu::RunStage& stage = run_.stages[n];
  outputs_.push_back(copy_of("outputs", given_.outputs[n], {num_rows_, stage.dim}));
  start_outputs_.push_back(
      copy_of("start_outputs", given_.start_outputs[n], {num_rows_, stage.dim}));
  contexts_.push_back(bind_contexts(n, end));
  const Tensor& context = contexts_.back();
  for (size_t cache = 0; cache < caches_; ++cache) {
    for (int64_t i = 0; i < sizes_[cache]; ++i) {
      const int64_t row = int64_t(stage.rows.size());
      cpu::StageRow of;
      of.position = given_.positions[n * caches_ + cache];
      of.output = outputs_.back().mutable_data_ptr<float>() + row * stage.dim;
      of.start_output = start_outputs_.back().const_data_ptr<float>() + row * stage.dim;
      if (is_given(context)) {
        of.context = context.mutable_data_ptr<float>() + row * context.stride(0);
      }
      stage.rows.push_back(of);
    }
  }
}

// The contexts that a stage has, or will have when it starts anew; empty where it never has any.
Tensor BoundRun::bind_contexts(size_t n, int64_t end) {
  const Tensor& given = given_.contexts[n];
  const cpu::RunStage& stage = run_.stages[n];
  if (is_given(given)) {
    TORCH_CHECK_VALUE(given.dim() == 3 && given.size(1) >= end,
                      "contexts must have a row for each of ", end, " positions, got ",
                      given.sizes());
    const int64_t positions = may_restart(n) ? stage.seq_len : given.size(1);
    return copy_of("contexts", given, {num_rows_, positions, stage.dim});
  }
  if (!may_restart(n)) return given;
  return make::zeros({num_rows_, stage.seq_len, stage.dim}, outputs_.back().options());
}

void BoundRun::bind_sampling() {
  // Too small a number for a float keeps the likeliest, as 0 would not.
  const float least = std::numeric_limits<float>::min();
  run_.sampling = {float(given_.temperature), std::min(given_.top_k, vocabulary_),
                   given_.top_p > 0 ? std::max(float(given_.top_p), least) : 0.f};
  if (given_.ends) {
    check_type("ends", *given_.ends, at::kBool);
    check_shape("ends", *given_.ends, {vocabulary_});
    TORCH_CHECK_VALUE(given_.ends->device().is_cpu(), "ends must be on the CPU");
    ends_ = given_.ends->contiguous();
    run_.ends = static_cast<const uint8_t*>(ends_.const_data_ptr());
  }
  const int64_t most = largest(given_.max_tokens);
  const bool is_exact = !given_.ends && has_stages_above();
  numbers_.emplace(given_.uniform, given_.generator, num_rows_, most, is_exact, vocabulary_,
                   outputs_[0].options());
  run_.uniform = [this](int64_t row, int64_t n) { return numbers_->of(row, n); };
  if (numbers_->is_exact()) {
    run_.draw_ahead = [this](int64_t at_once) { numbers_->draw_ahead(at_once); };
  }
}

void BoundRun::bind_rows() {
  Tensor pending;
  if (given_.pending) {
    check_type("pending", *given_.pending, at::kLong);
    check_shape("pending", *given_.pending, {num_rows_});
    TORCH_CHECK_VALUE(given_.pending->device().is_cpu(), "pending must be on the CPU");
    pending = given_.pending->contiguous();
    check_ids_range(pending, vocabulary_);
  }
  run_.has_pending = pending.defined();
  ids_ = make::zeros({num_rows_, largest(given_.max_tokens)}, at::kLong);
  for (size_t cache = 0; cache < caches_; ++cache) bind_cache_rows(cache, pending);
}

void BoundRun::bind_cache_rows(size_t cache, const Tensor& pending) {
  const Tensor& bytes = given_.history[cache];
  const int64_t length = given_.lengths[cache];
  check_ids_type(bytes);
  TORCH_CHECK_VALUE(bytes.size(0) == sizes_[cache] && bytes.size(1) <= length,
                    "history must be of [", sizes_[cache], ", <= ", length, "], got ",
                    bytes.sizes());
  // What the largest patch before the next byte needs.
  const int64_t needed = std::min(length, (length - 1) % run_.stages[0].patch_size + 1);
  TORCH_CHECK_VALUE(!has_stages_above() || bytes.size(1) >= needed,
                    "history must go back to the beginning of a patch of the first stage");
  const Tensor contiguous = bytes.contiguous();
  check_ids_range(contiguous, vocabulary_);
  for (int64_t i = 0; i < sizes_[cache]; ++i) {
    const int64_t index = int64_t(run_.rows.size());
    cpu::RunRow row;
    row.max_tokens = given_.max_tokens[cache];
    row.room = given_.room[cache];
    row.length = length;
    const int64_t* from = contiguous.const_data_ptr<int64_t>() + i * bytes.size(1);
    row.history.assign(from, from + bytes.size(1));
    row.ids = ids_.mutable_data_ptr<int64_t>() + index * ids_.size(1);
    if (pending.defined()) row.pending = pending.const_data_ptr<int64_t>()[index];
    run_.rows.push_back(std::move(row));
  }
}

void BoundRun::work() {
  std::vector<float> scratch;
  while (!run_.is_done()) {
    const auto now = cpu::Team::Clock::now(), alone = alone_until();
    const int64_t threads = threads_for(run_.products(), now);
    const auto until = now < alone ? alone : cpu::Team::Clock::time_point::max();
    with_team(
        threads,
        [&](int64_t there) {
          scratch.resize(run_.scratch_size(there));
          return int64_t(0);  // each allocates as it goes
        },
        [&](const cpu::Worker& worker) { run_.work(worker, scratch.data(), until); });
    numbers_->rethrow();
  }
}

RunResults BoundRun::results() const {
  std::vector<int64_t> positions, num_tokens;
  for (const cpu::RunStage& stage : run_.stages) {
    for (int64_t row = 0, cache = 0; cache < int64_t(caches_); row += sizes_[cache++]) {
      positions.push_back(stage.rows.at(row).position);
    }
  }
  for (int64_t row = 0, cache = 0; cache < int64_t(caches_); row += sizes_[cache++]) {
    num_tokens.push_back(run_.rows.at(row).num_tokens);
  }
  return {ids_.narrow(1, 0, largest(num_tokens)), outputs_, contexts_, positions, num_tokens};
}

RunResults Hierarchy::run(const std::vector<Tensor>& state, const std::vector<int64_t>& cached,
                          const std::vector<int64_t>& positions, const std::vector<Tensor>& outputs,
                          const std::vector<Tensor>& start_outputs,
                          const std::vector<Tensor>& contexts, const std::vector<Tensor>& tables,
                          const std::vector<Tensor>& history, const std::vector<int64_t>& lengths,
                          const std::optional<Tensor>& pending,
                          const std::vector<int64_t>& max_tokens, const std::vector<int64_t>& room,
                          double temperature, int64_t top_k, double top_p,
                          const std::optional<at::Generator>& generator,
                          const std::optional<Tensor>& uniform,
                          const std::optional<Tensor>& ends) const {
  TORCH_CHECK_VALUE(weights.front().device().is_cpu(), "weights must be on the CPU");
  BoundRun bound(
      *this, {state, cached, positions, outputs, start_outputs, contexts, tables, history, lengths,
              pending, max_tokens, room, temperature, top_k, top_p, generator, uniform, ends});
  bound.work();
  return bound.results();
}

}  // namespace mblm
