// Attention of one position to a cache: see decode_attention.h.
//
// A block takes a part of the positions, for a head of a row. Its warps take them in turns,
// kTogether at a time, each with a softmax of its own. Softmaxes are put together in one order:
// those of the warps by their block, those of the parts by the block that is done last. How
// positions are divided depends on nothing but how many there are.
#include <cfloat>
#include <cmath>

#include "cuda/attend_short.cuh"

namespace mblm::cuda {
namespace {

constexpr int kTogether = 4;
constexpr int64_t kFewest = 64, kMostParts = 64;  // positions of a part, parts of a row

MBLM_DEVICE int64_t part_size(int64_t positions) {
  int64_t size = kFewest;
  while (size * kMostParts < positions) size *= 2;
  return size;
}

int64_t most_parts(int64_t limit) {
  const int64_t parts = (limit + kFewest - 1) / kFewest;
  return parts < kMostParts ? parts : kMostParts;
}

// A softmax (dim + 2): values times weights, summed; the highest score, by which weights are
// divided; the sum of weights.
MBLM_DEVICE int size_of_record(int64_t dim) {
  return int(dim) + 2;
}

// Calls write(c, sum, weight, top) with the components of several softmaxes put together.
template <class Write>
MBLM_DEVICE void combine(const float* records, int count, int dim, Write write) {
  const int size = size_of_record(dim);
  float top = -INFINITY;
  for (int i = 0; i < count; ++i) top = fmaxf(top, records[i * size + dim]);
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    float sum = 0, weight = 0;
    MBLM_UNROLL
    for (int i = 0; i < count; ++i) {
      const float* const record = records + i * size;
      const float scale = expf(record[dim] - top);
      sum += scale * record[c];
      weight += scale * record[dim + 1];
    }
    write(c, sum, weight, top);
  }
}

// Whether all other blocks of a group of so many have written what they were to.
MBLM_DEVICE bool is_last(uint32_t* ticket, int64_t count, bool* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicInc(ticket, uint32_t(count - 1)) == uint32_t(count - 1);
  __syncthreads();
  __threadfence();
  return *shared;
}

// kOwn components in each lane: lane, lane + 32, ...
template <int kOwn>
__global__ void __launch_bounds__(kThreads) cached_attention(CachedAttention in, int64_t most) {
  release_dependents();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, dim = int(in.head_dim);
  float* const query = shared_memory<float>();  // (dim)
  float* const records = query + dim;           // (kWarps, dim + 2)
  bool* const flag = reinterpret_cast<bool*>(records + kWarps * size_of_record(dim));
  wait_for_inputs();
  const float scale = 1 / sqrtf(float(dim));
  const int64_t items = in.rows * in.heads;
  for (int64_t block = blockIdx.x; block < items * most; block += gridDim.x) {
    const int64_t part = quotient(block, items), item = block - part * items;
    const int64_t row = quotient(item, in.heads), head = item - row * in.heads;
    const int64_t position = in.positions[row];
    if (position < 0 || position >= in.limit) continue;  // there is no room
    const int64_t size = part_size(position + 1), begin = part * size;
    if (begin > position) continue;
    const int64_t parts = quotient(position, size) + 1;
    const int count = int(part + 1 < parts ? size : position - begin + 1);
    const int64_t width = in.heads * dim, first_of_part = (item * in.capacity + begin) * dim;
    float* const keys = in.keys + first_of_part;
    float* const values = in.values + first_of_part;
    const float* const k = in.kv + row * 2 * width + head * dim;
    for (int c = threadIdx.x; c < dim; c += kThreads) {
      query[c] = rotated(in, in.q + row * width + head * dim, c, position) * scale;
      if (part + 1 < parts) continue;
      keys[(position - begin) * dim + c] = rotated(in, k, c, position);
      values[(position - begin) * dim + c] = k[width + c];
    }
    __syncthreads();
    // From a number on, as nothing can be subtracted from an infinite one: scores may be infinite.
    float own[kOwn] = {}, top = -FLT_MAX, weight_sum = 0;
    for (int first = warp; first < count; first += kWarps * kTogether) {
      float key[kTogether][kOwn], value[kTogether][kOwn], scores[kTogether];
      MBLM_UNROLL_ALL
      for (int t = 0; t < kTogether; ++t) {
        const int at = first + t * kWarps;
        MBLM_UNROLL_ALL
        for (int i = 0; i < kOwn; ++i) {
          const int c = lane + i * kWarp;
          const bool is_there = c < dim && at < count;
          key[t][i] = is_there ? keys[int64_t(at) * dim + c] : 0;
          value[t][i] = is_there ? values[int64_t(at) * dim + c] : 0;
        }
      }
      float new_top = top;
      MBLM_UNROLL_ALL
      for (int t = 0; t < kTogether; ++t) {
        float score = 0;
        MBLM_UNROLL_ALL
        for (int i = 0; i < kOwn; ++i) {
          const int c = lane + i * kWarp;
          if (c < dim) score += query[c] * key[t][i];
        }
        score = warp_sum(score);
        scores[t] = first + t * kWarps < count ? score : -INFINITY;
        new_top = fmaxf(new_top, scores[t]);
      }
      const float fade = expf(top - new_top);
      weight_sum *= fade;
      MBLM_UNROLL_ALL
      for (int i = 0; i < kOwn; ++i) own[i] *= fade;
      MBLM_UNROLL_ALL
      for (int t = 0; t < kTogether; ++t) {
        const float weight = expf(scores[t] - new_top);
        weight_sum += weight;
        MBLM_UNROLL_ALL
        for (int i = 0; i < kOwn; ++i) own[i] += weight * value[t][i];
      }
      top = new_top;
    }
    float* const record = records + warp * size_of_record(dim);
    MBLM_UNROLL_ALL
    for (int i = 0; i < kOwn; ++i) {
      const int c = lane + i * kWarp;
      if (c < dim) record[c] = own[i];
    }
    if (lane == 0) {
      record[dim] = top;
      record[dim + 1] = weight_sum;
    }
    __syncthreads();
    float* const out = in.out + row * width + head * dim;
    const auto finish = [&](int c, float sum, float weight, float) { out[c] = sum / weight; };
    if (parts == 1) {
      combine(records, kWarps, dim, finish);
    } else {
      float* const of_item = in.partial + item * most * size_of_record(dim);
      float* const of_part = of_item + part * size_of_record(dim);
      combine(records, kWarps, dim, [&](int c, float sum, float weight, float top) {
        of_part[c] = sum;
        if (c > 0) return;
        of_part[dim] = top;
        of_part[dim + 1] = weight;
      });
      if (is_last(in.tickets + item, parts, flag)) combine(of_item, int(parts), dim, finish);
    }
    __syncthreads();
  }
}

template <int kOwn>
Error launch_attention(const CachedAttention& in, Stream stream) {
  constexpr int64_t kMostBlocks = 2048;  // of which some have nothing to do
  const int64_t floats = in.head_dim + kWarps * (in.head_dim + 2) + 1;
  const int64_t most = most_parts(in.limit), blocks = in.rows * in.heads * most;
  return launch_dependent(cached_attention<kOwn>, blocks < kMostBlocks ? blocks : kMostBlocks,
                          kThreads, size_t(floats) * sizeof(float), stream, in, most);
}

}  // namespace

int64_t size_of_partial(int64_t items, int64_t head_dim, int64_t limit) {
  return limit <= kFewest ? 0 : items * most_parts(limit) * (head_dim + 2);
}

Error attend(const CachedAttention& in, Stream stream) {
  if (in.head_dim > kWidestHead) return "heads are too wide";
  if (in.head_dim <= 2 * kWarp) return launch_attention<2>(in, stream);
  return launch_attention<int(kWidestHead) / kWarp>(in, stream);
}

}  // namespace mblm::cuda
