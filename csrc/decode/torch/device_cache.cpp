// Units of rows on a GPU, told and read by the host: see device_cache.h.
#ifdef MBLM_CUDA
#include "decode/torch/device_cache.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "torch/common.h"

namespace mblm::decode {
namespace {

using at::Tensor;

// Whether something other than the local stage is due before a row's next byte.
bool is_at_turn(const Schedule& schedule, int64_t taken) {
  return taken == 0 || schedule.due(taken) + 1 < schedule.stages();
}

}  // namespace

DeviceCache::DeviceCache(std::shared_ptr<const Hierarchy> hierarchy, int64_t max_rows)
    : Cache(hierarchy) {
  TORCH_CHECK_VALUE(max_rows > 0, "max_rows must be positive, got ", max_rows);
  TORCH_CHECK_VALUE(!hierarchy->is_on_cpu(), "weights must be on a GPU");
  for (const StageParts& stage : hierarchy->parts(0)->stages) {
    TORCH_CHECK_VALUE(!stage.is_hosted(), "on a GPU, no stage can be hosted");
  }
  slots_ = hierarchy->exchange_slots(nullptr);
  // Another cache may have left others meanwhile, which need not be for so many rows either.
  if (slots_ && !slots_->are_for(max_rows)) hierarchy->exchange_slots(std::move(slots_));
  if (!slots_) slots_ = std::make_shared<DeviceSlots>(hierarchy->device());
  make_room(max_rows, 0);
}

DeviceCache::~DeviceCache() {
  if (used_) used_->exchange_slots(std::move(slots_));
}

int64_t DeviceCache::slots() {
  const std::lock_guard lock(mutex_);
  return slots_->slots();
}

int64_t DeviceCache::graphs() {
  const std::lock_guard lock(mutex_);
  return slots_->graphs();
}

// Slots and tables for what rows need; they only grow.
void DeviceCache::make_room(int64_t slots, int64_t bytes) {
  used_ = hierarchy();
  slots_->reserve(*used_, slots, bytes);
}

void DeviceCache::reserve(const Parts&, Row& row, int64_t to, bool) {
  memory_.reserve_lists(row, to - row.taken + 1);
}

// As no stage is hosted, only the host may fail, before there is a change: rows need no copies,
// which would take slots.
void DeviceCache::feed_long(const Lease& rows, Host& host, const std::vector<Ids>& ids,
                            int64_t most) {
  const Schedule schedule = hierarchy()->parts(0)->schedule;
  take_in(rows, host, false);  // what the host goes on from is the same where it was looked at
  std::vector<std::optional<SavedState>> fed(rows.size());
  for (int64_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    if (!schedule.is_long(row.length, int64_t(ids[i].size()), most)) continue;
    std::optional<SavedState> before;
    if (row.length > 0) before = save(row);
    fed[i] = host.feed(std::move(before), tensor_of(ids[i]));
  }
  for (int64_t i = 0; i < rows.size(); ++i) {
    std::optional<RowState> after;
    if (fed[i]) after = load(rows[i], *fed[i]);
    append(rows[i], ids[i]);
    if (after) load_fed(rows[i], std::move(*after));
  }
  take_in(rows, host, true);
}

bool DeviceCache::advance(const Parts&, Run::Kind kind, std::vector<Member>& members,
                          cpu::Team::Clock::time_point until) {
  int64_t slots = 0, bytes = 0;
  for (const Member& member : members) {
    slots = std::max(slots, member.row->slot + 1);
    bytes = std::max(bytes, member.to);
  }
  for (;;) {
    const std::lock_guard lock(mutex_);
    make_room(slots, bytes);
    const bool goes = run_unit(kind, members), is_paused = pause(kind, members);
    if (is_paused || cpu::Team::Clock::now() >= until) return false;
    if (!goes) break;
  }
  return kind == Run::Kind::kChoose &&
         std::any_of(members.begin(), members.end(),
                     [](const Member& member) { return member.goes() && !member.row->plan->end; });
}

// Returns whether any row went on.
bool DeviceCache::run_unit(Run::Kind kind, std::vector<Member>& members) {
  for (int64_t slot = 0; slot < slots_->slots(); ++slot) slots_->row(slot).left = 0;
  std::vector<Member*> going;
  bool has_turn = false;
  int64_t count = 0;
  for (Member& member : members) {
    const Row& row = *member.row;
    if (kind == Run::Kind::kChoose && row.plan->end) member.reason = row.plan->end;
    if (!member.goes()) continue;
    const int64_t steps = tell(kind, member);
    if (slots_->row(row.slot).left == 0) continue;
    going.push_back(&member);
    has_turn |= row.has_pending() && is_at_turn(slots_->parts().schedule, row.taken);
    count = std::max(count, steps);
  }
  if (going.empty()) return false;
  if (kind == Run::Kind::kChoose) count = draw(going, count);
  slots_->run(has_turn, count);
  std::set<Draws*> draws;
  for (const Member* member : going) {
    read(kind, *member->row);
    if (member->row->plan) draws.insert(member->row->plan->lane.draws());
  }
  for (Draws* of : draws) {
    if (of) of->give_back();
  }
  return true;
}

int64_t DeviceCache::tell(Run::Kind kind, const Member& member) {
  const Row& row = *member.row;
  cuda::Slot& slot = slots_->row(row.slot);
  slot = {};
  slot.taken = row.taken;
  slot.pending = row.has_pending() ? row.byte(row.taken) : -1;
  if (kind != Run::Kind::kChoose) {
    slot.way = cuda::Way::kFeed;
    slot.left = std::min(member.to - row.taken, DeviceSlots::kBytes);
    for (int64_t k = 0; k < slot.left; ++k) {
      const int64_t number = row.taken + 1 + k;
      slots_->ids(row.slot)[k] = number < row.length ? row.byte(number) : -1;
    }
    const int64_t steps = steps_of(row, slot.left);
    // What follows the end of a patch does not depend on the local stage.
    const bool skips = slots_->parts().schedule.stages() > 1 && steps < slot.left;
    if (skips) slot.left = slot.skipped = steps;
    return skips ? 0 : steps;
  }
  const Plan& plan = *row.plan;
  const int64_t room = member.to - row.taken;
  if (plan.pauses) {
    slot.left = row.has_pending() && room > 0;
    return slot.left;
  }
  slot.way = cuda::Way::kChoose;
  slot.planned = plan.left();
  slot.left = std::min({plan.left(), room + !row.has_pending(), DeviceSlots::kBytes});
  const cpu::Sampling& sampling = plan.sampling;
  slot.temperature = sampling.temperature;
  slot.top_k = sampling.top_k;
  slot.top_p = sampling.top_p;
  if (sampling.min_p > 0) slot.least = float(std::log(sampling.min_p));
  slot.has_log_probs = plan.wants_log_probs;
  slot.allow = on_device(plan.allow, plan.allow_state);
  slot.stop = on_device(plan.stop, plan.stop_state);
  return steps_of(row, slot.left);
}

// How many steps a row takes before it waits for a turn.
int64_t DeviceCache::steps_of(const Row& row, int64_t left) const {
  const Schedule& schedule = slots_->parts().schedule;
  const bool chooses_first = !row.has_pending();
  if (chooses_first && is_at_turn(schedule, row.taken)) return std::min<int64_t>(left, 1);
  if (schedule.stages() == 1) return left;
  const int64_t patch = schedule.patch_size(schedule.stages() - 2);
  return std::min(left, patch - row.taken % patch + chooses_first);
}

// Rows draw in their order, byte after byte. Where an automaton may end one, the numbers of its
// other bytes must be given back, which only the last that drew from a generator can do.
int64_t DeviceCache::draw(const std::vector<Member*>& going, int64_t count) {
  std::set<const Draws*> draws;
  std::set<const void*> sources;
  bool may_end = false, gives_back = true;
  for (const Member* member : going) {
    const Plan& plan = *member->row->plan;
    if (plan.pauses) count = 1;
    may_end |= plan.allow || plan.stop;
    gives_back &= plan.lane.draws()->can_give_back();
    draws.insert(plan.lane.draws());
    sources.insert(plan.lane.draws()->generator());
  }
  if (may_end && !(gives_back && draws.size() == sources.size())) count = 1;
  const int64_t vocabulary = slots_->parts().num_tokens();
  for (int64_t step = 0; step < count; ++step) {
    for (const Member* member : going) {
      const Row& row = *member->row;
      cuda::Slot& slot = slots_->row(row.slot);
      if (slot.way != cuda::Way::kChoose || step >= steps_of(row, slot.left)) continue;
      const Numbers numbers = row.plan->lane.ahead(step);
      if (numbers.values) {
        slot.has_numbers = true;
        std::copy_n(numbers.values, vocabulary, slots_->uniform(row.slot) + step * vocabulary);
        continue;
      }
      slot.threads = numbers.threads;
      slot.first_number = numbers.first;
      slots_->drawn(row.slot)[step] = {numbers.seed, numbers.offset};
    }
  }
  return count;
}

void DeviceCache::read(Run::Kind kind, Row& row) {
  const cuda::Slot& slot = slots_->row(row.slot);
  if (slot.taken > row.taken) row.logits.clear();
  row.taken = slot.taken;
  if (kind != Run::Kind::kChoose || row.plan->pauses) return;
  for (int64_t k = 0; k < slot.done; ++k) {
    append_chosen(row, slots_->ids(row.slot)[k], slots_->log_probs(row.slot)[k], true);
  }
  row.plan->lane.pass_on();
}

bool DeviceCache::pause(Run::Kind kind, std::vector<Member>& members) {
  std::vector<Member*> paused;
  for (Member& member : members) {
    const Row& row = *member.row;
    if (!member.goes()) continue;
    const bool is_done = kind == Run::Kind::kChoose ? row.plan->pauses && !row.has_pending()
                                                    : row.taken >= member.to;
    if (!is_done) continue;
    if (kind == Run::Kind::kTakeIn) {
      member.reason = Reason::kTime;
    } else {
      paused.push_back(&member);
    }
  }
  if (paused.empty()) return false;
  const Tensor logits = slots_->logits(), empty = slots_->empty_logits();
  const int64_t vocabulary = slots_->parts().num_tokens();
  for (Member* member : paused) {
    Row& row = *member->row;
    const float* const from = row.length == 0
                                  ? empty.const_data_ptr<float>()
                                  : logits.const_data_ptr<float>() + row.slot * vocabulary;
    row.logits.assign(from, from + vocabulary);
    member->reason = Reason::kLogits;
  }
  return kind == Run::Kind::kChoose;
}

// The same automaton for the GPU's kernels. Tables that no plan has any more are forgotten.
cuda::Automaton DeviceCache::on_device(const std::shared_ptr<const Automaton>& automaton,
                                       int64_t state) {
  if (!automaton) return {};
  Tensor& tables = automata_[automaton];
  const auto tokens = int64_t(automaton->class_of.size()),
             transitions = int64_t(automaton->next.size()),
             states = int64_t(automaton->distance.size());
  if (!tables.defined()) {
    std::erase_if(automata_, [&](const auto& each) {
      return each.first != automaton && each.first.use_count() == 1;
    });
    const Tensor all = make::empty({tokens + transitions + states}, at::kInt);
    int32_t* to = all.mutable_data_ptr<int32_t>();
    for (const auto* table : {&automaton->class_of, &automaton->next, &automaton->distance}) {
      to = std::copy(table->begin(), table->end(), to);
    }
    tables = make::empty({all.size(0)}, all.options().device(used_->device()));
    tables.copy_(all);
  }
  const int32_t* const first = tables.const_data_ptr<int32_t>();
  return {first, first + tokens, first + tokens + transitions, automaton->classes, state};
}

void DeviceCache::copy_memory(const Row& from, const Row& to) {
  const std::lock_guard lock(mutex_);
  make_room(std::max(from.slot, to.slot) + 1, from.length);
  if (from.taken > 0) slots_->copy(from.slot, to.slot);
}

SavedState DeviceCache::save(const Row& row) {
  const std::lock_guard lock(mutex_);
  make_room(row.slot + 1, row.length);
  SavedState state{row.length, row.taken, slots_->save(row.slot, row.taken)};
  state.tensors.emplace("tail", save_tail(row));
  return state;
}

RowState DeviceCache::load(const Row& row, const SavedState& state) {
  const std::lock_guard lock(mutex_);
  RowState loaded = check_state(*hierarchy()->parts(0), memory_, state);
  make_room(row.slot + 1, state.length);
  slots_->load(row.slot, loaded.taken, loaded.bytes, loaded.length, state.tensors);
  return loaded;
}

}  // namespace mblm::decode
#endif
