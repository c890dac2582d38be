// Draws the next byte from logits: see sampling.h.
#include "cpu/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/kernel.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {
namespace {

float bounded_log(float x) {
  return std::log(std::max(x, 1e-20f));
}

// In the order of numbers; NaN counts as the highest, as it does in torch.
MBLM_INLINE uint32_t rank(float logit) {
  constexpr uint32_t kSign = 0x80000000, kInfinity = 0x7f800000;
  const uint32_t bits =
      std::bit_cast<uint32_t>(logit + 0.f);  // which makes a difference to -0 alone
  if ((bits & ~kSign) > kInfinity) return ~0u;
  return bits & kSign ? ~bits : bits | kSign;
}

// Returns the highest.
MBLM_CLONES uint32_t rank_all(const float* logits, int64_t num_tokens, uint32_t* ranks) {
  uint32_t highest = 0;
  for (int64_t i = 0; i < num_tokens; ++i) {
    ranks[i] = rank(logits[i]);
    highest = std::max(highest, ranks[i]);
  }
  return highest;
}

// The first so many tokens, highest first, of equals the lower id; the last has this rank.
struct Kept {
  int64_t count;
  uint32_t least;
};

// Those that top_k keeps. What so many ranks reach is found bit by bit, which needs no order.
MBLM_CLONES Kept keep_highest(const uint32_t* ranks, int64_t num_tokens, int64_t top_k) {
  uint32_t least = 0;
  for (uint32_t bit = 1u << 31; top_k < num_tokens && bit > 0; bit >>= 1) {
    int32_t reached = 0;
    for (int64_t i = 0; i < num_tokens; ++i) reached += ranks[i] >= (least | bit);
    if (reached >= top_k) least |= bit;
    if (reached == top_k) break;
  }
  return {std::min(top_k, num_tokens), least};
}

// The same for top_p: a token is kept while those before it do not reach it.
Kept keep_top_p(const Sampling& sampling, const float* logits, int64_t num_tokens,
                SampleMemory& memory) {
  uint64_t* const order = memory.order.data();  // highest first, ids in the lower half
  float* const probabilities = memory.probabilities.data();
  for (int64_t i = 0; i < num_tokens; ++i) {
    order[i] = uint64_t(~memory.ranks[i]) << 32 | uint64_t(i);
  }
  std::sort(order, order + num_tokens);
  const float highest = logits[uint32_t(order[0])] / sampling.temperature;
  float sum = 0;
  for (int64_t i = 0; i < num_tokens; ++i) {
    probabilities[i] = std::exp(logits[uint32_t(order[i])] / sampling.temperature - highest);
    sum += probabilities[i];
  }
  int64_t count = 0;
  double mass = 0;
  for (; count < num_tokens; ++count) {
    const float probability = probabilities[count] / sum;
    mass += probability;
    if (float(mass) - probability >= sampling.top_p) break;
  }
  return {count, count > 0 ? ~uint32_t(order[count - 1] >> 32) : ~0u};
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
  uint32_t* const ranks = memory.ranks.data();
  const uint32_t highest_rank = rank_all(logits, num_tokens, ranks);
  const int64_t first = std::find(ranks, ranks + num_tokens, highest_rank) - ranks;
  const float highest = logits[first];
  if (allowed && highest == -INFINITY)
    return std::find_if(allowed, allowed + num_tokens, [](uint8_t is) { return is != 0; }) -
           allowed;
  // No noise changes what NaN and infinity decide.
  if (!std::isfinite(highest) || (sampling.top_k == 1 && !(sampling.top_p > 0))) return first;

  const Kept kept = sampling.top_p > 0 ? keep_top_p(sampling, logits, num_tokens, memory)
                                       : keep_highest(ranks, num_tokens, sampling.top_k);
  const float least = sampling.min_p > 0 ? float(std::log(sampling.min_p)) : -INFINITY;
  // So many of the least rank are among those kept.
  int64_t left = kept.count - std::count_if(ranks, ranks + num_tokens,
                                            [&](uint32_t of) { return of > kept.least; });
  int64_t best = first;
  float best_value = -INFINITY;
  for (int64_t token = 0; token < num_tokens; ++token) {
    if (ranks[token] < kept.least || (ranks[token] == kept.least && left-- <= 0)) continue;
    if ((logits[token] - highest) / sampling.temperature < least) continue;
    const float value = logits[token] / sampling.temperature - bounded_log(-bounded_log(u[token]));
    if (value > best_value) {
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
