// Attention of one position of a few rows to a short cache, computed by each cluster for itself as
// it begins: see decode_attention.h.
//
// A warp takes a head of a row, of which each lane has kOwn components. What it reads is requested
// at once.
#pragma once

#include <cmath>

#include "cuda/cluster.cuh"
#include "cuda/decode.cuh"
#include "cuda/decode_attention.h"

namespace mblm::cuda {

// Component c of a vector whose halves are rotated.
MBLM_DEVICE float rotated(const CachedAttention& in, const float* x, int c, int64_t position) {
  if (!in.cos) return x[c];
  const int half = int(in.head_dim / 2), i = c < half ? c : c - half;
  const float cos = in.cos[position * half + i], sin = in.sin[position * half + i];
  return c < half ? x[c] * cos - x[c + half] * sin : x[c] * cos + x[i] * sin;
}

// Attention of an item, a head of a row: components lane, lane + 32, ...; the cache gets the
// position, if it is to.
template <int kOwn>
MBLM_DEVICE void attend_of_head(const CachedAttention& in, int64_t item, int64_t row,
                                int64_t position, bool keeps, float (&out)[kOwn]) {
  constexpr int kMost = int(kShortCache);
  const int lane = threadIdx.x % kWarp, dim = int(in.head_dim), last = int(position);
  const float* const q = in.q + item * dim;
  const float* const k = in.kv + (row * in.heads + item) * dim;
  const float* const v = k + in.heads * dim;
  float* const keys = in.keys + item * in.capacity * dim;
  float* const values = in.values + item * in.capacity * dim;
  float scores[kMost] = {}, value[kMost][kOwn] = {};
  MBLM_UNROLL_ALL
  for (int i = 0; i < kOwn; ++i) {
    const int c = lane + i * kWarp;
    if (c >= dim) continue;
    const float query = rotated(in, q, c, position), key = rotated(in, k, c, position);
    MBLM_UNROLL_ALL
    for (int t = 0; t < kMost; ++t) {
      scores[t] += query * (t < last ? keys[t * dim + c] : key);
      value[t][i] = t < last ? values[t * dim + c] : v[c];
    }
    if (keeps) {
      keys[position * dim + c] = key;
      values[position * dim + c] = v[c];
    }
  }
  const float scale = 1 / sqrtf(float(dim));
  float top = -INFINITY, weights = 0;
  MBLM_UNROLL_ALL
  for (int t = 0; t < kMost; ++t) {
    scores[t] = t <= last ? warp_sum(scores[t]) * scale : -INFINITY;
    top = fmaxf(top, scores[t]);
  }
  MBLM_UNROLL_ALL
  for (int i = 0; i < kOwn; ++i) out[i] = 0;
  MBLM_UNROLL_ALL
  for (int t = 0; t < kMost; ++t) {
    const float weight = expf(scores[t] - top);
    weights += weight;
    MBLM_UNROLL_ALL
    for (int i = 0; i < kOwn; ++i) out[i] += weight * value[t][i];
  }
  MBLM_UNROLL_ALL
  for (int i = 0; i < kOwn; ++i) out[i] /= weights;
}

// All rows' heads, in every block's shared memory (rows, heads, head_dim).
template <int kOwn>
MBLM_DEVICE void attend_in_cluster(const CachedAttention& in, float* attended) {
  const int ranks = cluster_size(), dim = int(in.head_dim), heads = int(in.heads);
  for (int item = cluster_rank() * kWarps + int(threadIdx.x) / kWarp; item < int(in.rows) * heads;
       item += ranks * kWarps) {
    const int row = item / heads;
    const int64_t position = in.positions[row];
    const bool is_there = position >= 0 && position < in.limit;
    float out[kOwn] = {};
    if (is_there) attend_of_head(in, item, row, position, int(blockIdx.x) < ranks, out);
    MBLM_UNROLL_ALL
    for (int i = 0; i < kOwn; ++i) {
      const int c = int(threadIdx.x) % kWarp + i * kWarp;
      for (int r = 0; r < ranks && c < dim; ++r) {
        store_to_rank(attended + item * dim + c, r, out[i]);
      }
    }
  }
  cluster_barrier();
}

}  // namespace mblm::cuda
