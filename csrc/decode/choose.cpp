// Filters, noise and automata of a row's next byte: see choose.h.
#include "decode/choose.h"

#include <algorithm>
#include <cmath>

namespace mblm::decode {

int64_t Chooser::choose(const Plan& plan, const float* logits, const float* numbers,
                        const bool* mask) {
  uint8_t* allowed = nullptr;
  if (plan.allow || mask) {
    allowed = allowed_.data();
    if (plan.allow) {
      plan.allow->mark_allowed(plan.allow_state, plan.left(), allowed);
    } else {
      std::fill_n(allowed, num_tokens_, uint8_t(1));
    }
    for (int64_t i = 0; mask && i < num_tokens_; ++i) allowed[i] &= uint8_t(mask[i]);
  }
  return cpu::sample(plan.sampling, logits, allowed, numbers, num_tokens_, memory_);
}

bool Chooser::leaves_any(const Plan& plan, const float* logits, const bool* mask) const {
  for (int64_t i = 0; i < num_tokens_; ++i) {
    if ((!mask || mask[i]) && allows(plan, i) && logits[i] != -INFINITY) return true;
  }
  return false;
}

bool allows(const Plan& plan, int64_t id) {
  return !plan.allow || plan.allow->allows(plan.allow_state, plan.allow->class_of[id], plan.left());
}

void end_where_due(Plan& plan) {
  const Automaton* const allow = plan.allow.get();
  if (plan.stop && plan.count > 0 && plan.stop->accepts(plan.stop_state)) {
    plan.end = Reason::kStop;
  } else if (allow && allow->is_complete(plan.allow_state)) {
    plan.end = Reason::kMatched;
  } else if (plan.count >= plan.max_tokens) {
    plan.end = Reason::kLength;
  } else if (plan.left() <= 0) {
    plan.end = Reason::kContext;
  } else if (allow && !allow->allows_any(plan.allow_state, plan.left())) {
    plan.end = Reason::kMatched;
  }
  if (plan.end) plan.lane.leave();
}

void append_chosen(Row& row, int64_t id, const float* logits, int64_t num_tokens, bool is_drawn) {
  const bool is_wanted = row.plan->wants_log_probs;
  append_chosen(row, id, is_wanted ? cpu::log_prob(logits, num_tokens, id) : 0, is_drawn);
}

void append_chosen(Row& row, int64_t id, float log_probability, bool is_drawn) {
  Plan& plan = *row.plan;
  ++row.length;
  row.bytes.push_back(int32_t(id));
  row.ids.push_back(id);
  if (plan.wants_log_probs) row.log_probs.push_back(log_probability);
  if (plan.allow) plan.allow_state = plan.allow->step(plan.allow_state, id);
  if (plan.stop) plan.stop_state = plan.stop->step(plan.stop_state, id);
  ++plan.count;
  if (is_drawn) plan.lane.advance();
  end_where_due(plan);
}

}  // namespace mblm::decode
