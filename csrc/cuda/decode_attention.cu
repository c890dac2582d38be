// Attention of one position to a cache: see decode_attention.h.
//
// A block takes a head of a row. Its warps take positions in turns, kTogether at a time, each with
// a softmax of its own, whose sums are put together at the end in one order.
#include <cmath>

#include "cuda/decode.cuh"
#include "cuda/decode_attention.h"
#include "cuda/kernel.cuh"

namespace mblm::cuda {
namespace {

constexpr int kTogether = 4;

// Component c of a vector whose halves are rotated.
MBLM_DEVICE float rotated(const CachedAttention& in, const float* x, int c, int64_t position) {
  if (!in.cos) return x[c];
  const int half = int(in.head_dim / 2), i = c < half ? c : c - half;
  const float cos = in.cos[position * half + i], sin = in.sin[position * half + i];
  return c < half ? x[c] * cos - x[c + half] * sin : x[c] * cos + x[i] * sin;
}

// kOwn components in each lane: lane, lane + 32, ...
template <int kOwn>
__global__ void __launch_bounds__(kThreads) cached_attention(CachedAttention in) {
  release_dependents();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, dim = int(in.head_dim);
  float* const query = shared_memory<float>();  // (dim)
  float* const sums = query + dim;              // (kWarps, dim)
  float* const highest = sums + kWarps * dim;   // (kWarps)
  float* const weights = highest + kWarps;      // (kWarps)
  wait_for_inputs();
  const float scale = 1 / sqrtf(float(dim));
  for (int64_t item = blockIdx.x; item < in.rows * in.heads; item += gridDim.x) {
    const int64_t row = item / in.heads, head = item % in.heads, position = in.positions[row];
    if (position < 0 || position >= in.limit) continue;  // there is no room
    const int64_t width = in.heads * dim;
    float* const keys = in.keys + item * in.capacity * dim;
    float* const values = in.values + item * in.capacity * dim;
    const float* const k = in.kv + row * 2 * width + head * dim;
    for (int c = threadIdx.x; c < dim; c += kThreads) {
      query[c] = rotated(in, in.q + row * width + head * dim, c, position) * scale;
      keys[position * dim + c] = rotated(in, k, c, position);
      values[position * dim + c] = k[width + c];
    }
    __syncthreads();
    float own[kOwn] = {}, top = -INFINITY, weight_sum = 0;
    for (int64_t first = warp; first <= position; first += kWarps * kTogether) {
      float scores[kTogether];
      MBLM_UNROLL_ALL
      for (int t = 0; t < kTogether; ++t) {
        const int64_t at = first + t * kWarps;
        float score = 0;
        MBLM_UNROLL_ALL
        for (int i = 0; i < kOwn; ++i) {
          const int c = lane + i * kWarp;
          if (c < dim && at <= position) score += query[c] * keys[at * dim + c];
        }
        scores[t] = score;
      }
      float new_top = top;
      MBLM_UNROLL_ALL
      for (int t = 0; t < kTogether; ++t) {
        const float score = warp_sum(scores[t]);
        scores[t] = first + t * kWarps <= position ? score : -INFINITY;
        new_top = fmaxf(new_top, scores[t]);
      }
      const float fade = expf(top - new_top);
      weight_sum *= fade;
      MBLM_UNROLL_ALL
      for (int i = 0; i < kOwn; ++i) own[i] *= fade;
      MBLM_UNROLL_ALL
      for (int t = 0; t < kTogether; ++t) {
        const int64_t at = first + t * kWarps;
        if (at > position) continue;
        const float weight = expf(scores[t] - new_top);
        weight_sum += weight;
        MBLM_UNROLL_ALL
        for (int i = 0; i < kOwn; ++i) {
          const int c = lane + i * kWarp;
          if (c < dim) own[i] += weight * values[at * dim + c];
        }
      }
      top = new_top;
    }
    MBLM_UNROLL_ALL
    for (int i = 0; i < kOwn; ++i) {
      const int c = lane + i * kWarp;
      if (c < dim) sums[warp * dim + c] = own[i];
    }
    if (lane == 0) {
      highest[warp] = top;
      weights[warp] = weight_sum;
    }
    __syncthreads();
    // The first warp has a position at least, so that the highest of all is a number.
    float all_top = -INFINITY;
    for (int w = 0; w < kWarps; ++w) all_top = fmaxf(all_top, highest[w]);
    for (int c = threadIdx.x; c < dim; c += kThreads) {
      float sum = 0, weight = 0;
      for (int w = 0; w < kWarps; ++w) {
        const float part = expf(highest[w] - all_top);
        sum += part * sums[w * dim + c];
        weight += part * weights[w];
      }
      in.out[row * width + head * dim + c] = sum / weight;
    }
    __syncthreads();
  }
}

template <int kOwn>
Error launch_attention(const CachedAttention& in, Stream stream) {
  const size_t shared_bytes = size_t((1 + kWarps) * in.head_dim + 2 * kWarps) * sizeof(float);
  return launch_dependent(cached_attention<kOwn>, in.rows * in.heads, kThreads, shared_bytes,
                          stream, in);
}

}  // namespace

Error attend(const CachedAttention& in, Stream stream) {
  if (in.head_dim > kWidestHead) return "heads are too wide";
  if (in.head_dim <= 2 * kWarp) return launch_attention<2>(in, stream);
  return launch_attention<int(kWidestHead) / kWarp>(in, stream);
}

}  // namespace mblm::cuda
