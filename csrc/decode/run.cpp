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

// Whether no two members draw by turns from one generator.
bool draw_apart(const std::vector<Member>& members) {
  if (members.size() < 2) return true;
  std::set<const Draws*> draws;
  std::set<const void*> generators;
  for (const Member& member : members) {
    const Draws* const of = member.row->plan->lane.draws();
    if (of && draws.insert(of).second && !generators.insert(of->generator()).second) return false;
  }
  return true;
}

}  // namespace

Run::Run(const Parts& parts, const Memory& memory, Kind kind, std::vector<Member>& members,
         Workspace& space)
    : Call{parts, memory, kind, members, space},
      draws_apart_(chooses() && draw_apart(members)),
      rows_(parts.local(), layout(local())),
      catch_up_(*this) {
  active_.reserve(members.size());
  left_.reserve(members.size());
  rows_.reserve(int64_t(members.size()));
  for (Member& member : members) {
    if (!draws_apart_) member.draft = {};
  }
}

int64_t Run::most_positions_at_once(int64_t member) const {
  if (!chooses()) return new_positions(local(), member);
  const int64_t proposed = proposes(row(member)) ? row(member).plan->draft : 0;
  return 1 + std::min(std::max(int64_t(members[member].draft.size()), proposed), Proposer::kMost);
}

int64_t Run::products() const {
  const int64_t each = rows_.weights() + (gives_logits() ? parts.to_logits.weights() : 0);
  int64_t positions = 0;
  for (int64_t i = 0; i < int64_t(members.size()); ++i) {
    // What will be proposed is not known.
    positions += chooses() && members[i].draft.empty() ? 1 : most_positions_at_once(i);
  }
  return positions * each;
}

int64_t Run::prepare(int64_t threads) {
  const auto rows = int64_t(members.size());
  const int64_t width = parts.local().dim;
  int64_t positions = 0;
  for (int64_t i = 0; i < rows; ++i) positions += most_positions_at_once(i);
  const int64_t outputs = std::max(rows, positions);
  using cpu::cache_lines::kFloatsApart;
  outputs_of_thread_ = cpu::cache_lines::round_up(outputs * width) + kFloatsApart;
  grow(space.x, positions * width);
  grow(space.outputs, threads * outputs_of_thread_);
  grow(space.scratch, rows_.scratch_size(positions, most_positions(local()), threads));
  if (gives_logits()) grow(space.logits, outputs * parts.num_tokens());
  if (chooses() && positions > rows) grow(space.trail, rows_.trail_size(rows, positions));
  while (int64_t(space.choosers.size()) < threads) space.choosers.emplace_back(parts.num_tokens());
  return std::max({catch_up_.prepare(threads), rows_.prepared_floats(positions),
                   cpu::prepared_floats(parts.to_logits, outputs)});
}

void Run::work(const Worker& worker, Team::Clock::time_point until) noexcept {
  if (worker.is_first()) begin_round();
  worker.wait();
  // Every thread normalizes for itself: that is quicker than to wait for the first.
  float* const outputs = space.outputs.data() + worker.index * outputs_of_thread_;
  auto begin = Team::Clock::now();
  while (!round_.is_over) {
    if (round_.catches_up) {
      catch_up_.work(worker);
      if (worker.is_first()) embed_bytes();
      worker.wait();
    }
    const bool is_shared = active_.size() > 1;
    if (worker.is_last() && chooses() && round_.drafted == 0) draw();
    if (round_.positions > 0) {
      rows_.prefill(worker, space.x.data(), space.scratch.data(),
                    round_.drafted > 0 ? space.trail.data() : nullptr);
      cpu::ask_for(worker, space.x.data(), round_.positions * parts.local().dim);
    }
    for (const Active& active : active_) read_outputs(active, outputs);
    if (gives_logits()) {
      cpu::multiply(worker, parts.to_logits, outputs, round_.outputs, space.logits.data());
    }
    worker.wait();
    if (is_shared) {
      worker.share(int64_t(active_.size()), 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) finish(active_[begin], outputs, space.choosers[worker.index]);
      });
      worker.wait();
    }
    if (worker.is_first()) {
      for (const Active& active : active_) {
        if (!is_shared) finish(active, outputs, space.choosers[worker.index]);
      }
      const auto end = Team::Clock::now();
      if (chooses() && !round_.catches_up && round_.positions > 0) {
        const int64_t rows = round_.positions - round_.drafted;
        space.pace(rows).note(rows, round_.drafted,
                              std::chrono::duration<double>(end - begin).count());
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
  rows_.clear();
  sort_members();
  if (round_.is_over) return;
  if (round_.catches_up) {
    catch_up_.clear();
    for (const Active& active : active_) catch_up_.plan(active.member);
  }
  plan_step();
  if (!round_.catches_up) embed_bytes();
}

// Decides which rows take part: all, but for those at the end of a patch where these had better
// wait for others.
void Run::sort_members() {
  active_.clear();
  left_.clear();
  needs_memory_ = false;
  const int64_t patch = parts.schedule.span(local());
  for (int64_t i = 0; i < int64_t(members.size()); ++i) {
    Member& member = members[i];
    if (member.reason == Reason::kLogits) round_.is_over = true;
    if (!member.goes()) continue;
    const Row& row = *member.row;
    const int64_t end = next(i);
    if (chooses() && row.plan->end) {
      member.reason = row.plan->end;
    } else if (!chooses() && end == row.taken && (!gives_logits() || !row.logits.empty())) {
      member.reason = Reason::kTime;
    } else if (end > member.to) {
      round_.is_over = needs_memory_ = true;
    } else if (end > row.taken && is_host_due(parts, row)) {
      member.wants_host = true;
    } else {
      active_.push_back({i});
      if (begins_anew(local(), i)) round_.catches_up = true;
      left_.push_back((patch - row.taken % patch) % patch + (end == row.taken));
    }
  }
  if (local() > 0 && chooses() && round_.catches_up && pays_to_wait(patch, left_)) {
    std::erase_if(active_,
                  [&](const Active& active) { return begins_anew(local(), active.member); });
    round_.catches_up = false;
  }
  if (active_.empty()) round_.is_over = true;
}

// Gives the active rows their places in the local stage's input.
void Run::plan_step() {
  const Schedule& schedule = parts.schedule;
  int64_t places = 0;
  for (Active& active : active_) {
    Member& member = members[active.member];
    const Row& row = *member.row;
    const int64_t end = next(active.member);
    active.count = schedule.new_positions(local(), row.taken, end);
    const int64_t position = schedule.position(local(), end) - active.count;
    if (chooses() && active.count > 0) {
      constexpr int64_t kMost = Proposer::kMost;
      const int64_t room = local() > 0 ? schedule.seq_len(local()) - position - 1 : kMost;
      const int64_t most = std::min({kMost, room, row.plan->left() - 1, member.to - row.taken - 1});
      if (member.draft.empty() && proposes(row)) {
        row.plan->proposer->follow(row.bytes);
        const auto rows = int64_t(active_.size());
        member.draft = row.plan->proposer->propose(row.bytes, std::min(most, row.plan->draft),
                                                   space.pace(rows).price(rows));
      }
      const int64_t drafted = std::min(int64_t(member.draft.size()), most);
      active.count += drafted;
      round_.drafted += drafted;
    }
    active.first = round_.positions;
    active.output = round_.outputs;
    active.outputs = chooses() ? std::max<int64_t>(active.count, 1) : 1;
    round_.positions += active.count;
    round_.outputs += active.outputs;
    if (active.count > 0) {
      active.place = places++;
      rows_.add(row.stages[local()], position, active.count);
    }
  }
}

// Embeds the bytes that the local stage takes in.
void Run::embed_bytes() {
  const StageParts& stage = parts.local();
  for (const Active& active : active_) {
    const Member& member = members[active.member];
    const Row& row = *member.row;
    const int64_t end = next(active.member), known = std::min(active.count, end - row.taken);
    if (active.count == 0) continue;
    // Of drafts, the row does not have the bytes yet.
    const int64_t first_byte = chooses() ? row.taken : end - active.count;
    const int64_t first = parts.schedule.position(local(), first_byte + 1) - 1;
    const float* context =
        local() > 0 ? blob(local(), active.member) + layout(local()).context : nullptr;
    for (int64_t i = 0; i < active.count; ++i) {
      const int64_t id =
          i < known || !chooses() ? row.byte(first_byte + i) : member.draft[i - known];
      float* const x = space.x.data() + (active.first + i) * stage.dim;
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

void Run::read_outputs(const Active& active, float* outputs) const {
  const int64_t dim = parts.local().dim;
  float* const to = outputs + active.output * dim;
  if (active.count > 0) {
    const int64_t first = active.first + active.count - active.outputs;
    rows_.normalize(space.x.data() + first * dim, active.outputs, to);
  } else if (row(active.member).taken > 0) {
    std::copy_n(blob(local(), active.member) + layout(local()).output, dim, to);
  } else {
    std::fill_n(to, dim, 0.f);  // its logits are known
  }
}

// Notes what a row has taken in, and chooses its next bytes.
void Run::finish(const Active& active, const float* outputs, Chooser& chooser) {
  Member& member = members[active.member];
  Row& row = *member.row;
  const int64_t dim = parts.local().dim;
  int64_t kept = active.outputs;
  if (active.count > 0) row.logits.clear();
  if (chooses() && !row.plan->pauses) {
    kept = choose_bytes(active, chooser);
    if (kept < active.count) {
      rows_.roll_back(active.place, space.trail.data(), kept);
    }
  } else {
    row.taken = next(active.member);
    if (gives_logits()) {
      const float* logits = logits_of(active, 0);
      if (logits != row.logits.data()) row.logits.assign(logits, logits + parts.num_tokens());
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
  Member& member = members[active.member];
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
    append_chosen(row, id, logits, parts.num_tokens(), true);
    if (proposes(row)) plan.proposer->follow(row.bytes);
    const bool is_drafted = !member.draft.empty() && member.draft.front() == id;
    member.draft = is_drafted ? member.draft.subspan(1) : std::span<const int64_t>();
    if (!is_drafted || plan.end || i + 1 >= active.count) return i + 1;
  }
}

const float* Run::logits_of(const Active& active, int64_t i) const {
  const Row& of = row(active.member);
  if (active.count == 0 && !of.logits.empty()) return of.logits.data();
  if (active.count == 0 && of.taken == 0) return parts.empty_logits;
  return space.logits.data() + (active.output + i) * parts.num_tokens();
}

}  // namespace mblm::decode
