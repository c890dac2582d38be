// Calls on rows: checks, memory, teams of threads. See cache.h.
#include "decode/cache.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/ids.h"
#include "torch/common.h"
#include "torch/decoding_team.h"

namespace mblm::decode {
namespace {

using at::Tensor;
using cpu::Team;

// Bytes for which a run has memory reserved at a time.
constexpr int64_t kReserved = 256;

void check_ids(const char* name, const Tensor& ids, int64_t num_tokens) {
  check_type(name, ids, at::kLong);
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.device().is_cpu(), name,
                    " must be of one dimension and on the CPU, got ", ids.sizes());
  const Tensor contiguous = ids.contiguous();
  const int64_t* data = contiguous.const_data_ptr<int64_t>();
  const int64_t outside = cpu::first_id_outside(data, ids.numel(), num_tokens);
  TORCH_CHECK_VALUE(outside < 0, name, " must lie in [0, ", num_tokens, "), got ",
                    data[std::max<int64_t>(outside, 0)], " at index ", outside);
}

// A contiguous tensor of that shape and type on the CPU.
Tensor check_given(const char* name, const Tensor& tensor, at::IntArrayRef shape,
                   at::ScalarType type) {
  check_shape(name, tensor, shape);
  check_type(name, tensor, type);
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU");
  return tensor.contiguous();
}

void check_one(const Lease& rows) {
  TORCH_CHECK_VALUE(rows.size() == 1, "rows: expected one, got ", rows.size());
}

void append_ids(Row& row, const Tensor& ids) {
  const int64_t* data = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.size(0); ++i) row.tail.push_back(int32_t(data[i * ids.stride(0)]));
  row.length += ids.size(0);
}

// A row has got so many more bytes, which its plan did not choose.
void note_fed(Row& row, int64_t count) {
  if (!row.plan || row.plan->end || count == 0) return;
  row.plan->room -= count;
  end_where_due(*row.plan);
}

// Whether the lane that a plan is to have is its row's already.
bool serves(const Row& row, const Wishes& wishes) {
  return row.plan && row.plan->lane.is(wishes.draws.get(), wishes.lane);
}

// The bytes that a row may have taken in before a hosted stage is due, at most `to`.
int64_t before_host(const Parts& parts, const Row& row, int64_t to) {
  const Schedule& schedule = parts.schedule;
  const int64_t local = schedule.stages() - 1;
  if (local == 0) return to;
  const int64_t patch = schedule.patch_size(local - 1);
  for (int64_t at = (row.taken / patch + 1) * patch; at < to; at += patch) {
    if (parts.stages[schedule.due(at)].is_hosted()) return at;
  }
  return to;
}

}  // namespace

Cache::Cache(std::shared_ptr<const Hierarchy> hierarchy)
    : hierarchy_(std::move(hierarchy)),
      memory_(*hierarchy_->parts(0)),
      rows_(hierarchy_->parts(0)->schedule.stages()),
      num_tokens_(hierarchy_->num_tokens()),
      max_length_(hierarchy_->max_length()) {}

std::shared_ptr<const Hierarchy> Cache::hierarchy() const {
  const std::lock_guard lock(table_mutex());
  return hierarchy_;
}

void Cache::set_hierarchy(std::shared_ptr<const Hierarchy> hierarchy) {
  if (hierarchy == this->hierarchy()) return;
  TORCH_CHECK_VALUE(memory_.fits(*hierarchy->parts(0)),
                    "the model's layers have other shapes than when decoding began; start a new "
                    "session");
  const std::lock_guard lock(table_mutex());
  hierarchy_.swap(hierarchy);
}

std::shared_ptr<const Parts> Cache::parts(int64_t most_bytes) const {
  struct Held {
    std::shared_ptr<const Hierarchy> hierarchy;
    std::shared_ptr<const Parts> parts;
  };
  const auto held = std::make_shared<Held>(hierarchy());
  held->parts = held->hierarchy->parts(most_bytes);
  return {held, held->parts.get()};
}

// With tables for so many more bytes than each row has.
std::shared_ptr<const Parts> Cache::parts_for(const Lease& rows, int64_t more) const {
  int64_t longest = 0;
  for (int64_t i = 0; i < rows.size(); ++i) longest = std::max(longest, rows[i].length);
  return parts(longest + more);
}

RowIds Cache::copy(const Lease& rows) {
  RowIds made = rows_.add(rows.size());
  try {
    const Lease copies(rows_, made);
    for (int64_t i = 0; i < rows.size(); ++i) copy_state(rows[i], copies[i]);
  } catch (...) {
    rows_.drop(made);
    throw;
  }
  return made;
}

void Cache::copy_state(const Row& from, Row& to) {
  static_cast<RowState&>(to) = from;
}

void Cache::exchange_states(Row& one, Row& other) {
  std::swap(static_cast<RowState&>(one), static_cast<RowState&>(other));
}

void Cache::reserve(const Parts& parts, Row& row, int64_t to, bool jumps) {
  memory_.reserve(parts, row, to, jumps);
}

void Cache::exchange(const Lease& rows, const Lease& others) {
  check_count("others", size_t(others.size()), size_t(rows.size()));
  for (int64_t i = 0; i < rows.size(); ++i) {
    note_fed(rows[i], others[i].length - rows[i].length);
    exchange_states(rows[i], others[i]);
  }
}

void Cache::check_fed(const Lease& rows, const std::vector<Tensor>& ids) const {
  check_count("ids", ids.size(), size_t(rows.size()));
  const int64_t limit = max_length_ ? max_length_ : kMostBytes;
  for (int64_t i = 0; i < rows.size(); ++i) {
    check_ids("ids", ids[i], num_tokens_);
    TORCH_CHECK_VALUE(ids[i].size(0) <= limit - rows[i].length, "ids: ", rows[i].length,
                      " bytes and ", ids[i].size(0), " more exceed the context of ", limit,
                      " bytes, which fixed positions of stage 1 limit");
  }
}

bool Cache::is_long(const Parts& parts, const Row& row, int64_t to, int64_t most) const {
  for (int64_t n = 0; n < parts.schedule.stages(); ++n) {
    if (parts.schedule.new_positions(n, row.taken, to) > most) return true;
  }
  return false;
}

std::vector<int64_t> Cache::long_pieces(const Lease& rows, const std::vector<Tensor>& ids,
                                        int64_t most) {
  check_fed(rows, ids);
  const std::shared_ptr<const Parts> parts = this->parts(0);
  std::vector<int64_t> found;
  for (int64_t i = 0; i < rows.size(); ++i) {
    if (is_long(*parts, rows[i], rows[i].length + ids[i].size(0) - 1, most)) found.push_back(i);
  }
  return found;
}

bool Cache::feed(const Lease& rows, const std::vector<Tensor>& ids, int64_t most) {
  check_fed(rows, ids);
  int64_t longest = 0;
  for (const Tensor& piece : ids) longest = std::max(longest, piece.size(0));
  const std::shared_ptr<const Parts> parts = parts_for(rows, longest);
  std::vector<Member> members;
  for (int64_t i = 0; i < rows.size(); ++i) {
    if (ids[i].size(0) == 0) continue;
    const int64_t to = rows[i].length + ids[i].size(0) - 1;
    const bool wants_host = to > rows[i].taken &&
                            (is_host_due(*parts, rows[i]) || before_host(*parts, rows[i], to) < to);
    if (wants_host || is_long(*parts, rows[i], to, most)) return false;
    members.push_back({.row = &rows[i], .to = to});
  }
  // All that may fail comes before the first change.
  for (const Member& member : members) reserve(*parts, *member.row, member.to, true);
  for (int64_t i = 0; i < rows.size(); ++i) {
    if (ids[i].size(0) == 0) continue;
    append_ids(rows[i], ids[i]);
  }
  try {
    std::erase_if(members, [](const Member& member) { return member.to == member.row->taken; });
    advance(*parts, Run::Kind::kTakeIn, members);
  } catch (...) {  // there is no memory, and no thread has begun
    for (int64_t i = 0; i < rows.size(); ++i) {
      rows[i].length -= ids[i].size(0);
      rows[i].tail.resize(rows[i].tail.size() - ids[i].size(0));
    }
    throw;
  }
  for (int64_t i = 0; i < rows.size(); ++i) {
    note_fed(rows[i], ids[i].size(0));
  }
  return true;
}

void Cache::append(const Lease& rows, const std::vector<Tensor>& ids) {
  check_fed(rows, ids);
  for (int64_t i = 0; i < rows.size(); ++i) {
    rows[i].tail.reserve(rows[i].tail.size() + ids[i].size(0));
  }
  for (int64_t i = 0; i < rows.size(); ++i) append_ids(rows[i], ids[i]);
}

bool Cache::take_in(const Lease& rows, bool keeps_pending) {
  const std::shared_ptr<const Parts> parts = parts_for(rows, 0);
  for (;;) {
    std::vector<Member> members;
    bool is_done = true;
    for (int64_t i = 0; i < rows.size(); ++i) {
      const int64_t end = rows[i].length - keeps_pending;
      if (end <= rows[i].taken) continue;
      const int64_t to = before_host(*parts, rows[i], end);
      is_done = is_done && to == end;
      reserve(*parts, rows[i], to, true);
      members.push_back({.row = &rows[i], .to = to});
    }
    if (advance(*parts, Run::Kind::kTakeIn, members) != Advanced::kFully) return false;
    if (is_done) return true;
  }
}

// Runs teams of threads until no member goes on, one is paused, or the time is over.
Cache::Advanced Cache::advance(const Parts& parts, Run::Kind kind, std::vector<Member>& members,
                               Team::Clock::time_point until) {
  std::unique_ptr<Workspace> space = take_space();
  Run run(parts, memory_, kind, members, *space);
  const auto is_any = [&](auto is) { return std::any_of(members.begin(), members.end(), is); };
  const auto goes = [](const Member& member) { return member.goes(); };
  const auto pauses = [](const Member& member) { return member.reason == Reason::kLogits; };
  while (is_any(goes)) {
    const auto now = Team::Clock::now(), alone = alone_until();
    const int64_t threads = threads_for(run.products(), now);
    const auto end = now < alone ? std::min(until, alone) : until;
    with_team(
        threads, [&](int64_t there) { return run.prepare(there); },
        [&](const cpu::Worker& worker) { run.work(worker, end); });
    if (run.needs_memory() || is_any(pauses) || Team::Clock::now() >= until) break;
  }
  give_space(std::move(space));
  if (run.needs_memory()) return Advanced::kToMemory;
  const auto wants = [](const Member& member) { return member.wants_host; };
  return is_any(wants) ? Advanced::kToHost : Advanced::kFully;
}

std::unique_ptr<Workspace> Cache::take_space() {
  const std::lock_guard lock(table_mutex());
  if (!spaces_) return std::make_unique<Workspace>();
  std::unique_ptr<Workspace> space = std::move(spaces_);
  spaces_ = std::move(space->next);
  return space;
}

void Cache::give_space(std::unique_ptr<Workspace> space) noexcept {
  const std::lock_guard lock(table_mutex());
  space->next = std::move(spaces_);
  spaces_ = std::move(space);
}

// Memory for the next bytes of a run. A row for which there is none goes no further.
void Cache::reserve_ahead(const Parts& parts, std::vector<Member>& members) {
  for (Member& member : members) {
    Row& row = *member.row;
    if (!member.goes() || row.plan->end) continue;
    const int64_t last = row.length + row.plan->left() - 1;  // the last byte is not taken in
    const int64_t to =
        std::max(row.taken, std::min({last, row.taken + kReserved, parts.most_bytes}));
    try {
      reserve(parts, row, to, false);
      member.to = to;
    } catch (const std::bad_alloc&) {
      member.reason = Reason::kMemory;
    }
  }
}

void Cache::begin(const Lease& rows, const std::vector<Wishes>& plans) {
  check_count("plans", plans.size(), size_t(rows.size()));
  std::vector<GeneratorDraws::Entry> entries;  // of lanes that do not serve their row already
  for (int64_t i = 0; i < rows.size(); ++i) {
    const Wishes& wishes = plans[i];
    TORCH_CHECK_VALUE(wishes.draws && wishes.draws->num_tokens() == num_tokens_ &&
                          wishes.lane >= 0 && wishes.lane < wishes.draws->lanes(),
                      "draws must be of the model's ", num_tokens_, " tokens");
    for (const auto* automaton : {wishes.allow.get(), wishes.stop.get()}) {
      TORCH_CHECK_VALUE(!automaton || int64_t(automaton->class_of.size()) == num_tokens_,
                        "an automaton must have a class for each of ", num_tokens_, " tokens");
    }
    TORCH_CHECK_VALUE(!wishes.allow || wishes.allow->distance[wishes.allow->start] >= 0,
                      "allow: an automaton that never accepts");
    if (!serves(rows[i], wishes)) entries.push_back({wishes.draws, wishes.lane});
  }
  GeneratorDraws::enter(entries);
  auto entered = entries.begin();
  for (int64_t i = 0; i < rows.size(); ++i) {
    const Wishes& wishes = plans[i];
    Row& row = rows[i];
    Plan plan;
    plan.max_tokens = wishes.max_tokens;
    plan.room = (max_length_ > 0 ? max_length_ : kMostBytes) - row.length;
    plan.sampling.temperature = float(wishes.temperature);
    plan.sampling.top_k = std::clamp<int64_t>(wishes.top_k, 1, num_tokens_);
    // Too small a number for a float keeps the likeliest, as 0 would not.
    const float top_p = std::max(float(wishes.top_p), std::numeric_limits<float>::min());
    plan.sampling.top_p = wishes.top_p > 0 ? top_p : 0;
    plan.sampling.min_p = wishes.min_p;
    plan.allow = wishes.allow;
    plan.stop = wishes.stop;
    plan.allow_state = plan.allow ? plan.allow->start : 0;
    plan.stop_state = plan.stop ? plan.stop->start : 0;
    plan.wants_log_probs = wishes.wants_log_probs;
    plan.pauses = wishes.pauses;
    if (serves(row, wishes)) {
      plan.lane = std::move(row.plan->lane);
    } else {
      plan.lane = Lane(wishes.draws, wishes.lane, (entered++)->next);
    }
    end_where_due(plan);
    row.plan = std::move(plan);
    row.ids.clear();
    row.log_probs.clear();
    row.lacks_memory = false;
  }
}

bool Cache::run(const Lease& rows, double seconds, const std::vector<std::optional<Tensor>>& drafts,
                bool goes_on) {
  const auto begin = Team::Clock::now();
  std::vector<Tensor> contiguous;
  for (int64_t i = 0; i < rows.size(); ++i) {
    TORCH_CHECK_VALUE(rows[i].plan, "row ", rows.id(i), ": it has no plan");
  }
  if (!drafts.empty()) check_count("drafts", drafts.size(), size_t(rows.size()));
  for (size_t i = 0; i < drafts.size(); ++i) {
    contiguous.emplace_back();
    if (!drafts[i]) continue;
    check_ids("drafts", *drafts[i], num_tokens_);
    TORCH_CHECK_VALUE(!rows[i].plan->pauses, "drafts[", i,
                      "]: the plan pauses, so that nothing is drafted");
    contiguous.back() = drafts[i]->contiguous();
  }
  std::vector<Member> members;
  for (int64_t i = 0; i < rows.size(); ++i) {
    Row& row = rows[i];
    if (!goes_on) {
      row.ids.clear();
      row.log_probs.clear();
    }
    row.lacks_memory = false;
    if (row.plan->end || (row.plan->pauses && !row.has_pending())) continue;
    Member member{.row = &row};
    if (row.plan->pauses) row.logits.reserve(num_tokens_);
    if (!contiguous.empty() && contiguous[i].defined()) {
      const std::span<const int64_t> draft(contiguous[i].const_data_ptr<int64_t>(),
                                           size_t(contiguous[i].size(0)));
      const size_t chosen = row.ids.size();
      const bool is_right =
          chosen <= draft.size() && std::equal(row.ids.begin(), row.ids.end(), draft.begin());
      if (is_right) member.draft = draft.subspan(chosen);
    }
    members.push_back(member);
  }
  // As a number of the clock's, which has no room for infinity, and none for NaN.
  const auto length = std::chrono::duration<double>(seconds > 0 ? std::min(seconds, 1e9) : 0);
  const auto until = begin + std::chrono::duration_cast<Team::Clock::duration>(length);
  Advanced advanced = Advanced::kToMemory;
  while (advanced == Advanced::kToMemory) {
    const std::shared_ptr<const Parts> parts = parts_for(rows, kReserved + 1);
    reserve_ahead(*parts, members);
    advanced = advance(*parts, Run::Kind::kChoose, members, until);
  }
  for (const Member& member : members) {
    member.row->lacks_memory = member.reason == Reason::kMemory;
  }
  return advanced == Advanced::kFully;
}

std::vector<Ran> Cache::last(const Lease& rows) {
  std::vector<Ran> all;
  for (int64_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    TORCH_CHECK_VALUE(row.plan, "row ", rows.id(i), ": it has no plan");
    Ran ran{own_tensor({int64_t(row.ids.size())}, at::kLong), {}, row.reason()};
    std::copy(row.ids.begin(), row.ids.end(), ran.ids.mutable_data_ptr<int64_t>());
    if (row.plan->wants_log_probs) {
      ran.log_probs = own_tensor({int64_t(row.log_probs.size())}, at::kFloat);
      std::copy(row.log_probs.begin(), row.log_probs.end(),
                ran.log_probs.mutable_data_ptr<float>());
    }
    all.push_back(std::move(ran));
  }
  return all;
}

std::optional<Tensor> Cache::logits(const Lease& rows) {
  const std::shared_ptr<const Parts> parts = parts_for(rows, 0);
  const int64_t vocabulary = parts->num_tokens();
  std::vector<Member> members;
  for (int64_t i = 0; i < rows.size(); ++i) {
    if (rows[i].length == rows[i].taken && !rows[i].logits.empty()) continue;
    reserve(*parts, rows[i], rows[i].length, true);
    rows[i].logits.reserve(vocabulary);
    members.push_back({.row = &rows[i], .to = rows[i].length});
  }
  Tensor result = own_tensor({rows.size(), vocabulary}, at::kFloat);
  if (advance(*parts, Run::Kind::kLogits, members) != Advanced::kFully) return std::nullopt;
  for (int64_t i = 0; i < rows.size(); ++i) {
    std::copy_n(rows[i].logits.data(), vocabulary,
                result.mutable_data_ptr<float>() + i * vocabulary);
  }
  return result;
}

void Cache::check_choosing(const Lease& rows) const {
  for (int64_t i = 0; i < rows.size(); ++i) {
    const std::optional<Plan>& plan = rows[i].plan;
    TORCH_CHECK_VALUE(plan, "row ", rows.id(i), ": it has no plan");
    TORCH_CHECK_VALUE(plan->pauses, "row ", rows.id(i), ": its plan does not pause");
    TORCH_CHECK_VALUE(!plan->end, "row ", rows.id(i), ": its plan has ended (", name_of(*plan->end),
                      ")");
  }
}

void Cache::choose(const Lease& rows, const std::optional<Tensor>& ids,
                   const std::optional<Tensor>& logits, const std::optional<Tensor>& mask) {
  const int64_t count = rows.size(), vocabulary = num_tokens_;
  TORCH_CHECK_VALUE(ids.has_value() + logits.has_value() + mask.has_value() == 1,
                    "expected exactly one of ids, logits and mask");
  check_choosing(rows);
  Tensor given_ids, given_logits, given_mask;
  if (ids) {
    given_ids = check_given("ids", *ids, {count}, at::kLong);
    check_ids("ids", given_ids, vocabulary);
  }
  if (logits) given_logits = check_given("logits", *logits, {count, vocabulary}, at::kFloat);
  if (mask) given_mask = check_given("mask", *mask, {count, vocabulary}, at::kBool);
  Chooser chooser(vocabulary);
  const auto logits_of = [&](int64_t i) {
    return given_logits.defined() ? given_logits.const_data_ptr<float>() + i * vocabulary
                                  : rows[i].logits.data();
  };
  const auto mask_of = [&](int64_t i) {
    return given_mask.defined() ? given_mask.const_data_ptr<bool>() + i * vocabulary : nullptr;
  };
  for (int64_t i = 0; i < count; ++i) {
    Row& row = rows[i];
    TORCH_CHECK_VALUE(!row.has_pending() && !row.logits.empty(), "row ", rows.id(i),
                      ": what is pending comes first");
    if (given_ids.defined()) {
      const int64_t id = given_ids.const_data_ptr<int64_t>()[i];
      TORCH_CHECK_VALUE(allows(*row.plan, id), "ids[", i, "]: the plan does not allow ", id,
                        " here");
    } else {
      TORCH_CHECK_VALUE(chooser.leaves_any(*row.plan, logits_of(i), mask_of(i)), "rows[", i,
                        "]: nothing is left to choose from");
    }
    row.tail.reserve(row.tail.size() + 1);
    row.ids.reserve(1);
    row.log_probs.reserve(1);
  }
  std::vector<const float*> numbers(count, nullptr);
  for (int64_t i = 0; i < count && !given_ids.defined(); ++i) {
    numbers[i] = rows[i].plan->lane.numbers();
    if (!numbers[i]) throw std::bad_alloc();
  }
  for (int64_t i = 0; i < count; ++i) {
    Row& row = rows[i];
    const int64_t id = given_ids.defined()
                           ? given_ids.const_data_ptr<int64_t>()[i]
                           : chooser.choose(*row.plan, logits_of(i), numbers[i], mask_of(i));
    row.ids.clear();
    row.log_probs.clear();
    append_chosen(row, id, row.logits.data(), vocabulary, !given_ids.defined());
  }
}

std::vector<Wanted> Cache::wanted(const Lease& rows, bool is_for_run) {
  const std::shared_ptr<const Parts> parts = parts_for(rows, 0);
  const Schedule& schedule = parts->schedule;
  std::vector<Wanted> all;
  for (int64_t n = 0; n < schedule.stages(); ++n) {
    Wanted wanted{.stage = n};
    std::vector<const Row*> due;
    for (int64_t i = 0; i < rows.size(); ++i) {
      if (!rows[i].has_pending() || !is_host_due(*parts, rows[i])) continue;
      if (is_for_run && (!rows[i].plan || rows[i].plan->end)) continue;
      if (schedule.due(rows[i].taken) != n) continue;
      due.push_back(&rows[i]);
      wanted.rows.push_back(rows.id(i));
      wanted.indices.push_back(i);
      wanted.positions.push_back(schedule.position(n, rows[i].taken));
      wanted.states.push_back(rows[i].stages[n].hosted);
    }
    if (due.empty()) continue;
    const auto count = int64_t(due.size());
    const int64_t size = schedule.patch_size(n);
    const StageLayout& layout = memory_.layout(n);
    wanted.ids = make::empty({count, size}, at::kLong);
    if (n > 0) wanted.contexts = make::empty({count, layout.seq_len, layout.dim}, at::kFloat);
    for (int64_t i = 0; i < count; ++i) {
      int64_t* const to = wanted.ids.mutable_data_ptr<int64_t>() + i * size;
      for (int64_t k = 0; k < size; ++k) to[k] = due[i]->byte(due[i]->taken - size + k);
      if (n == 0) continue;
      std::copy_n(due[i]->stages[n].blob.data() + layout.context, layout.context_size,
                  wanted.contexts.mutable_data_ptr<float>() + i * layout.context_size);
    }
    all.push_back(std::move(wanted));
  }
  return all;
}

void Cache::supply(const Lease& rows, const Wanted& wanted, const Tensor& outputs,
                   const Tensor& contexts, std::vector<HostedState>& states) {
  const std::shared_ptr<const Parts> parts = parts_for(rows, 0);
  const int64_t n = wanted.stage, count = int64_t(wanted.indices.size());
  const StageLayout &own = memory_.layout(n), &below = memory_.layout(n + 1);
  const Tensor output = check_given("outputs", outputs, {count, own.dim}, at::kFloat);
  const Tensor context = check_given("contexts", contexts, {count, below.context_size}, at::kFloat);
  check_count("states", states.size(), size_t(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = wanted.indices[i];
    TORCH_CHECK_VALUE(index < rows.size() && rows.id(index) == wanted.rows[i] &&
                          rows[index].has_pending() && is_host_due(*parts, rows[index]) &&
                          parts->schedule.due(rows[index].taken) == n,
                      "rows: row ", wanted.rows[i], " does not want stage ", n);
    reserve(*parts, rows[index], rows[index].taken + 1, true);
  }
  for (int64_t i = 0; i < count; ++i) {
    Row& row = rows[wanted.indices[i]];
    std::copy_n(output.const_data_ptr<float>() + i * own.dim, own.dim,
                row.stages[n].blob.data() + own.output);
    std::copy_n(context.const_data_ptr<float>() + i * below.context_size, below.context_size,
                row.stages[n + 1].blob.data() + below.context);
    row.stages[n].hosted.swap(states[i]);
    row.is_supplied = true;
  }
}

std::vector<std::pair<int64_t, int64_t>> Cache::lengths(const Lease& rows) {
  std::vector<std::pair<int64_t, int64_t>> all;
  for (int64_t i = 0; i < rows.size(); ++i) all.emplace_back(rows[i].length, rows[i].taken);
  return all;
}

std::map<std::string, std::vector<int64_t>> Cache::state_shapes(int64_t taken) const {
  return decode::state_shapes(*parts(0), memory_, taken);
}

SavedState Cache::state(const Lease& rows) {
  check_one(rows);
  const std::shared_ptr<const Parts> parts = parts_for(rows, 0);
  Row& row = rows[0];
  if (row.is_supplied) {  // what a host has given is of use with the next byte only
    reserve(*parts, row, row.taken + 1, true);
    std::vector<Member> members = {{.row = &row, .to = row.taken + 1}};
    advance(*parts, Run::Kind::kTakeIn, members);
  }
  return save_state(*parts, memory_, row);
}

void Cache::set_state(const Lease& rows, const SavedState& state) {
  check_one(rows);
  Row loaded = load_state(*parts(0), memory_, state);
  rows[0] = std::move(loaded);
}

void Cache::set_state_above(const Lease& rows, const SavedState& state, int64_t most) {
  check_one(rows);
  const std::shared_ptr<const Parts> parts = this->parts(0);
  Row loaded = load_state(*parts, memory_, state);
  const int64_t local = parts->schedule.stages() - 1;
  if (local > 0 && parts->schedule.position(local, state.taken) <= most) {
    // As if the stages above had taken in what the first byte asks for, and it had not come yet.
    loaded.taken = parts->schedule.begin(local, state.taken);
    loaded.is_supplied = true;
  }
  rows[0] = std::move(loaded);
}

}  // namespace mblm::decode
