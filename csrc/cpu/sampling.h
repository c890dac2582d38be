// Draws the next byte from logits: filters, noise, argmax.
#pragma once

#include <cstdint>
#include <vector>

namespace mblm::cpu {

struct Sampling {
  float temperature = 1;
  int64_t top_k = 1;  // how many of the highest logits may be drawn
  float top_p = 0;    // if positive, instead: the fewest likeliest whose probability reaches it
};

// argmax of logits / temperature - log(-log(u)) over what the filters keep; both logs are bounded
// from below at 1e-20. `order` is working memory of num_tokens.
int64_t sample(const Sampling& sampling, const float* logits, const float* u, int64_t num_tokens,
               std::vector<int64_t>& order);

}  // namespace mblm::cpu
