// Draws the next byte of every row: see decode_sample.h.
//
// A block takes a row. A token's rank is how many come before it, which for the few hundred tokens
// of a byte model is counted quicker than sorted. What depends on the order of sums, the mass of
// the likeliest, one thread computes as the CPU does.
#include <cmath>

#include "cuda/decode_sample.h"
#include "cuda/kernel.cuh"

namespace mblm::cuda {
namespace {

MBLM_DEVICE float bounded_log(float x) {
  return logf(fmaxf(x, 1e-20f));
}

// NaN counts as the highest, as it does in torch; ties go to the lower id.
MBLM_DEVICE bool is_before(const float* logits, int64_t a, int64_t b) {
  const float one = logits[a], other = logits[b];
  const bool one_nan = one != one, other_nan = other != other;
  if (one_nan || other_nan) return one_nan != other_nan ? one_nan : a < b;
  return one != other ? one > other : a < b;
}

MBLM_DEVICE int64_t rank_of(const float* logits, int64_t token, int64_t num_tokens) {
  int64_t rank = 0;
  MBLM_UNROLL
  for (int64_t other = 0; other < num_tokens; ++other) rank += is_before(logits, other, token);
  return rank;
}

// A token that may be drawn, and its value.
struct Candidate {
  float value;
  int64_t token;

  MBLM_DEVICE void take(float other_value, int64_t other) {
    if (other_value > value || (other_value == value && other < token)) {
      value = other_value;
      token = other;
    }
  }
};

// How many of the ordered tokens are kept by top_p, from their logits.
MBLM_DEVICE int64_t count_of_mass(const float* ordered, int64_t num_tokens, float temperature,
                                  float top_p) {
  const float highest = ordered[0] / temperature;
  float sum = 0, mass = 0;
  for (int64_t i = 0; i < num_tokens; ++i) sum += expf(ordered[i] / temperature - highest);
  int64_t count = 0;
  for (; count < num_tokens && (count == 0 || mass < top_p); ++count) {
    mass += expf(ordered[count] / temperature - highest) / sum;
  }
  return count;
}

// Shared memory: a candidate per thread, the number of kept tokens, the first in the order.
struct Shared {
  Candidate candidates[kThreads];
  int64_t kept, first;
};

__global__ void __launch_bounds__(kThreads) sample_rows(SampleRows in) {
  release_dependents();
  Shared& shared = *shared_memory<Shared>();
  wait_for_inputs();
  const bool is_halted = *in.halted.latched;
  const float temperature = in.settings[0], top_p = in.settings[1];
  const int64_t count = in.num_tokens;
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    if (is_halted) {
      if (threadIdx.x == 0) in.ids[row] = -1;
      continue;
    }
    const float* const logits = in.logits + row * count;
    const float* const uniform = in.uniform + row * count;
    float* const ranks = in.ordered + row * 2 * count;  // of this thread's tokens
    float* const ordered = ranks + count;
    int64_t kept = int64_t(in.settings[2]);
    kept = kept < count ? kept : count;
    const bool has_order = top_p > 0 || kept < count;
    if (threadIdx.x == 0) shared.first = 0;
    __syncthreads();
    if (has_order) {
      for (int64_t token = threadIdx.x; token < count; token += kThreads) {
        const int64_t rank = rank_of(logits, token, count);
        ranks[token] = float(rank);
        if (rank == 0) shared.first = token;
        if (top_p > 0) ordered[rank] = logits[token];
      }
      __syncthreads();
      if (top_p > 0) {
        if (threadIdx.x == 0) shared.kept = count_of_mass(ordered, count, temperature, top_p);
        __syncthreads();
        kept = shared.kept;
      }
    }
    Candidate best = {-INFINITY, shared.first};
    if (kept > 1) {
      for (int64_t token = threadIdx.x; token < count; token += kThreads) {
        if (has_order && ranks[token] >= float(kept)) continue;
        best.take(logits[token] / temperature - bounded_log(-bounded_log(uniform[token])), token);
      }
    }
    shared.candidates[threadIdx.x] = best;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (int(threadIdx.x) < half) {
        const Candidate other = shared.candidates[threadIdx.x + half];
        shared.candidates[threadIdx.x].take(other.value, other.token);
      }
    }
    if (threadIdx.x == 0) {
      const int64_t id = shared.candidates[0].token;
      in.pending[row] = id;
      in.ids[row] = id;
      if (in.ends[id]) *in.halted.now = 1;
    }
    __syncthreads();
  }
}

}  // namespace

Error sample(const SampleRows& in, Stream stream) {
  if (in.num_tokens < 1) return "there must be a token to sample";
  return launch_dependent(sample_rows, in.rows, kThreads, sizeof(Shared), stream, in);
}

}  // namespace mblm::cuda
