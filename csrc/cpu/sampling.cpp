// Draws the next byte from logits: see sampling.h.
#include "cpu/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/kernel.h"

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

// How many of the ordered tokens are kept by top_p.
int64_t count_of_mass(const Sampling& sampling, const float* logits,
                      const std::vector<int64_t>& order) {
  const float highest = logits[order[0]] / sampling.temperature;
  std::vector<float> probabilities(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    probabilities[i] = std::exp(logits[order[i]] / sampling.temperature - highest);
  }
  const float sum = std::accumulate(probabilities.begin(), probabilities.end(), 0.f);
  int64_t count = 0;
  float mass = 0;
  for (; count < int64_t(order.size()) && (count == 0 || mass < sampling.top_p); ++count) {
    mass += probabilities[count] / sum;
  }
  return count;
}

}  // namespace

int64_t sample(const Sampling& sampling, const float* logits, const float* u, int64_t num_tokens,
               std::vector<int64_t>& order) {
  int64_t kept = std::min(sampling.top_k, num_tokens);
  if (kept == 1 && !(sampling.top_p > 0)) return likeliest(logits, num_tokens);
  order.resize(num_tokens);
  std::iota(order.begin(), order.end(), int64_t(0));
  // Ties go to the lower id.
  const auto before = [&](int64_t a, int64_t b) {
    const int32_t of_a = rank(logits[a]), of_b = rank(logits[b]);
    return of_a != of_b ? of_a > of_b : a < b;
  };
  if (sampling.top_p > 0) {
    std::sort(order.begin(), order.end(), before);
    kept = count_of_mass(sampling, logits, order);
  } else if (kept < num_tokens) {
    std::nth_element(order.begin(), order.begin() + (kept - 1), order.end(), before);
  }

  int64_t best = order[0];
  float highest = -INFINITY;
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t token = order[i];
    const float value = logits[token] / sampling.temperature - bounded_log(-bounded_log(u[token]));
    if (value > highest || (value == highest && token < best)) {
      best = token;
      highest = value;
    }
  }
  return best;
}

}  // namespace mblm::cpu
