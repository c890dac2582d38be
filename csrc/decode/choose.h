// Chooses a row's next byte by its plan, and appends it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "decode/rows.h"

namespace mblm::decode {

// What a thread works with when it chooses.
class Chooser {
 public:
  explicit Chooser(int64_t num_tokens)
      : num_tokens_(num_tokens), kept_(num_tokens), memory_(num_tokens) {}

  // The byte that a plan chooses from logits (num_tokens), with uniform numbers (num_tokens); of
  // those alone, if a mask (num_tokens) is given, where it is not 0. -1 if none is left.
  int64_t choose(const Plan& plan, const float* logits, const float* numbers,
                 const bool* mask = nullptr);

 private:
  int64_t num_tokens_;
  std::vector<float> kept_;
  cpu::SampleMemory memory_;
};

// Whether a plan lets a byte be chosen next.
bool allows(const Plan& plan, int64_t id);

// Why a plan ends here, for a row of so many bytes; max_length 0 is no limit.
std::optional<Reason> end_of(const Plan& plan, int64_t length, int64_t max_length);

// Appends the chosen byte to a row, whose lists have room for it. logits (num_tokens): the model's.
void append_chosen(Row& row, int64_t id, const float* logits, int64_t num_tokens,
                   int64_t max_length);

}  // namespace mblm::decode
