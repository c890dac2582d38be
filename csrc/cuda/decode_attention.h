// Attention of one position of every row to its cache, in decoding on a GPU.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace mblm::cuda {

constexpr int64_t kWidestHead = 256;
// What the product that follows attends to by itself, where it can: see Product.
constexpr int64_t kShortCache = 9, kNarrowHead = 64;

struct CachedAttention {
  int64_t rows = 0, heads = 0, head_dim = 0;   // head_dim at most kWidestHead
  const int64_t* positions = nullptr;          // (rows), of this position in the cache
  int64_t limit = 0;                           // positions that cache and angles have room for
  const float* q = nullptr;                    // (rows, heads, head_dim)
  const float* kv = nullptr;                   // (rows, 2, heads, head_dim)
  const float *cos = nullptr, *sin = nullptr;  // (>= limit, head_dim / 2), or null
  float *keys = nullptr, *values = nullptr;    // (rows, heads, capacity, head_dim)
  int64_t capacity = 0;
  float* out = nullptr;  // (rows, heads, head_dim)
  // Of a long cache, whose positions several blocks share: size_of_partial floats, and (rows,
  // heads) that are 0 before and after.
  float* partial = nullptr;
  uint32_t* tickets = nullptr;
};

int64_t size_of_partial(int64_t items, int64_t head_dim, int64_t limit);

// Appends the rotated key, and the value, and attends to all positions so far.
Error attend(const CachedAttention& attention, Stream stream);

}  // namespace mblm::cuda
