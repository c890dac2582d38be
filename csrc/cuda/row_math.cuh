// What kernels that take a row per block compute: sums over it, LayerNorm, a token at its place.
#pragma once

#include <cmath>

#include "cuda/decode.cuh"
#include "cuda/decode_rows.h"
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
// only if value() does not read x.
template <class Value>
MBLM_DEVICE float placed(const Tokens& in, int64_t row, int64_t position, int64_t i, Value value) {
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

}  // namespace mblm::cuda
