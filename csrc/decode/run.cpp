// The rounds of a run: see run.h.
#include "decode/run.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>

#include "cpu/kernel.h"

namespace mblm::decode {
namespace {

using cpu::Team;
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

// Adds a position of a stage to a token's embedding: a rotation of pairs, a fixed one, the context.
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

// Whether no two members draw by turns from one generator.
bool draw_apart(const std::vector<Member>& members) {
  std::set<const Draws*> draws;
  std::set<const void*> generators;
  for (const Member& member : members) {
    const Draws* const of = member.row->plan->lane.draws();
    if (of && draws.insert(of).second && !generators.insert(of->generator()).second) return false;
  }
  return true;
}

// Memory that need not keep what it held.
void grow(cpu::cache_lines::Vector<float>& memory, int64_t size) {
  if (int64_t(memory.size()) < size) memory.resize(size);
}

}  // namespace

Run::Run(const Parts& parts, const Memory& memory, Kind kind, std::vector<Member>& members,
         Workspace& space)
    : parts_(parts),
      memory_(memory),
      kind_(kind),
      members_(members),
      space_(space),
      draws_apart_(kind == Kind::kChoose && draw_apart(members)) {
  const auto size = int64_t(members.size());
  active_.reserve(size);
  left_.reserve(size);
  stages_.reserve(parts.stages.size());
  for (int64_t n = 0; n <= local(); ++n) {
    StageWork& work = stages_.emplace_back(parts.stages[n], memory.layout(n));
    work.anew.reserve(size);
    work.takes.reserve(size);
    work.rows.reserve(size);
  }
}

bool is_host_due(const Parts& parts, const Row& row) {
  return row.taken > 0 && !row.is_supplied &&
         parts.stages[parts.schedule.due(row.taken)].is_hosted();
}

int64_t Run::next(const Row& row, const Member& member) const {
  return chooses() ? std::min(row.taken + 1, row.length) : member.to;
}

bool Run::begins_patch(int64_t member) const {
  const Row& of = row(member);
  return parts_.schedule.begins_anew(local(), of.taken, next(of, members_[member]));
}

int64_t Run::most_positions(int64_t n, const Member& member) const {
  if (!chooses()) return parts_.schedule.new_positions(n, member.row->taken, member.to);
  if (n < local()) return 1;
  const Row& row = *member.row;
  const int64_t proposed = proposes(row) ? row.plan->draft : 0;
  return 1 + std::min(std::max(int64_t(member.draft.size()), proposed), Proposer::kMost);
}

int64_t Run::products() const {
  const int64_t each =
      stages_.back().rows.weights() + (gives_logits() ? parts_.to_logits.weights() : 0);
  int64_t positions = 0;
  for (const Member& member : members_) {
    // What will be proposed is not known.
    positions += chooses() && member.draft.empty() ? 1 : most_positions(local(), member);
  }
  return positions * each;
}

int64_t Run::prepare(int64_t threads) {
  const Schedule& schedule = parts_.schedule;
  const auto rows = int64_t(members_.size());
  const int64_t width = parts_.local().dim;
  int64_t scratch = 0, values = 0, embedded = 0, inputs = 0, outputs = rows, prepared = 0;
  for (int64_t n = 0; n <= local(); ++n) {
    const StageParts& stage = parts_.stages[n];
    int64_t positions = 0, end = 0;
    for (const Member& member : members_) {
      const int64_t taken = member.row->taken;
      const bool goes_round = chooses() && n > 0 && schedule.begins_anew(n, taken, member.to);
      positions += most_positions(n, member);
      end = std::max(end, goes_round ? schedule.seq_len(n) : schedule.position(n, member.to));
    }
    const StageRows& of = stages_[n].rows;
    scratch = std::max(scratch, of.scratch_size(positions, end, threads));
    prepared = std::max({prepared, of.prepared_floats(positions),
                         cpu::prepared_floats(stage.project, positions),
                         cpu::prepared_floats(stage.to_context, rows)});
    if (n == local()) {
      grow(space_.x, positions * width);
      outputs = std::max(outputs, positions);
      if (chooses() && positions > rows)
        grow(space_.trail, stages_[n].rows.trail_size(rows, positions));
    } else {
      values = std::max({values, positions * stage.dim, rows * stage.to_context.outputs});
      embedded = std::max(embedded, positions * schedule.patch_size(n) * width);
      inputs = std::max(inputs, rows * stage.dim);
      stages_[n].positions.reserve(positions);
    }
  }
  using cpu::cache_lines::kFloatsApart;
  outputs_of_thread_ = cpu::cache_lines::round_up(outputs * width) + kFloatsApart;
  grow(space_.outputs, threads * outputs_of_thread_);
  if (gives_logits()) grow(space_.logits, outputs * parts_.num_tokens());
  grow(space_.inputs, inputs);
  grow(space_.embed, embedded);
  grow(space_.values, values);
  grow(space_.scratch, scratch);
  while (int64_t(space_.choosers.size()) < threads) {
    space_.choosers.emplace_back(parts_.num_tokens());
  }
  return std::max(prepared, cpu::prepared_floats(parts_.to_logits, outputs));
}

void Run::work(const Worker& worker, Team::Clock::time_point until) noexcept {
  if (worker.is_first()) begin_round();
  worker.wait();
  // Every thread normalizes for itself: that is quicker than to wait for the first.
  float* const outputs = space_.outputs.data() + worker.index * outputs_of_thread_;
  auto begin = Team::Clock::now();
  while (!round_.is_over) {
    if (round_.catches_up) catch_up(worker);
    const bool is_shared = active_.size() > 1 && (draws_apart_ || !round_.has_drafts);
    if (worker.is_last() && chooses() && !round_.has_drafts) draw();
    if (round_.positions > 0) {
      stages_.back().rows.prefill(worker, space_.x.data(), space_.scratch.data(),
                                  round_.has_drafts ? space_.trail.data() : nullptr);
      cpu::ask_for(worker, space_.x.data(), round_.positions * parts_.local().dim);
    }
    for (const Active& active : active_) read_outputs(active, outputs);
    if (gives_logits()) {
      cpu::multiply(worker, parts_.to_logits, outputs, round_.outputs, space_.logits.data());
    }
    worker.wait();
    if (is_shared) {
      worker.share(int64_t(active_.size()), 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) finish(active_[begin], outputs, space_.choosers[worker.index]);
      });
      worker.wait();
    }
    if (worker.is_first()) {
      for (const Active& active : active_) {
        if (!is_shared) finish(active, outputs, space_.choosers[worker.index]);
      }
      const auto end = Team::Clock::now();
      if (chooses() && !round_.catches_up && round_.positions > 0) {
        space_.pace.note(round_.positions, std::chrono::duration<double>(end - begin).count());
      }
      begin_round();
      if (chooses() && (worker.team.is_crowded() || end >= until)) round_.is_over = true;
      begin = end;
    }
    worker.wait();
  }
}

void Run::begin_round() {
  round_ = {};
  for (StageWork& work : stages_) {
    work.rows.clear();
    work.anew.clear();
    work.takes.clear();
    work.positions.clear();
    work.projected = 0;
  }
  sort_members();
  if (round_.is_over) return;
  if (round_.catches_up) plan_catch_up();
  plan_step();
  if (!round_.catches_up) embed_bytes();
}

// Decides which rows take part: all, but for those at the end of a patch where these had better
// wait for others.
void Run::sort_members() {
  active_.clear();
  left_.clear();
  needs_memory_ = false;
  const int64_t patch = parts_.schedule.span(local());
  for (int64_t i = 0; i < int64_t(members_.size()); ++i) {
    Member& member = members_[i];
    if (member.reason == Reason::kLogits) round_.is_over = true;
    if (!member.goes()) continue;
    const Row& row = *member.row;
    const int64_t end = next(row, member);
    if (chooses() && row.plan->end) {
      member.reason = row.plan->end;
    } else if (!chooses() && end == row.taken && (!gives_logits() || !row.logits.empty())) {
      member.reason = Reason::kTime;
    } else if (end > member.to) {
      round_.is_over = needs_memory_ = true;
    } else if (end > row.taken && is_host_due(parts_, row)) {
      member.wants_host = true;
    } else {
      active_.push_back({i});
      if (begins_patch(i)) round_.catches_up = true;
      left_.push_back((patch - row.taken % patch) % patch + (end == row.taken));
    }
  }
  if (local() > 0 && chooses() && round_.catches_up && pays_to_wait(patch, left_)) {
    std::erase_if(active_, [&](const Active& active) { return begins_patch(active.member); });
    round_.catches_up = false;
  }
  if (active_.empty()) round_.is_over = true;
}

// Gives the active rows their places in the local stage's input.
void Run::plan_step() {
  const Schedule& schedule = parts_.schedule;
  int64_t places = 0;
  for (Active& active : active_) {
    Member& member = members_[active.member];
    const Row& row = *member.row;
    const int64_t end = next(row, member);
    active.count = schedule.new_positions(local(), row.taken, end);
    const int64_t position = schedule.position(local(), end) - active.count;
    if (chooses() && active.count > 0) {
      constexpr int64_t kMost = Proposer::kMost;
      const int64_t room = local() > 0 ? schedule.seq_len(local()) - position - 1 : kMost;
      const int64_t most = std::min({kMost, room, row.plan->left() - 1, member.to - row.taken - 1});
      if (member.draft.empty() && proposes(row)) {
        const double price = space_.pace.price(int64_t(active_.size()));
        row.plan->proposer->follow(row.bytes);
        member.draft =
            row.plan->proposer->propose(row.bytes, std::min(most, row.plan->draft), price);
      }
      const int64_t drafted = std::min(int64_t(member.draft.size()), most);
      active.count += drafted;
      round_.has_drafts = round_.has_drafts || drafted > 0;
    }
    active.first = round_.positions;
    active.output = round_.outputs;
    active.outputs = chooses() ? std::max<int64_t>(active.count, 1) : 1;
    round_.positions += active.count;
    round_.outputs += active.outputs;
    if (active.count > 0) {
      active.place = places++;
      stages_.back().rows.add(row.stages[local()], position, active.count);
    }
  }
}

void Run::plan_catch_up() {
  const Schedule& schedule = parts_.schedule;
  for (int64_t n = 0; n <= local(); ++n) {
    StageWork& work = stages_[n];
    for (const Active& active : active_) {
      const Member& member = members_[active.member];
      const Row& row = *member.row;
      const int64_t end = next(row, member);
      const int64_t supplied = row.is_supplied ? schedule.due(row.taken) : -1;
      if (schedule.begins_anew(n, row.taken, end)) {
        const bool is_projected = n > 0 && n - 1 != supplied && schedule.position(n - 1, end) > 0;
        work.anew.emplace_back(active.member, is_projected ? work.projected++ : -1);
      }
      const int64_t count = schedule.new_positions(n, row.taken, end);
      if (n == local() || count == 0 || n == supplied) continue;
      const int64_t first = schedule.position(n, end) - count;
      work.takes.push_back(active.member);
      work.rows.add(row.stages[n], first, count);
      for (int64_t i = 0; i < count; ++i) work.positions.emplace_back(active.member, first + i);
    }
  }
}

// Embeds the bytes that the local stage takes in.
void Run::embed_bytes() {
  const StageParts& stage = parts_.local();
  for (const Active& active : active_) {
    const Member& member = members_[active.member];
    const Row& row = *member.row;
    const int64_t end = next(row, member), known = std::min(active.count, end - row.taken);
    if (active.count == 0) continue;
    // Of drafts, the row does not have the bytes yet.
    const int64_t first_byte = chooses() ? row.taken : end - active.count;
    const int64_t first = parts_.schedule.position(local(), first_byte + 1) - 1;
    const float* context =
        local() > 0 ? blob(local(), active.member) + layout(local()).context : nullptr;
    for (int64_t i = 0; i < active.count; ++i) {
      const int64_t id =
          i < known || !chooses() ? row.byte(first_byte + i) : member.draft[i - known];
      float* const x = space_.x.data() + (active.first + i) * stage.dim;
      std::copy_n(stage.table + id * stage.dim, stage.dim, x);
      add_position(stage, context, first + i, x);
    }
  }
}

// In the order of rows, that several with one generator always have the same numbers.
void Run::draw() {
  for (Active& active : active_) {
    const Plan& plan = *row(active.member).plan;
    if (!plan.pauses) active.numbers = plan.lane.numbers();
  }
}

void Run::catch_up(const Worker& worker) {
  for (int64_t n = 0; n <= local(); ++n) {
    if (!stages_[n].anew.empty()) begin_anew(worker, n);
    if (!stages_[n].takes.empty()) take_in(worker, n);
  }
  if (worker.is_first()) embed_bytes();
  worker.wait();
}

// Starts sequences with the contexts that the stage above has for them.
void Run::begin_anew(const Worker& worker, int64_t n) {
  const StageWork& work = stages_[n];
  const auto count = int64_t(work.anew.size());
  worker.share(count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) restart(n, work.anew[begin].first, work.anew[begin].second);
  });
  worker.wait();
  if (work.projected == 0) return;
  const cpu::Matrix& to_context = parts_.stages[n - 1].to_context;
  cpu::multiply(worker, to_context, space_.inputs.data(), work.projected, space_.values.data());
  worker.wait();
  worker.share(count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const auto [member, input] = work.anew[begin];
      if (input < 0) continue;
      std::copy_n(space_.values.data() + input * to_context.outputs, to_context.outputs,
                  blob(n, member) + layout(n).context);
    }
  });
  worker.wait();
}

// Goes back to the state after the start token, whose keys and values are still there.
void Run::restart(int64_t n, int64_t member, int64_t input) {
  const StageLayout& own = layout(n);
  const StartState& start = parts_.stages[n].start;
  float* const to = blob(n, member);
  if (own.has_pages()) {
    std::copy_n(start.delayed, own.state, to);
  } else if (own.state > 0) {
    std::copy_n(start.ssm, own.ssm, to);
    std::copy_n(start.window, own.state - own.ssm, to + own.ssm);
  }
  StageState& state = row(member).stages[n];
  if (own.has_pages() && state.start_id != parts_.start_id) memory_.write_start(parts_, n, state);
  std::copy_n(start.output, own.dim, to + own.output);
  if (n == 0) return;
  const int64_t dim = layout(n - 1).dim;
  if (input >= 0) {
    std::copy_n(blob(n - 1, member) + layout(n - 1).output, dim,
                space_.inputs.data() + input * dim);
  } else if (parts_.schedule.position(n - 1, next(row(member), members_[member])) == 0) {
    std::copy_n(parts_.stages[n - 1].start.context_below, own.context_size, to + own.context);
  }  // otherwise it is there already
}

void Run::take_in(const Worker& worker, int64_t n) {
  const StageWork& work = stages_[n];
  const StageParts& stage = parts_.stages[n];
  const StageLayout& own = layout(n);
  const auto count = int64_t(work.positions.size());
  const int64_t flat = parts_.schedule.patch_size(n) * parts_.local().dim;
  worker.share(count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const auto [member, position] = work.positions[begin];
      embed_patch(n, member, position, space_.embed.data() + begin * flat);
    }
  });
  worker.wait();
  cpu::multiply(worker, stage.project, space_.embed.data(), count, space_.values.data());
  worker.wait();
  worker.share(count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const auto [member, position] = work.positions[begin];
      float* const x = space_.values.data() + begin * stage.dim;
      normalize(stage.norm, x, stage.dim, x);
      add_position(stage, n > 0 ? blob(n, member) + own.context : nullptr, position, x);
    }
  });
  worker.wait();
  work.rows.prefill(worker, space_.values.data(), space_.scratch.data());
  if (worker.is_first()) {
    for (int64_t at = 0; at < count; ++at) {
      const int64_t member = work.positions[at].first;
      const bool is_last = at + 1 == count || work.positions[at + 1].first != member;
      if (!is_last) continue;
      work.rows.normalize(space_.values.data() + at * stage.dim, 1, blob(n, member) + own.output);
    }
  }
  worker.wait();
}

// The normalized embeddings of a patch's bytes, flattened.
void Run::embed_patch(int64_t n, int64_t member, int64_t position, float* to) const {
  const StageParts& stage = parts_.stages[n];
  const Row& of = row(member);
  const int64_t width = parts_.local().dim, size = parts_.schedule.patch_size(n);
  const int64_t first = parts_.schedule.begin(n, next(of, members_[member])) + position * size;
  for (int64_t i = 0; i < size; ++i) {
    std::copy_n(stage.table + of.byte(first + i) * width, width, to + i * width);
  }
  normalize(stage.flat_norm, to, size * width, to);
}

void Run::read_outputs(const Active& active, float* outputs) const {
  const int64_t dim = parts_.local().dim;
  float* const to = outputs + active.output * dim;
  if (active.count > 0) {
    const int64_t first = active.first + active.count - active.outputs;
    stages_.back().rows.normalize(space_.x.data() + first * dim, active.outputs, to);
  } else if (row(active.member).taken > 0) {
    std::copy_n(blob(local(), active.member) + layout(local()).output, dim, to);
  } else {
    std::fill_n(to, dim, 0.f);  // its logits are known
  }
}

// Notes what a row has taken in, and chooses its next bytes.
void Run::finish(const Active& active, const float* outputs, Chooser& chooser) {
  Member& member = members_[active.member];
  Row& row = *member.row;
  const int64_t dim = parts_.local().dim;
  int64_t kept = active.outputs;
  if (active.count > 0) row.logits.clear();
  if (chooses() && !row.plan->pauses) {
    kept = choose_bytes(active, chooser);
    if (kept < active.count) {
      stages_.back().rows.roll_back(active.place, space_.trail.data(), kept);
    }
  } else {
    row.taken = next(row, member);
    if (gives_logits()) {
      const float* logits = logits_of(active, 0);
      if (logits != row.logits.data()) row.logits.assign(logits, logits + parts_.num_tokens());
    }
    if (chooses()) member.reason = Reason::kLogits;
  }
  if (active.count == 0) return;
  row.is_supplied = false;
  std::copy_n(outputs + (active.output + kept - 1) * dim, dim,
              blob(local(), active.member) + layout(local()).output);
}

// Returns how many of the outputs are still a row's: a draft may have been wrong.
int64_t Run::choose_bytes(const Active& active, Chooser& chooser) {
  Member& member = members_[active.member];
  Row& row = *member.row;
  Plan& plan = *row.plan;
  for (int64_t i = 0;; ++i) {
    const float* const logits = logits_of(active, i);
    if (i < active.count) ++row.taken;
    const float* const numbers = active.numbers ? active.numbers : plan.lane.numbers();
    if (!numbers) {
      member.reason = Reason::kMemory;
      return i + 1;
    }
    const int64_t id = chooser.choose(plan, logits, numbers);
    append_chosen(row, id, logits, parts_.num_tokens(), true);
    if (proposes(row)) plan.proposer->follow(row.bytes);
    const bool is_drafted = !member.draft.empty() && member.draft.front() == id;
    member.draft = is_drafted ? member.draft.subspan(1) : std::span<const int64_t>();
    if (!is_drafted || plan.end || i + 1 >= active.count) return i + 1;
  }
}

const float* Run::logits_of(const Active& active, int64_t i) const {
  const Row& of = row(active.member);
  if (active.count == 0 && !of.logits.empty()) return of.logits.data();
  if (active.count == 0 && of.taken == 0) return parts_.empty_logits;
  return space_.logits.data() + (active.output + i) * parts_.num_tokens();
}

}  // namespace mblm::decode
