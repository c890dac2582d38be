// Chooses the next byte of every row in a slot from its logits, moves the row on by one, and embeds
// the byte.
#pragma once

#include <cstdint>

#include "cuda/decode_slots.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// What is indexed by a byte is indexed by how many the row has grown by in this unit.
struct Choice {
  int64_t slots = 0, num_tokens = 0, bytes = 0;  // bytes: that a unit has room for
  Slot* rows = nullptr;                          // (slots)
  const int64_t* positions = nullptr;   // (slots), negative where no byte has been taken in
  const float* empty_logits = nullptr;  // (num_tokens), of a row without bytes
  float* logits = nullptr;              // (slots, num_tokens); those forbidden become -inf
  uint64_t* keys = nullptr;             // (slots, keys_of), working memory
  // Random numbers: where the generator is, or what it gave.
  const Drawn* drawn = nullptr;    // (slots, bytes)
  const float* uniform = nullptr;  // (slots, bytes, num_tokens), of rows with has_numbers
  int64_t* ids = nullptr;          // (slots, bytes): in, of rows that are fed; else out
  float* log_probs = nullptr;      // (slots, bytes), out, of rows that ask for them
  bool has_next = false;           // whether the byte is embedded, to be taken in within the unit
  PendingBytes next;
};

Error choose(const Choice& choice, Stream stream);

// For how many keys of a row there must be working memory: none where they fit where it is faster.
int64_t keys_of(int64_t num_tokens);

// How many threads draw so many numbers at once, by how much a generator's offset then grows, and
// what went wrong.
struct Drawing {
  int64_t threads = 1, offset = 4;
  Error error = nullptr;
};
Drawing drawing_of(int64_t numbers);

}  // namespace mblm::cuda
