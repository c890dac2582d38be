// Filters, noise and automata of a row's next byte: see choose.h.
#include "decode/choose.h"

#include <cmath>

namespace mblm::decode {

int64_t Chooser::choose(const Plan& plan, const float* logits, const float* numbers,
                        const bool* mask) {
  if (plan.allow || mask) {
    bool is_any_left = false;
    for (int64_t i = 0; i < num_tokens_; ++i) {
      const bool is_left = (!mask || mask[i]) && (!plan.allow || allows(plan, i));
      kept_[i] = is_left ? logits[i] : -INFINITY;
      is_any_left = is_any_left || is_left;
    }
    if (!is_any_left) return -1;
    logits = kept_.data();
  }
  return cpu::sample(plan.sampling, logits, nullptr, numbers, num_tokens_, memory_);
}

bool allows(const Plan& plan, int64_t id) {
  return !plan.allow || plan.allow->allows(plan.allow_state, plan.allow->class_of[id], plan.left());
}

std::optional<Reason> end_of(const Plan& plan, int64_t length, int64_t max_length) {
  if (plan.stop && plan.count > 0 && plan.stop->accepts(plan.stop_state)) return Reason::kStop;
  if (plan.allow && plan.allow->accepts(plan.allow_state) &&
      !plan.allow->allows_any(plan.allow_state, plan.left())) {
    return Reason::kMatched;
  }
  if (plan.left() <= 0) return Reason::kLength;
  if (max_length > 0 && length >= max_length) return Reason::kContext;
  return std::nullopt;
}

void append_chosen(Row& row, int64_t id, const float* logits, int64_t num_tokens,
                   int64_t max_length) {
  Plan& plan = *row.plan;
  ++row.length;
  row.tail.push_back(int32_t(id));
  row.ids.push_back(id);
  if (plan.wants_log_probs) row.log_probs.push_back(cpu::log_prob(logits, num_tokens, id));
  if (plan.allow) plan.allow_state = plan.allow->step(plan.allow_state, id);
  if (plan.stop) plan.stop_state = plan.stop->step(plan.stop_state, id);
  ++plan.count;
  plan.lane.advance();
  plan.end = end_of(plan, row.length, max_length);
  if (plan.end) plan.lane.leave();
}

}  // namespace mblm::decode
