// Draws the next byte from logits: see sampling.h.
#include "cpu/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

#include "cpu/kernel.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {
namespace {

float bounded_log(float x) {
  return std::log(std::max(x, 1e-20f));
}

// In the order of numbers; NaN counts as the highest, as it does in torch.
MBLM_INLINE int32_t rank(float logit) {
  constexpr int32_t kAbsolute = 0x7fffffff, kInfinity = 0x7f800000;
  const int32_t bits = std::bit_cast<int32_t>(logit + 0.f);  // which makes no difference but to -0
  return (bits & kAbsolute) > kInfinity ? kAbsolute : bits ^ (bits >> 31 & kAbsolute);
}

// The lowest id of those with the highest logit.
MBLM_CLONES int64_t likeliest(const float* logits, int64_t num_tokens) {
  int32_t highest = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < num_tokens; ++i) highest = std::max(highest, rank(logits[i]));
  int64_t id = 0;
  while (id + 1 < num_tokens && rank(logits[id]) != highest) ++id;
  return id;
}

// The highest in front, of equals the lower id.
struct Before {
  const float* logits;

  bool operator()(int64_t a, int64_t b) const {
    const int32_t of_a = rank(logits[a]), of_b = rank(logits[b]);
    return of_a != of_b ? of_a > of_b : a < b;
  }
};

// Brings the tokens that top_k keeps to the front of `order`; returns how many.
int64_t keep_highest(const float* logits, int64_t top_k, std::span<int64_t> order) {
  const int64_t kept = std::min(top_k, int64_t(order.size()));
  if (kept < int64_t(order.size())) {
    std::nth_element(order.begin(), order.begin() + (kept - 1), order.end(), Before{logits});
  }
  return kept;
}

// The same for top_p: a token is kept while those before it do not reach it.
int64_t keep_top_p(const Sampling& sampling, const float* logits, std::span<int64_t> order,
                   float* probabilities) {
  std::sort(order.begin(), order.end(), Before{logits});
  const float highest = logits[order[0]] / sampling.temperature;
  const auto count = int64_t(order.size());
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    probabilities[i] = std::exp(logits[order[i]] / sampling.temperature - highest);
    sum += probabilities[i];
  }
  double mass = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float probability = probabilities[i] / sum;
    mass += probability;
    if (float(mass) - probability >= sampling.top_p) return i;
  }
  return count;
}

}  // namespace

int64_t sample(const Sampling& sampling, const float* logits, const uint8_t* allowed,
               const float* u, int64_t num_tokens, SampleMemory& memory) {
  const float* const given = logits;
  if (allowed) {
    logits = memory.logits.data();
    for (int64_t i = 0; i < num_tokens; ++i) {
      memory.logits[i] = allowed[i] ? given[i] : -INFINITY;
    }
  }
  const int64_t first = likeliest(logits, num_tokens);
  const float highest = logits[first];
  if (allowed && highest == -INFINITY)
    return std::find_if(allowed, allowed + num_tokens, [](uint8_t is) { return is != 0; }) -
           allowed;
  // No noise changes what NaN and infinity decide.
  if (!std::isfinite(highest) || (sampling.top_k == 1 && !(sampling.top_p > 0))) return first;

  const std::span<int64_t> order(memory.order.data(), num_tokens);
  std::iota(order.begin(), order.end(), int64_t(0));
  const int64_t kept = sampling.top_p > 0
                           ? keep_top_p(sampling, logits, order, memory.probabilities.data())
                           : keep_highest(logits, sampling.top_k, order);
  const float least = sampling.min_p > 0 ? float(std::log(sampling.min_p)) : -INFINITY;
  int64_t best = first;
  float best_value = -INFINITY;
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t token = order[i];
    if ((logits[token] - highest) / sampling.temperature < least) continue;
    const float value = logits[token] / sampling.temperature - bounded_log(-bounded_log(u[token]));
    if (value > best_value || (value == best_value && token < best)) {
      best = token;
      best_value = value;
    }
  }
  return best;
}

MBLM_CLONES float log_prob(const float* logits, int64_t num_tokens, int64_t id) {
  float highest = -INFINITY;
  for (int64_t i = 0; i < num_tokens; ++i) highest = std::max(highest, logits[i]);
  const double sum = sum_in_lanes(num_tokens, [&](int64_t i) MBLM_INLINE_LAMBDA {
    return double(vector_exp(logits[i] - highest));
  });
  return logits[id] - highest - float(std::log(sum));
}

}  // namespace mblm::cpu
