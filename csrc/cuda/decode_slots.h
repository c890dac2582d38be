// What is done with rows in slots between the layers of their stages: bytes and patches become
// embeddings, sequences start anew. In each call a mask, or positions, tell which rows take part:
// where they are negative, nothing is read or written.
#pragma once

#include <cstdint>

#include "cuda/decode_rows.h"
#include "cuda/slots.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// Which rows' patches are complete, with a byte to come, and so what is due for each stage.
struct Turn {
  int64_t slots = 0;
  const Slot* rows = nullptr;  // (slots)
  Schedule schedule;
  int64_t* begins = nullptr;  // (stages, slots), out: 0 where a sequence begins anew, or -1
  int64_t* takes = nullptr;  // (stages, slots), out: where a patch comes to lie in the cache, or -1
};

// Bytes of the last patch of the first stage.
struct Bytes {
  int64_t* ids = nullptr;  // (slots, size), byte n at n % size
  int64_t size = 1;
};

// Where embeddings are added to: a stage's tokens and its context.
struct Tokens {
  int64_t slots = 0, dim = 0;
  int64_t limit = 0;                // that there are
  const float* fixed = nullptr;     // (>= limit, dim), or null
  const float* rotation = nullptr;  // (>= limit, dim / 2, 2), or null
  const float* context = nullptr;   // (slots, limit, dim), or null
  float* x = nullptr;               // (slots, dim), out
};

struct PendingBytes {
  Tokens tokens;
  const Slot* rows = nullptr;
  Schedule schedule;
  bool is_after_turn = false;  // rows whose patch was complete have begun the next
  Bytes bytes;
  const float* table = nullptr;  // (num_tokens, dim)
  int64_t num_tokens = 0;
  int64_t* positions = nullptr;  // (slots), out: where the byte comes to lie in the cache, or -1
};

// out (slots, patch_size * width): embeddings of the last bytes, flattened and normalized.
struct LastPatches {
  int64_t slots = 0, patch_size = 1, width = 0, num_tokens = 0;
  const int64_t* positions = nullptr;  // (slots)
  const Slot* rows = nullptr;
  Bytes bytes;
  const float* table = nullptr;  // (num_tokens, width)
  LayerNormOf norm;
  float* out = nullptr;
};

// tokens.x, normalized, at its place.
struct PatchTokens {
  Tokens tokens;
  const int64_t* positions = nullptr;  // (slots), in the cache
  LayerNormOf norm;
};

// Copies, into slots, of what a stage's state is after its start token.
struct Beginning {
  static constexpr int kParts = 3;

  int64_t slots = 0;
  const int64_t* begins = nullptr;  // (slots)
  struct Part {
    const float* from = nullptr;  // (layers, size)
    float* to = nullptr;          // (layers, slots, size)
    int64_t layers = 0, size = 0;
  } parts[kParts];
};

Error schedule_turn(const Turn& turn, Stream stream);
Error embed_pending(const PendingBytes& bytes, Stream stream);
Error embed_last_patches(const LastPatches& patches, Stream stream);
Error place_tokens(const PatchTokens& tokens, Stream stream);
Error begin_anew(const Beginning& beginning, Stream stream);

}  // namespace mblm::cuda
