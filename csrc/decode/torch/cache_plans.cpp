// Plans of rows: begun, followed, and chosen for. See cache.h.
#include <algorithm>

#include "decode/torch/cache.h"
#include "torch/common.h"

namespace mblm::decode {
namespace {

using at::Tensor;
using cpu::Team;

// Bytes for which a run has memory reserved at a time.
constexpr int64_t kReserved = 256;

// Whether the lane that a plan is to have is its row's already.
bool serves(const Row& row, const NewPlan& wishes) {
  return row.plan && row.plan->lane.is(wishes.draws.get(), wishes.lane);
}

}  // namespace

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

std::vector<int64_t> Cache::begin(const Lease& rows, std::vector<NewPlan> plans) {
  check_count("plans", plans.size(), size_t(rows.size()));
  for (NewPlan& wishes : plans) {
    if (wishes.draws) continue;
    wishes.draws =
        std::make_shared<GeneratorDraws>(std::nullopt, 1, num_tokens_, hierarchy()->device());
  }
  std::vector<Lane> lanes(rows.size());  // that do not serve their row already
  for (int64_t i = 0; i < rows.size(); ++i) {
    const NewPlan& wishes = plans[i];
    TORCH_CHECK_VALUE(wishes.draws->num_tokens() == num_tokens_ && wishes.lane >= 0 &&
                          wishes.lane < wishes.draws->lanes(),
                      "draws must be of the model's ", num_tokens_, " tokens");
    for (const auto* automaton : {wishes.allow.get(), wishes.stop.get()}) {
      TORCH_CHECK_VALUE(!automaton || int64_t(automaton->class_of.size()) == num_tokens_,
                        "an automaton must have a class for each of ", num_tokens_, " tokens");
    }
  }
  std::vector<std::unique_ptr<Proposer>> proposers(rows.size());
  for (int64_t i = 0; i < rows.size(); ++i) {
    if (plans[i].draft > 0 && !plans[i].pauses) proposers[i] = std::make_unique<Proposer>();
  }
  std::vector<int64_t> lengths = this->lengths(rows);
  try {  // the last that may throw
    for (int64_t i = 0; i < rows.size(); ++i) {
      const NewPlan& wishes = plans[i];
      if (!serves(rows[i], wishes)) lanes[i] = GeneratorDraws::enter(wishes.draws, wishes.lane);
    }
  } catch (...) {
    for (Lane& lane : lanes) lane.put_back();
    throw;
  }
  for (int64_t i = 0; i < rows.size(); ++i) {
    const NewPlan& wishes = plans[i];
    Row& row = rows[i];
    Plan plan{wishes};
    plan.room = (max_length_ > 0 ? max_length_ : kMostBytes) - row.length;
    plan.sampling.top_k = std::clamp<int64_t>(plan.sampling.top_k, 1, num_tokens_);
    plan.allow_state = plan.allow ? plan.allow->start : 0;
    plan.stop_state = plan.stop ? plan.stop->start : 0;
    const bool knows_bytes = proposers[i] && row.plan && row.plan->proposer;
    plan.proposer = std::move(knows_bytes ? row.plan->proposer : proposers[i]);
    plan.lane = std::move(serves(row, wishes) ? row.plan->lane : lanes[i]);
    end_where_due(plan);
    row.plan = std::move(plan);
    row.ids.clear();
    row.log_probs.clear();
    row.lacks_memory = false;
  }
  return lengths;
}

std::vector<Ran> Cache::run(const Lease& rows, Host& host, double seconds,
                            const std::vector<std::optional<Tensor>>& drafts) {
  const auto begin = Team::Clock::now();
  std::vector<Ids> own(drafts.size());
  for (int64_t i = 0; i < rows.size(); ++i) {
    TORCH_CHECK_VALUE(rows[i].plan, "row ", rows.id(i), ": it has no plan");
  }
  if (!drafts.empty()) check_count("drafts", drafts.size(), size_t(rows.size()));
  for (size_t i = 0; i < drafts.size(); ++i) {
    if (!drafts[i]) continue;
    if (!rows[i].plan->pauses) own[i] = own_ids("drafts", *drafts[i], num_tokens_);
  }
  std::vector<Member> members;
  for (int64_t i = 0; i < rows.size(); ++i) {
    Row& row = rows[i];
    row.ids.clear();
    row.log_probs.clear();
    row.lacks_memory = false;
    if (row.plan->end || (row.plan->pauses && !row.has_pending())) continue;
    Member member{.row = &row};
    if (row.plan->pauses) row.logits.reserve(num_tokens_);
    if (!own.empty()) member.draft = own[i];
    members.push_back(member);
  }
  // As a number of the clock's, which has no room for infinity, and none for NaN.
  const auto length = std::chrono::duration<double>(seconds > 0 ? std::min(seconds, 1e9) : 0);
  const auto until = begin + std::chrono::duration_cast<Team::Clock::duration>(length);
  for (bool needs_memory = true; needs_memory;) {
    const std::shared_ptr<const Parts> parts = parts_for(rows, kReserved + 1);
    reserve_ahead(*parts, members);
    needs_memory = advance(*parts, Run::Kind::kChoose, members, host, until);
  }
  for (const Member& member : members) {
    member.row->lacks_memory = member.reason == Reason::kMemory;
  }
  return last(rows);
}

std::vector<Ran> Cache::last(const Lease& rows) {
  std::vector<Ran> all;
  for (int64_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    TORCH_CHECK_VALUE(row.plan, "row ", rows.id(i), ": it has no plan");
    Ran ran{tensor_of(row.ids), {}, row.reason()};
    if (row.plan->wants_log_probs) {
      ran.log_probs = own_tensor({int64_t(row.log_probs.size())}, at::kFloat);
      std::copy(row.log_probs.begin(), row.log_probs.end(),
                ran.log_probs.mutable_data_ptr<float>());
    }
    all.push_back(std::move(ran));
  }
  return all;
}

std::vector<Ran> Cache::choose(const Lease& rows, Host& host, const std::optional<Tensor>& ids,
                               const std::optional<Tensor>& logits,
                               const std::optional<Tensor>& mask) {
  const int64_t count = rows.size(), vocabulary = num_tokens_;
  for (int64_t i = 0; i < count; ++i) {
    const std::optional<Plan>& plan = rows[i].plan;
    TORCH_CHECK_VALUE(plan, "row ", rows.id(i), ": it has no plan");
    TORCH_CHECK_VALUE(plan->pauses, "row ", rows.id(i), ": its plan does not pause");
    TORCH_CHECK_VALUE(!plan->end, "row ", rows.id(i), ": its plan has ended (", name_of(*plan->end),
                      ")");
  }
  Ids given_ids;
  Tensor given_logits, given_mask;
  if (ids) {
    check_shape("ids", *ids, {count});
    given_ids = own_ids("ids", *ids, vocabulary);
  }
  if (logits) given_logits = check_given("logits", *logits, {count, vocabulary}, at::kFloat);
  if (mask) {  // whose bytes may be others than 0 and 1, and change meanwhile
    given_mask = check_given("mask", *mask, {count, vocabulary}, at::kBool);
    given_mask = given_mask.view(at::kByte).ne(0);
  }
  this->logits(rows, host);  // what is pending comes first
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
    if (ids) {
      const int64_t id = given_ids[i];
      TORCH_CHECK_VALUE(allows(*row.plan, id), "ids[", i, "]: the plan does not allow ", id,
                        " here");
    } else {
      TORCH_CHECK_VALUE(chooser.leaves_any(*row.plan, logits_of(i), mask_of(i)), "rows[", i,
                        "]: nothing is left to choose from");
    }
    row.bytes.reserve(memory_.bytes(), 1);
    row.ids.reserve(1);
    row.log_probs.reserve(1);
  }
  std::vector<const float*> numbers(count, nullptr);
  for (int64_t i = 0; i < count && !ids; ++i) {
    numbers[i] = rows[i].plan->lane.numbers();
    if (!numbers[i]) throw std::bad_alloc();
  }
  for (int64_t i = 0; i < count; ++i) {
    Row& row = rows[i];
    const int64_t id =
        ids ? given_ids[i] : chooser.choose(*row.plan, logits_of(i), numbers[i], mask_of(i));
    row.ids.clear();
    row.log_probs.clear();
    append_chosen(row, id, row.logits.data(), vocabulary, !ids);
  }
  return last(rows);
}

}  // namespace mblm::decode
