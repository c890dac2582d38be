// Draws the next byte from logits: filters, noise, argmax.
#pragma once

#include <cstdint>
#include <vector>

namespace mblm::cpu {

struct Sampling {
  float temperature = 1;  // positive
  int64_t top_k = 1;      // how many of the highest logits may be drawn
  float top_p = 0;        // if positive, instead: the fewest likeliest whose probability reaches it
  double min_p = 0;  // and of those, which are at least so many times as likely as the likeliest
};

// What sample() works with, for so many tokens or fewer.
struct SampleMemory {
  explicit SampleMemory(int64_t num_tokens)
      : ranks(num_tokens), order(num_tokens), logits(num_tokens), probabilities(num_tokens) {}

  std::vector<uint32_t> ranks;
  std::vector<uint64_t> order;
  std::vector<float> logits, probabilities;
};

// argmax of logits / temperature - log(-log(u)) over what the filters keep; both logs are bounded
// from below at 1e-20. Where `allowed` is given, logits of tokens for which it is 0 count as -inf;
// it allows at least one. NaN counts as the highest; of equals, the lower id is taken.
int64_t sample(const Sampling& sampling, const float* logits, const uint8_t* allowed,
               const float* u, int64_t num_tokens, SampleMemory& memory);

// log_softmax of one logit.
float log_prob(const float* logits, int64_t num_tokens, int64_t id);

}  // namespace mblm::cpu
