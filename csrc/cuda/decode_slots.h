// What is done with rows in slots beside the layers of their stages: bytes and patches become
// embeddings, sequences start anew, outputs are normalized, the next bytes are chosen. In each call
// a mask, or positions, tell which rows take part: where they are negative, nothing is read or
// written.
#pragma once

#include <cstdint>

#include "cuda/decode_product.h"
#include "cuda/slots.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// All rows. What is indexed by a byte is indexed by how many the row has grown by in this unit.
struct Slots {
  int64_t count = 0, num_tokens = 0;
  int64_t width = 0;     // of the local stage
  int64_t bytes = 0;     // that a unit has room for
  Slot* rows = nullptr;  // (count)
  Schedule schedule;
  // Bytes of the last patch of the first stage (count, last_size), byte n at n % last_size.
  int64_t* last_bytes = nullptr;
  int64_t last_size = 1;
  // Of a turn (stages, count): 0 where a sequence begins anew, where a patch comes to lie in the
  // cache; or -1.
  int64_t *begins = nullptr, *takes = nullptr;
  int64_t* positions = nullptr;  // (count), where a byte comes to lie in the local cache, or -1
  float* logits = nullptr;       // (count, num_tokens); those forbidden become -inf
  const float* empty_logits = nullptr;  // (num_tokens), of a row without bytes
  uint64_t* keys = nullptr;             // (count, keys_of), working memory
  // Random numbers: where the generator is, or what it gave.
  const Drawn* drawn = nullptr;    // (count, bytes)
  const float* uniform = nullptr;  // (count, bytes, num_tokens), of rows with has_numbers
  int64_t* ids = nullptr;          // (count, bytes): in, of rows that are fed; else out
  float* log_probs = nullptr;      // (count, bytes), out, of rows that ask for them
};

struct LayerNormOf {
  const float *weight = nullptr, *bias = nullptr;
  float eps = 0;
};

// A stage of theirs.
struct StageSlots {
  int64_t index = 0, dim = 0, patch_size = 1;
  int64_t limit = 0;                // tokens that the sequence has room for
  const float* table = nullptr;     // (num_tokens, width)
  const float* fixed = nullptr;     // (>= limit, dim), or null
  const float* rotation = nullptr;  // (>= limit, dim / 2, 2), or null
  float* context = nullptr;         // (slots, limit, dim), or null
  float* output = nullptr;          // (slots, dim), and before a step what is taken in
  float* workspace = nullptr;       // Units::workspace_size floats
  LayerNormOf flat_norm, norm;      // of patches, above the local stage
  // What there is after the start token: output, then the model's state.
  static constexpr int kParts = 3;
  struct Part {
    const float* from = nullptr;  // (layers, size)
    float* to = nullptr;          // (layers, slots, size)
    int64_t layers = 0, size = 0;
  } start[kParts];
};

// Which rows' patches are complete, with a byte to come, and so what is due for each stage.
Error schedule_turn(const Slots& slots, Stream stream);
// A stage's sequences begin anew.
Error begin_anew(const Slots& slots, const StageSlots& stage, Stream stream);
// Embeds the bytes that come next. is_after_turn: rows whose patch was complete have begun the
// next.
Error embed_pending(const Slots& slots, const StageSlots& local, bool is_after_turn, Stream stream);
// workspace (slots, patch_size * width) = embeddings of the last bytes, flattened and normalized.
Error embed_last_patches(const Slots& slots, const StageSlots& stage, Stream stream);
// output = output, normalized, at its place.
Error place_tokens(const Slots& slots, const StageSlots& stage, Stream stream);

// x (rows, dim) is normalized in place. positions (rows) may be null: all rows take part.
Error normalize(const RowNorm& norm, int64_t rows, int64_t dim, const int64_t* positions, float* x,
                Stream stream);

// Chooses the next byte of every row from its logits, moves the row on by one, and, if has_next,
// embeds the byte, to be taken in within the unit.
Error choose(const Slots& slots, const StageSlots& local, bool has_next, Stream stream);

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
