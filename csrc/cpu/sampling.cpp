// Draws the next byte from logits: see sampling.h.
#include "cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mblm::cpu {
namespace {

float bounded_log(float x) {
  return std::log(std::max(x, 1e-20f));
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
  order.resize(num_tokens);
  std::iota(order.begin(), order.end(), int64_t(0));
  // NaN counts as the highest, as it does in torch; ties go to the lower id.
  const auto before = [&](int64_t a, int64_t b) {
    const bool a_nan = std::isnan(logits[a]), b_nan = std::isnan(logits[b]);
    if (a_nan || b_nan) return a_nan != b_nan ? a_nan : a < b;
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  int64_t kept = std::min(sampling.top_k, num_tokens);
  if (sampling.top_p > 0) {
    std::sort(order.begin(), order.end(), before);
    kept = count_of_mass(sampling, logits, order);
  } else if (kept == 1) {
    return *std::min_element(order.begin(), order.end(), before);
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
