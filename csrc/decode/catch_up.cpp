// The stages above the local one, and beginnings of sequences: see catch_up.h.
#include "decode/catch_up.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernel.h"

namespace mblm::decode {
namespace {

using cpu::Worker;

// out = (x - mean) / sqrt(variance + eps) * weight + bias; out may be x.
MBLM_CLONES void normalize(const LayerNorm& norm, const float* x, int64_t n, float* out) {
  const double mean =
      cpu::sum_in_lanes(n, [&](int64_t i) MBLM_INLINE_LAMBDA { return double(x[i]); }) / double(n);
  const double squares = cpu::sum_in_lanes(n, [&](int64_t i) MBLM_INLINE_LAMBDA {
    const double centered = double(x[i]) - mean;
    return centered * centered;
  });
  const float factor = float(1 / std::sqrt(squares / double(n) + double(norm.eps)));
  const float middle = float(mean);
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - middle) * factor * norm.weight[i] + norm.bias[i];
}

void add(const float* values, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] += values[i];
}

}  // namespace

void add_position(const StageParts& stage, const float* context, int64_t position, float* x) {
  const int64_t dim = stage.dim, at = position * dim;
  if (stage.rotation) {
    const float* angle = stage.rotation + at;
    for (int64_t i = 0; i + 1 < dim; i += 2) {
      const float first = x[i], second = x[i + 1];
      x[i] = first * angle[i] - second * angle[i + 1];
      x[i + 1] = second * angle[i] + first * angle[i + 1];
    }
  }
  if (stage.fixed) add(stage.fixed + at, dim, x);
  if (context) add(context + at, dim, x);
}

CatchUp::CatchUp(const Call& call) : call_(call) {
  const auto size = int64_t(call.members.size());
  stages_.reserve(call.parts.stages.size());
  for (int64_t n = 0; n <= call.local(); ++n) {
    Stage& stage = stages_.emplace_back(call.parts.stages[n], call.layout(n));
    stage.anew.reserve(size);
    stage.rows.reserve(size);
  }
}

int64_t CatchUp::prepare(int64_t threads) {
  const auto rows = int64_t(call_.members.size());
  Workspace& space = call_.space;
  int64_t prepared = 0;
  for (int64_t n = 0; n < call_.local(); ++n) {
    const StageParts& stage = call_.parts.stages[n];
    int64_t positions = 0;
    for (int64_t member = 0; member < rows; ++member) {
      positions += call_.chooses() ? 1 : call_.new_positions(n, member);
    }
    const StageRows& of = stages_[n].rows;
    prepared = std::max({prepared, of.prepared_floats(positions),
                         cpu::prepared_floats(stage.project, positions),
                         cpu::prepared_floats(stage.to_context, rows)});
    const int64_t flat = call_.parts.schedule.patch_size(n) * call_.parts.local().dim;
    grow(space.scratch, of.scratch_size(positions, call_.most_positions(n), threads));
    grow(space.values, std::max(positions * stage.dim, rows * stage.to_context.outputs));
    grow(space.embed, positions * flat);
    grow(space.inputs, rows * stage.dim);
    stages_[n].positions.reserve(positions);
  }
  return prepared;
}

void CatchUp::clear() {
  for (Stage& stage : stages_) {
    stage.rows.clear();
    stage.anew.clear();
    stage.positions.clear();
    stage.projected = 0;
  }
}

void CatchUp::plan(int64_t member) {
  const Schedule& schedule = call_.parts.schedule;
  const Row& row = call_.row(member);
  const int64_t end = call_.next(member);
  const int64_t supplied = row.is_supplied ? schedule.due(row.taken) : -1;
  for (int64_t n = 0; n <= call_.local(); ++n) {
    Stage& stage = stages_[n];
    if (call_.begins_anew(n, member)) {
      const bool is_projected = n > 0 && n - 1 != supplied && schedule.position(n - 1, end) > 0;
      stage.anew.emplace_back(member, is_projected ? stage.projected++ : -1);
    }
    const int64_t count = call_.new_positions(n, member);
    if (n == call_.local() || count == 0 || n == supplied) continue;
    const int64_t first = schedule.position(n, end) - count;
    stage.rows.add(row.stages[n], first, count);
    for (int64_t i = 0; i < count; ++i) stage.positions.emplace_back(member, first + i);
  }
}

void CatchUp::work(const Worker& worker) {
  for (int64_t n = 0; n <= call_.local(); ++n) {
    if (!stages_[n].anew.empty()) begin_anew(worker, n);
    if (!stages_[n].positions.empty()) take_in(worker, n);
  }
}

// Starts sequences with the contexts that the stage above has for them.
void CatchUp::begin_anew(const Worker& worker, int64_t n) {
  const Stage& work = stages_[n];
  const auto count = int64_t(work.anew.size());
  worker.share(count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) restart(n, work.anew[begin].first, work.anew[begin].second);
  });
  worker.wait();
  if (work.projected == 0) return;
  const cpu::Matrix& to_context = call_.parts.stages[n - 1].to_context;
  cpu::multiply(worker, to_context, call_.space.inputs.data(), work.projected,
                call_.space.values.data());
  worker.wait();
  worker.share(count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const auto [member, input] = work.anew[begin];
      if (input < 0) continue;
      std::copy_n(call_.space.values.data() + input * to_context.outputs, to_context.outputs,
                  call_.blob(n, member) + call_.layout(n).context);
    }
  });
  worker.wait();
}

// Goes back to the state after the start token, whose keys and values are still there.
void CatchUp::restart(int64_t n, int64_t member, int64_t input) {
  const StageLayout& own = call_.layout(n);
  const StartState& start = call_.parts.stages[n].start;
  float* const to = call_.blob(n, member);
  std::copy_n(start.state, own.state, to);
  StageState& state = call_.row(member).stages[n];
  if (own.has_pages() && state.start_id != call_.parts.start_id) {
    call_.memory.write_start(call_.parts, n, state);
  }
  std::copy_n(start.output, own.dim, to + own.output);
  if (n == 0) return;
  const int64_t dim = call_.layout(n - 1).dim;
  if (input >= 0) {
    std::copy_n(call_.blob(n - 1, member) + call_.layout(n - 1).output, dim,
                call_.space.inputs.data() + input * dim);
  } else if (call_.parts.schedule.position(n - 1, call_.next(member)) == 0) {
    std::copy_n(call_.parts.stages[n - 1].start.context_below, own.context_size, to + own.context);
  }  // otherwise it is there already
}

void CatchUp::take_in(const Worker& worker, int64_t n) {
  const Stage& work = stages_[n];
  const StageParts& stage = call_.parts.stages[n];
  const StageLayout& own = call_.layout(n);
  const auto count = int64_t(work.positions.size());
  const int64_t flat = call_.parts.schedule.patch_size(n) * call_.parts.local().dim;
  worker.share(count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const auto [member, position] = work.positions[begin];
      embed_patch(n, member, position, call_.space.embed.data() + begin * flat);
    }
  });
  worker.wait();
  cpu::multiply(worker, stage.project, call_.space.embed.data(), count, call_.space.values.data());
  worker.wait();
  worker.share(count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const auto [member, position] = work.positions[begin];
      float* const x = call_.space.values.data() + begin * stage.dim;
      normalize(stage.norm, x, stage.dim, x);
      add_position(stage, n > 0 ? call_.blob(n, member) + own.context : nullptr, position, x);
    }
  });
  worker.wait();
  work.rows.prefill(worker, call_.space.values.data(), call_.space.scratch.data());
  if (worker.is_first()) {
    for (int64_t at = 0; at < count; ++at) {
      const int64_t member = work.positions[at].first;
      const bool is_last = at + 1 == count || work.positions[at + 1].first != member;
      if (!is_last) continue;
      work.rows.normalize(call_.space.values.data() + at * stage.dim, 1,
                          call_.blob(n, member) + own.output);
    }
  }
  worker.wait();
}

// The normalized embeddings of a patch's bytes, flattened.
void CatchUp::embed_patch(int64_t n, int64_t member, int64_t position, float* to) const {
  const StageParts& stage = call_.parts.stages[n];
  const Row& of = call_.row(member);
  const int64_t width = call_.parts.local().dim, size = call_.parts.schedule.patch_size(n);
  const int64_t first = call_.parts.schedule.begin(n, call_.next(member)) + position * size;
  for (int64_t i = 0; i < size; ++i) {
    std::copy_n(stage.table + of.byte(first + i) * width, width, to + i * width);
  }
  normalize(stage.flat_norm, to, size * width, to);
}

}  // namespace mblm::decode
