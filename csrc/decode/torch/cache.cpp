// Rows, the bytes that they take in, their states, and hosted stages. See cache.h.
#include "decode/torch/cache.h"

#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <map>
#include <utility>

#include "torch/common.h"
#include "torch/decoding_team.h"

namespace mblm::decode {
namespace {

using at::Tensor;
using cpu::Team;

void check_one(const Lease& rows) {
  TORCH_CHECK_VALUE(rows.size() == 1, "rows: expected one, got ", rows.size());
}

// A row has got so many more bytes, which its plan did not choose.
void note_fed(Row& row, int64_t count) {
  if (!row.plan || row.plan->end || count == 0) return;
  row.plan->room -= count;
  end_where_due(*row.plan);
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
  TORCH_CHECK_TYPE(hierarchy, "hierarchy must not be None");
  TORCH_CHECK_VALUE(memory_.fits(*hierarchy->parts(0)) && hierarchy->num_tokens() == num_tokens_ &&
                        hierarchy->max_length() == max_length_,
                    "the model's layers have other shapes than when decoding began; start a new "
                    "session");
  TORCH_CHECK_VALUE(hierarchy->device() == this->hierarchy()->device(), "the model has moved from ",
                    this->hierarchy()->device(), " to ", hierarchy->device(),
                    "; start a new session");
  const std::lock_guard lock(table_mutex());
  hierarchy_.swap(hierarchy);
}

std::shared_ptr<const Parts> Cache::parts(int64_t most_bytes) const {
  struct Held {
    std::shared_ptr<const Hierarchy> hierarchy;
    std::shared_ptr<const Parts> parts;
  };
  const auto held = std::make_shared<Held>(Held{hierarchy(), nullptr});
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
    for (int64_t i = 0; i < rows.size(); ++i) {
      copy_memory(rows[i], copies[i]);
      static_cast<RowState&>(copies[i]) = rows[i];
    }
  } catch (...) {
    rows_.drop(made);
    throw;
  }
  return made;
}

void Cache::reserve(const Parts& parts, Row& row, int64_t to, bool jumps) {
  memory_.reserve(parts, row, to, jumps);
}

void Cache::append(Row& row, const Ids& ids) {
  if (ids.empty()) return;
  row.bytes.reserve(memory_.bytes(), int64_t(ids.size()));
  for (const int64_t id : ids) row.bytes.push_back(int32_t(id));
  row.length += int64_t(ids.size());
}

// Pieces that nobody else can write to.
std::vector<Ids> Cache::check_fed(const Lease& rows, const std::vector<Tensor>& ids) const {
  check_count("ids", ids.size(), size_t(rows.size()));
  const int64_t limit = max_length_ ? max_length_ : kMostBytes;
  std::vector<Ids> own;
  for (int64_t i = 0; i < rows.size(); ++i) {
    own.push_back(own_ids("ids", ids[i], num_tokens_));
    const auto count = int64_t(own.back().size());
    TORCH_CHECK_VALUE(count <= limit - rows[i].length, "ids: ", rows[i].length, " bytes and ",
                      count, " more exceed the context of ", limit,
                      " bytes, which fixed positions of stage 1 limit");
  }
  return own;
}

void Cache::feed(const Lease& rows, Host& host, const std::vector<Tensor>& given, int64_t most) {
  const std::vector<Ids> ids = check_fed(rows, given);
  if (!feed_short(rows, ids, most)) feed_long(rows, host, ids, most);
  for (int64_t i = 0; i < rows.size(); ++i) note_fed(rows[i], int64_t(ids[i].size()));
}

void Cache::feed_long(const Lease& rows, Host& host, const std::vector<Ids>& ids, int64_t most) {
  const std::shared_ptr<const Parts> parts = this->parts(0);
  // Copies are fed, so that it is done for all rows or for none.
  const RowIds copies = copy(rows);
  const auto drop_copies = c10::make_scope_exit([&] { drop(copies); });
  for (int64_t i = 0; i < rows.size(); ++i) {
    const Lease one(rows_, std::span(&copies[i], 1));
    Row& row = one[0];
    if (parts->schedule.is_long(row.length, int64_t(ids[i].size()), most)) {
      std::optional<SavedState> before;
      if (row.length > 0) before = state(one, host);
      RowState after = load_above(row, host.feed(std::move(before), tensor_of(ids[i])), most);
      append(row, ids[i]);
      load_fed(row, std::move(after));
    } else {
      append(row, ids[i]);
    }
  }
  const Lease fed(rows_, copies);
  take_in(fed, host, true);
  for (int64_t i = 0; i < rows.size(); ++i) {
    static_cast<RowState&>(rows[i]) = std::move(fed[i]);
  }
}

// A row has got bytes, and what its stages are after them: it still knows all of its bytes.
void Cache::load_fed(Row& row, RowState after) {
  TORCH_CHECK_VALUE(after.length == row.length, "state: expected one of ", row.length,
                    " bytes, got one of ", after.length);
  after.bytes = std::move(row.bytes);
  static_cast<RowState&>(row) = std::move(after);
}

bool Cache::feed_short(const Lease& rows, const std::vector<Ids>& ids, int64_t most) {
  int64_t longest = 0;
  for (const Ids& piece : ids) longest = std::max(longest, int64_t(piece.size()));
  const std::shared_ptr<const Parts> parts = parts_for(rows, longest);
  std::vector<Member> members;
  for (int64_t i = 0; i < rows.size(); ++i) {
    const auto count = int64_t(ids[i].size());
    if (count == 0) continue;
    const int64_t to = rows[i].length + count - 1;
    const bool wants_host = to > rows[i].taken &&
                            (is_host_due(*parts, rows[i]) || before_host(*parts, rows[i], to) < to);
    if (wants_host || parts->schedule.is_long(rows[i].length, count, most)) return false;
    members.push_back({.row = &rows[i], .to = to});
  }
  // All that may fail comes before the first change.
  for (const Member& member : members) reserve(*parts, *member.row, member.to, true);
  for (int64_t i = 0; i < rows.size(); ++i) append(rows[i], ids[i]);
  try {
    std::erase_if(members, [](const Member& member) { return member.to == member.row->taken; });
    advance(*parts, Run::Kind::kTakeIn, members);
  } catch (...) {  // there is no memory, and no thread has begun; a GPU may have
    for (int64_t i = 0; i < rows.size(); ++i) {
      const int64_t left = std::min(int64_t(ids[i].size()), rows[i].length - rows[i].taken);
      rows[i].length -= left;
      rows[i].bytes.shorten(left);
    }
    throw;
  }
  return true;
}

void Cache::take_in(const Lease& rows, Host& host, bool keeps_pending) {
  const std::shared_ptr<const Parts> parts = parts_for(rows, 0);
  for (bool is_done = false; !is_done;) {
    is_done = true;
    std::vector<Member> members;
    for (int64_t i = 0; i < rows.size(); ++i) {
      const int64_t end = rows[i].length - keeps_pending;
      if (end <= rows[i].taken) continue;
      const int64_t to = before_host(*parts, rows[i], end);
      is_done = is_done && to == end;
      reserve(*parts, rows[i], to, true);
      members.push_back({.row = &rows[i], .to = to});
    }
    advance(*parts, Run::Kind::kTakeIn, members, host);
  }
}

// Runs teams of threads until no member goes on, one is paused, or the time is over.
bool Cache::advance(const Parts& parts, Run::Kind kind, std::vector<Member>& members,
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
  return run.needs_memory();
}

bool Cache::advance(const Parts& parts, Run::Kind kind, std::vector<Member>& members, Host& host,
                    Team::Clock::time_point until) {
  const auto wants = [](const Member& member) { return member.wants_host; };
  for (bool may_end = false;; may_end = true) {
    if (advance(parts, kind, members, until)) return true;
    if (std::none_of(members.begin(), members.end(), wants)) return false;
    if (may_end && Team::Clock::now() >= until) return false;
    step_hosted(parts, members, host);
    std::erase_if(members, [](const Member& member) { return member.reason == Reason::kLogits; });
  }
}

void Cache::step_hosted(const Parts& parts, std::vector<Member>& members, Host& host) {
  std::map<int64_t, std::vector<Row*>> due;
  for (Member& member : members) {
    if (!std::exchange(member.wants_host, false)) continue;
    due[parts.schedule.due(member.row->taken)].push_back(member.row);
  }
  for (const auto& [n, rows] : due) step_hosted(parts, n, rows, host);
}

void Cache::step_hosted(const Parts& parts, int64_t n, const std::vector<Row*>& rows, Host& host) {
  const auto count = int64_t(rows.size()), size = parts.schedule.patch_size(n);
  const StageLayout &own = memory_.layout(n), &below = memory_.layout(n + 1);
  Wanted wanted{.stage = n, .ids = make::empty({count, size}, at::kLong)};
  if (n > 0) wanted.contexts = make::empty({count, own.seq_len, own.dim}, at::kFloat);
  for (int64_t i = 0; i < count; ++i) {
    const Row& row = *rows[i];
    wanted.positions.push_back(parts.schedule.position(n, row.taken));
    wanted.states.push_back(row.stages[n].hosted);
    int64_t* const to = wanted.ids.mutable_data_ptr<int64_t>() + i * size;
    for (int64_t k = 0; k < size; ++k) to[k] = row.byte(row.taken - size + k);
    if (n == 0) continue;
    std::copy_n(row.stages[n].blob.data() + own.context, own.context_size,
                wanted.contexts.mutable_data_ptr<float>() + i * own.context_size);
  }
  Supplied given = host.step(wanted);
  const Tensor outputs = check_given("outputs", given.outputs, {count, own.dim}, at::kFloat);
  const Tensor contexts =
      check_given("contexts", given.contexts, {count, below.context_size}, at::kFloat);
  check_count("states", given.states.size(), size_t(count));
  for (Row* row : rows) reserve(parts, *row, row->taken + 1, true);
  for (int64_t i = 0; i < count; ++i) {
    Row& row = *rows[i];
    std::copy_n(outputs.const_data_ptr<float>() + i * own.dim, own.dim,
                row.stages[n].blob.data() + own.output);
    std::copy_n(contexts.const_data_ptr<float>() + i * below.context_size, below.context_size,
                row.stages[n + 1].blob.data() + below.context);
    row.stages[n].hosted.swap(given.states[i]);
    row.is_supplied = true;
  }
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

Tensor Cache::logits(const Lease& rows, Host& host) {
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
  advance(*parts, Run::Kind::kLogits, members, host);
  for (int64_t i = 0; i < rows.size(); ++i) {
    std::copy_n(rows[i].logits.data(), vocabulary,
                result.mutable_data_ptr<float>() + i * vocabulary);
  }
  return result;
}

std::vector<int64_t> Cache::lengths(const Lease& rows) {
  std::vector<int64_t> all;
  for (int64_t i = 0; i < rows.size(); ++i) all.push_back(rows[i].length);
  return all;
}

SavedState Cache::state(const Lease& rows, Host& host) {
  check_one(rows);
  take_in(rows, host, false);
  return state_so_far(rows);
}

SavedState Cache::state_so_far(const Lease& rows) {
  check_one(rows);
  Row& row = rows[0];
  if (row.is_supplied) {  // what a host has given is of use with the next byte only
    const std::shared_ptr<const Parts> parts = parts_for(rows, 0);
    reserve(*parts, row, row.taken + 1, true);
    std::vector<Member> members = {{.row = &row, .to = row.taken + 1}};
    advance(*parts, Run::Kind::kTakeIn, members);
  }
  return save(row);
}

void Cache::set_state(const Lease& rows, Host& /* host */, const SavedState& state) {
  check_one(rows);
  Row& row = rows[0];
  row = {load(row, state), row.slot};
}

SavedState Cache::save(const Row& row) {
  return save_state(*parts(0), memory_, row);
}

RowState Cache::load(const Row&, const SavedState& state) {
  return load_state(*parts(0), memory_, state);
}

RowState Cache::load_above(const Row& row, const SavedState& state, int64_t most) {
  const std::shared_ptr<const Parts> parts = this->parts(0);
  RowState loaded = load(row, state);
  const int64_t local = parts->schedule.stages() - 1;
  if (local > 0 && parts->schedule.position(local, state.taken) <= most) {
    // As if the stages above had taken in what the first byte asks for, and it had not come yet.
    loaded.taken = parts->schedule.begin(local, state.taken);
    loaded.is_supplied = true;
  }
  return loaded;
}

}  // namespace mblm::decode
