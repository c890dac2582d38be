// What a run does around the steps of its stages: see run.h.
#include "cpu/run.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/kernel.h"

namespace mblm::cpu {
namespace {

// out = (x - mean) / sqrt(variance + eps) * weight + bias; out may be x.
MBLM_CLONES void normalize(const LayerNorm& norm, const float* x, int64_t n, float* out) {
  const double mean =
      sum_in_lanes(n, [&](int64_t i) MBLM_INLINE_LAMBDA { return double(x[i]); }) / double(n);
  const double squares = sum_in_lanes(n, [&](int64_t i) MBLM_INLINE_LAMBDA {
    const double centered = double(x[i]) - mean;
    return centered * centered;
  });
  const float factor = float(1 / std::sqrt(squares / double(n) + double(norm.eps)));
  const float middle = float(mean);
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - middle) * factor * norm.weight[i] + norm.bias[i];
}

// For how many bytes one thread alone draws random numbers at once.
constexpr int64_t kDrawnAlone = 16;

void add(const float* values, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] += values[i];
}

}  // namespace

void Positions::add(int64_t position, int64_t dim, float* x) const {
  if (rotation) {
    const float* angle = rotation + position * dim;
    for (int64_t i = 0; i + 1 < dim; i += 2) {
      const float first = x[i], second = x[i + 1];
      x[i] = first * angle[i] - second * angle[i + 1];
      x[i + 1] = second * angle[i] + first * angle[i + 1];
    }
  }
  if (fixed) cpu::add(fixed + position * dim, dim, x);
}

int64_t Run::products() const {
  return int64_t(rows.size()) * (local().model->weights() + to_logits.weights());
}

int64_t Run::bytes_of_weights() const {
  int64_t weights = to_logits.weights();
  for (const RunStage& stage : stages) {
    weights += stage.model->weights() + stage.project.weights() + stage.to_context.weights();
  }
  return weights * size_of(to_logits.type);
}

int64_t Run::scratch_size(int64_t threads) const {
  int64_t largest = 0;
  for (const RunStage& stage : stages) {
    largest = std::max(largest, stage.model->scratch_size(threads));
  }
  return largest;
}

void Run::work(const Worker& worker, float* scratch, Team::Clock::time_point until) {
  if (worker.is_first()) begin();
  worker.wait();
  // Every thread normalizes for itself: that is quicker than to wait for the first.
  std::vector<float> outputs;  // (active, dim)
  while (!progress_.is_interrupted) {
    const bool is_pending = progress_.is_pending;
    if (active.empty()) {
      if (waiting.empty()) return;
      begin_patches(worker, scratch);
    }
    const int64_t count = int64_t(active.size());
    outputs.resize(x_.size());
    if (is_pending) {
      local().model->step(worker, x_.data(), scratch);
      ask_for(worker, x_.data(), count * local().dim);
      local().model->normalize(x_.data(), count, outputs.data());
    } else {
      std::copy(x_.begin(), x_.end(), outputs.begin());
    }
    multiply(worker, to_logits, outputs.data(), count, logits_.data());
    worker.wait();
    if (worker.is_first()) {
      if (is_pending) {
        local().model->advance();
        for (const int64_t row : active) {
          ++local().rows[row].position;
          --rows[row].room;
        }
      }
      sample_rows(outputs.data());
      take_pending();
      progress_.is_pending = true;
      progress_.is_interrupted = worker.team.is_crowded() || has_passed(until);
    }
    if (draw_ahead && worker.is_last()) draw_ahead(worker.is_first() ? kDrawnAlone : 1);
    worker.wait();
  }
}

bool Run::has_passed(Team::Clock::time_point time) {
  return time != Team::Clock::time_point::max() && Team::Clock::now() >= time;
}

void Run::begin() {
  progress_.is_interrupted = false;
  if (progress_.is_begun) return;
  progress_.is_begun = true;
  if (draw_ahead) draw_ahead(1);
  progress_.is_pending = has_pending;
  logits_.resize(rows.size() * to_logits.outputs);
  sample_memory_ = SampleMemory(to_logits.outputs);
  int64_t widest = 0;
  for (const RunStage& stage : stages) {
    widest = std::max({widest, stage.project.outputs, stage.to_context.outputs});
  }
  upper_.resize(rows.size() * widest);
  for (int64_t row = 0; row < int64_t(rows.size()); ++row) {
    (has_pending && rows[row].room == 0 ? waiting : active).push_back(row);
  }
  local().model->select(active);
  x_.resize(active.size() * local().dim);
  for (size_t place = 0; place < active.size(); ++place) {
    std::copy_n(local().rows[active[place]].output, local().dim, x_.data() + place * local().dim);
  }
  if (has_pending) take_pending();
}

// Embeds the pending bytes of the active rows.
void Run::take_pending() {
  const RunStage& stage = local();
  for (size_t place = 0; place < active.size(); ++place) {
    RunRow& row = rows[active[place]];
    const StageRow& of = stage.rows[active[place]];
    float* x = x_.data() + place * stage.dim;
    std::copy_n(stage.table + row.pending * stage.dim, stage.dim, x);
    stage.positions.add(of.position, stage.dim, x);
    if (of.context) add(of.context + of.position * stage.dim, stage.dim, x);
    row.history.push_back(row.pending);
    ++row.length;
  }
}

// Samples a byte for every active row and lets go of those that have come to an end.
void Run::sample_rows(const float* outputs) {
  const int64_t vocabulary = to_logits.outputs, dim = local().dim;
  bool ended = false;
  for (size_t place = 0; place < active.size(); ++place) {
    RunRow& row = rows[active[place]];
    row.pending = sample(sampling, logits_.data() + place * vocabulary, nullptr,
                         uniform(active[place], row.num_tokens), vocabulary, sample_memory_);
    row.ids[row.num_tokens++] = row.pending;
    ended = ended || (ends && ends[row.pending]);
  }
  Rows going;
  for (size_t place = 0; place < active.size(); ++place) {
    const RunRow& row = rows[active[place]];
    const bool wants_more = !ended && row.num_tokens < row.max_tokens;
    if (wants_more && row.room > 0) {
      going.push_back(active[place]);
      continue;
    }
    std::copy_n(outputs + place * dim, dim, local().rows[active[place]].output);
    if (wants_more && has_stages_above()) waiting.push_back(active[place]);
  }
  if (ended) waiting.clear();
  if (going.size() == active.size()) return;
  active = going;
  local().model->select(active);
}

void Run::begin_patches(const Worker& worker, float* scratch) {
  for (size_t stage = 0; stage + 1 < stages.size(); ++stage) {
    const Plan plan = plan_for(stage);
    if (!plan.begin_anew.empty()) begin_anew(worker, stage, plan.begin_anew);
    if (!plan.take_in.empty()) take_in(worker, stage, plan.take_in, scratch);
  }
  begin_anew(worker, stages.size() - 1, waiting);
  if (worker.is_first()) {
    active.swap(waiting);
    waiting.clear();
    for (const int64_t row : active) rows[row].room = local().seq_len;
    local().model->select(active);
    x_.resize(active.size() * local().dim);
    take_pending();
  }
  worker.wait();
}

Run::Plan Run::plan_for(size_t index) const {
  const RunStage& stage = stages[index];
  Plan plan;
  for (const int64_t row : waiting) {
    const int64_t length = rows[row].length;
    if (index > 0 && length % (stage.patch_size * stage.seq_len) == 0) {
      plan.begin_anew.push_back(row);
    } else if (length > 0 && length % stage.patch_size == 0) {
      plan.take_in.push_back(row);
    }
  }
  return plan;
}

void Run::restart(RunStage& stage, const Rows& which) {
  stage.model->restart(which);
  for (const int64_t row : which) {
    stage.rows[row].position = 0;
    std::copy_n(stage.rows[row].start_output, stage.dim, stage.rows[row].output);
  }
}

// Starts a sequence with the context that the stage above has for it.
void Run::begin_anew(const Worker& worker, size_t index, const Rows& which) {
  RunStage& stage = stages[index];
  const RunStage& above = stages[index - 1];
  const int64_t count = int64_t(which.size()), outputs = above.to_context.outputs;
  if (worker.is_first()) {
    inputs_.resize(count * above.dim);
    for (int64_t place = 0; place < count; ++place) {
      std::copy_n(above.rows[which[place]].output, above.dim, inputs_.data() + place * above.dim);
    }
    restart(stage, which);
  }
  worker.wait();
  multiply(worker, above.to_context, inputs_.data(), count, upper_.data());
  worker.wait();
  if (worker.is_first()) {
    for (int64_t place = 0; place < count; ++place) {
      std::copy_n(upper_.data() + place * outputs, outputs, stage.rows[which[place]].context);
    }
  }
}

// Normalized embeddings of the rows' last patches, flattened.
std::vector<float> Run::embed_patches(const RunStage& stage, const Rows& which) const {
  const int64_t width = local().dim, flat = stage.patch_size * width;
  std::vector<float> embedded(which.size() * flat);
  for (size_t place = 0; place < which.size(); ++place) {
    const std::vector<int64_t>& history = rows[which[place]].history;
    const int64_t* ids = history.data() + history.size() - stage.patch_size;
    float* to = embedded.data() + place * flat;
    for (int64_t i = 0; i < stage.patch_size; ++i) {
      std::copy_n(stage.table + ids[i] * width, width, to + i * width);
    }
    normalize(stage.flat_norm, to, flat, to);
  }
  return embedded;
}

void Run::take_in(const Worker& worker, size_t index, const Rows& which, float* scratch) {
  RunStage& stage = stages[index];
  const int64_t count = int64_t(which.size());
  if (index > 0) worker.wait();  // for the first, which may still read what is written to here
  // Every thread embeds for itself, which is quicker than to fetch what another has embedded.
  const std::vector<float> embedded = embed_patches(stage, which);
  multiply(worker, stage.project, embedded.data(), count, upper_.data());
  worker.wait();
  if (worker.is_first()) {
    for (int64_t place = 0; place < count; ++place) {
      const StageRow& row = stage.rows[which[place]];
      float* x = upper_.data() + place * stage.dim;
      normalize(stage.norm, x, stage.dim, x);
      stage.positions.add(row.position, stage.dim, x);
      if (row.context) add(row.context + row.position * stage.dim, stage.dim, x);
    }
    stage.model->select(which);
  }
  worker.wait();
  stage.model->step(worker, upper_.data(), scratch);
  if (worker.is_first()) {
    stage.model->normalize(upper_.data(), count, upper_.data());
    stage.model->advance();
    for (int64_t place = 0; place < count; ++place) {
      StageRow& row = stage.rows[which[place]];
      std::copy_n(upper_.data() + place * stage.dim, stage.dim, row.output);
      ++row.position;
    }
  }
}

}  // namespace mblm::cpu
