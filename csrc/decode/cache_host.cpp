// Calls on rows as Python makes them, with what they ask of it: see host.h.
#include <algorithm>

#include "decode/cache.h"
#include "decode/given.h"

namespace mblm::decode {

using at::Tensor;

void Cache::take_in(const Lease& rows, bool keeps_pending, Host& host) {
  while (!take_in(rows, keeps_pending)) step_hosted(rows, false, host);
}

std::vector<Ran> Cache::run(const Lease& rows, double seconds,
                            const std::vector<std::optional<Tensor>>& drafts, Host& host) {
  using Clock = cpu::Team::Clock;
  const auto begin = Clock::now();
  const auto left = [&] {
    return seconds - std::chrono::duration<double>(Clock::now() - begin).count();
  };
  for (bool goes_on = false; !run(rows, left(), drafts, goes_on); goes_on = true) {
    if (goes_on && !(left() > 0)) break;
    step_hosted(rows, true, host);
  }
  return last(rows);
}

Tensor Cache::logits(const Lease& rows, Host& host) {
  for (;;) {
    if (const std::optional<Tensor> there = logits(rows)) return *there;
    step_hosted(rows, false, host);
  }
}

SavedState Cache::state(const Lease& rows, Host& host) {
  take_in(rows, false, host);
  return state_so_far(rows);
}

// Has hosted stages take in a patch of each row that waits for it; in a run, of those that go on
// with their plans.
void Cache::step_hosted(const Lease& rows, bool is_for_run, Host& host) {
  const std::shared_ptr<const Parts> parts = parts_for(rows, 0);
  const Schedule& schedule = parts->schedule;
  for (int64_t n = 0; n + 1 < schedule.stages(); ++n) {
    std::vector<Row*> due;
    for (int64_t i = 0; i < rows.size(); ++i) {
      Row& row = rows[i];
      if (!row.has_pending() || !is_host_due(*parts, row) || schedule.due(row.taken) != n) continue;
      if (is_for_run && (!row.plan || row.plan->end)) continue;
      due.push_back(&row);
    }
    if (!due.empty()) step_hosted(*parts, n, due, host);
  }
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

}  // namespace mblm::decode
