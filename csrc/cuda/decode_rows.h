// What a run on a GPU does with whole rows between the layers of its stages: bytes and patches
// become embeddings, a final norm, a sequence that starts anew.
#pragma once

#include <cstdint>

#include "cuda/decode_product.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// 1 where a run has ended: `now` as the last sampling left it, `latched` as the last byte that was
// taken in found it, which does not change while the stages above work beside the sampling.
struct Halted {
  int *now = nullptr, *latched = nullptr;
};

// Where an embedding is added to: positions and context of a stage.
struct Place {
  int64_t rows = 0, dim = 0;
  int64_t limit = 0;                // positions that there are
  int64_t* positions = nullptr;     // (rows), taken in so far; counts on
  const float* fixed = nullptr;     // (>= limit, dim), or null
  const float* rotation = nullptr;  // (>= limit, dim / 2, 2), or null
  const float* context = nullptr;   // (rows, limit, dim), or null
  float* x = nullptr;               // (rows, dim), out
};

// The bytes of the last patch of the first stage.
struct History {
  int64_t* ids = nullptr;  // (rows, size), byte n at n % size
  int64_t size = 1;
  int64_t* next = nullptr;  // (rows), where the next byte comes to lie
};

struct ByteEmbedding {
  Halted halted;
  Place place;
  History history;
  const int64_t* pending = nullptr;  // (rows)
  const float* table = nullptr;      // (num_tokens, dim)
  int64_t num_tokens = 0;
};

struct LayerNormOf {
  const float *weight = nullptr, *bias = nullptr;
  float eps = 0;
};

// out (rows, patch_size * width): embeddings of the last bytes, flattened and normalized.
struct PatchGathering {
  int64_t rows = 0, patch_size = 1, width = 0, num_tokens = 0;
  History history;
  const float* table = nullptr;  // (num_tokens, width)
  LayerNormOf norm;
  float* out = nullptr;
};

// place.x, normalized, at its place.
struct PatchPlacing {
  const int* halted = nullptr;
  Place place;
  LayerNormOf norm;
};

struct FinalNorm {
  int64_t rows = 0, dim = 0;
  const int* halted = nullptr;
  const int64_t* positions = nullptr;  // (rows), negative where nothing is written; or null
  RowNorm norm;
  float* x = nullptr;  // (rows, dim), in place
};

// Copies of what a stage's state was after its start token.
struct Restart {
  static constexpr int kParts = 3;

  const int* halted = nullptr;
  struct Part {
    const float* from = nullptr;
    float* to = nullptr;
    int64_t size = 0;
  } parts[kParts];
  int64_t rows = 0;
  int64_t* positions = nullptr;  // (rows), set to 0
};

// Takes in the pending byte, and latches whether the run has ended.
Error embed_byte(const ByteEmbedding& embedding, Stream stream);
// The first kernel of its unit: it does not begin early.
Error gather_patches(const PatchGathering& gathering, Stream stream);
Error place_patches(const PatchPlacing& placing, Stream stream);
Error normalize(const FinalNorm& norm, Stream stream);
Error restart(const Restart& restart, Stream stream);

}  // namespace mblm::cuda
