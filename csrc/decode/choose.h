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
      : num_tokens_(num_tokens), allowed_(num_tokens), memory_(num_tokens) {}

  // The byte that a plan chooses from logits (num_tokens), with uniform numbers (num_tokens); of
  // those alone, if a mask (num_tokens) is given, where it is true.
  int64_t choose(const Plan& plan, const float* logits, const float* numbers,
                 const bool* mask = nullptr);

  // Whether it could choose any.
  bool leaves_any(const Plan& plan, const float* logits, const bool* mask = nullptr) const;

 private:
  int64_t num_tokens_;
  std::vector<uint8_t> allowed_;
  cpu::SampleMemory memory_;
};

// Whether a plan lets a byte be chosen next.
bool allows(const Plan& plan, int64_t id);

// Ends a plan if it has come to its end.
void end_where_due(Plan& plan);

// Appends a byte to a row, whose lists have room for it. logits (num_tokens) are the model's.
void append_chosen(Row& row, int64_t id, const float* logits, int64_t num_tokens, bool is_drawn);
void append_chosen(Row& row, int64_t id, float log_probability, bool is_drawn);

}  // namespace mblm::decode
