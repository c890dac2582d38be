// What kernels that take a row per block compute: sums over it, LayerNorm, a token at its place, an
// embedding.
#pragma once

#include <cmath>

#include "cuda/decode.cuh"
#include "cuda/decode_slots.h"
#include "cuda/kernel.cuh"

namespace mblm::cuda {

// The same sum in every thread of a block, whose threads all call it.
MBLM_DEVICE float block_sum(float value, float* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  __syncthreads();
  return sum;
}

struct Moments {
  float mean, factor;
};

// What LayerNorm divides and subtracts; value(i) for i < count is computed twice.
template <class Value>
MBLM_DEVICE Moments moments(int64_t count, float eps, float* shared, Value value) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += value(i);
  const float mean = block_sum(sum, shared) / float(count);
  float squares = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const float centered = value(i) - mean;
    squares += centered * centered;
  }
  return {mean, 1 / sqrtf(block_sum(squares, shared) / float(count) + eps)};
}

MBLM_DEVICE float normalized(const LayerNormOf& norm, const Moments& of, int64_t i, float value) {
  return (value - of.mean) * of.factor * norm.weight[i] + norm.bias[i];
}

// value(i) for i < dim, at its place in a row. Values of a pair may be read after one was written
// only if value() does not read the output.
template <class Value>
MBLM_DEVICE float placed(const StageSlots& in, int64_t row, int64_t position, int64_t i,
                         Value value) {
  float result = value(i);
  if (in.rotation) {
    const float* angle = in.rotation + position * in.dim + (i & ~int64_t(1));
    const float other = value(i ^ 1);
    result = i % 2 ? result * angle[0] + other * angle[1] : result * angle[0] - other * angle[1];
  }
  if (in.fixed) result += in.fixed[position * in.dim + i];
  if (in.context) result += in.context[(row * in.limit + position) * in.dim + i];
  return result;
}

MBLM_DEVICE bool is_id(int64_t id, int64_t num_tokens) {
  return id >= 0 && id < num_tokens;
}

MBLM_DEVICE int64_t remainder(int64_t a, int64_t b) {
  return a - quotient(a, b) * b;
}

// Bytes of a local sequence.
MBLM_DEVICE int64_t local_span(const Schedule& schedule) {
  return schedule.patch_sizes[schedule.stages - 2];
}

// Whether something other than the local stage is due before the next byte.
MBLM_DEVICE bool is_at_turn(const Schedule& schedule, int64_t taken) {
  return schedule.stages > 1 ? remainder(taken, local_span(schedule)) == 0 : taken == 0;
}

// Embeds a row's pending byte, if it is to be taken in.
MBLM_DEVICE void embed_byte(const Slots& in, const StageSlots& local, bool is_after_turn,
                            int64_t row) {
  const Slot& of = in.rows[row];
  const int64_t taken = of.taken, id = of.pending;
  const bool goes_on = is_after_turn || !is_at_turn(in.schedule, taken);
  int64_t position = in.schedule.stages > 1 ? remainder(taken, local_span(in.schedule)) : taken;
  if (of.left <= 0 || id < 0 || !goes_on || position >= local.limit) position = -1;
  if (threadIdx.x == 0) in.positions[row] = position < 0 ? -1 : 1 + position;
  if (position < 0) return;
  if (threadIdx.x == 0) in.last_bytes[row * in.last_size + remainder(taken, in.last_size)] = id;
  const float* const embedding = is_id(id, in.num_tokens) ? local.table + id * local.dim : nullptr;
  MBLM_UNROLL
  for (int64_t i = threadIdx.x; i < local.dim; i += kThreads) {
    const auto value = [&](int64_t i) { return embedding ? embedding[i] : 0; };
    local.output[row * local.dim + i] = placed(local, row, position, i, value);
  }
}

}  // namespace mblm::cuda
