// Chooses the next byte of every row: see decode_choose.h.
//
// A block takes a row. A token's rank is how many come before it, which for the few hundred tokens
// of a byte model is counted quicker than sorted. What depends on the order of sums, the mass of
// the likeliest, one thread adds up as the CPU does.
#include <cmath>

#include "cuda/decode_choose.h"
#include "cuda/kernel.cuh"
#include "cuda/philox.h"

namespace mblm::cuda {
namespace {

MBLM_DEVICE float bounded_log(float x) {
  return logf(fmaxf(x, 1e-20f));
}

// NaN counts as the highest, as it does in torch; ties go to the lower id.
MBLM_DEVICE bool is_before(float one, int64_t a, float other, int64_t b) {
  const bool one_nan = one != one, other_nan = other != other;
  if (one_nan || other_nan) return one_nan != other_nan ? one_nan : a < b;
  return one != other ? one > other : a < b;
}

MBLM_DEVICE int64_t rank_of(const float* logits, int64_t token, int64_t num_tokens) {
  const float own = logits[token];
  int64_t rank = 0;
  MBLM_UNROLL
  for (int64_t other = 0; other < num_tokens; ++other) {
    rank += is_before(logits[other], other, own, token);
  }
  return rank;
}

// A token, and what it is compared by.
struct Candidate {
  float value;
  int64_t token;

  MBLM_DEVICE void take(float other_value, int64_t other) {
    const bool is_first = is_before(other_value, other, value, token);
    value = is_first ? other_value : value;
    token = is_first ? other : token;
  }
};

struct Shared {
  Candidate candidates[kThreads];
  float sums[kThreads];
  int64_t kept;
};

// The candidate of all threads that comes first, in each of them.
MBLM_DEVICE Candidate first_of_all(const Candidate& own, Shared& shared) {
  __syncthreads();
  shared.candidates[threadIdx.x] = own;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      const Candidate other = shared.candidates[threadIdx.x + half];
      shared.candidates[threadIdx.x].take(other.value, other.token);
    }
  }
  __syncthreads();
  return shared.candidates[0];
}

// The likeliest token, in each thread.
MBLM_DEVICE Candidate likeliest(const float* logits, int64_t count, Shared& shared) {
  Candidate own = {-INFINITY, count};
  for (int64_t token = threadIdx.x; token < count; token += kThreads)
    own.take(logits[token], token);
  return first_of_all(own, shared);
}

// The logarithm of the sum of exponentials, in each thread.
MBLM_DEVICE float log_sum(const float* logits, int64_t count, float highest, Shared& shared) {
  float sum = 0;
  for (int64_t token = threadIdx.x; token < count; token += kThreads) {
    sum += expf(logits[token] - highest);
  }
  __syncthreads();
  shared.sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared.sums[threadIdx.x] += shared.sums[threadIdx.x + half];
  }
  __syncthreads();
  return highest + logf(shared.sums[0]);
}

MBLM_DEVICE int64_t next_state(const Automaton& automaton, int64_t of_class) {
  return automaton.next[automaton.state * automaton.num_classes + of_class];
}

// Whether tokens of a class may come next, with so many to come, this one included: where
// acceptance can be reached with so many, it stays reachable.
MBLM_DEVICE bool is_allowed(const Automaton& automaton, int64_t of_class, int64_t left) {
  const int64_t next = next_state(automaton, of_class);
  return next >= 0 &&
         (automaton.distance[automaton.state] > left || automaton.distance[next] <= left - 1);
}

// Where an automaton is after a token.
MBLM_DEVICE int64_t state_after(const Automaton& automaton, int64_t token) {
  const int64_t next = next_state(automaton, automaton.classes[token]);
  return next < 0 ? automaton.state : next;
}

// Whether anything may come next, in each thread.
MBLM_DEVICE bool allows_any(const Automaton& automaton, int64_t left, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.kept = 0;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < automaton.num_classes; c += kThreads) {
    if (is_allowed(automaton, c, left)) shared.kept = 1;
  }
  __syncthreads();
  return shared.kept > 0;
}

// How many of the ordered tokens are kept by top_p; weights (num_tokens) is working memory.
MBLM_DEVICE int64_t count_of_mass(const float* ordered, float* weights, int64_t count,
                                  float temperature, float top_p, Shared& shared) {
  const float highest = ordered[0] / temperature;
  __syncthreads();  // weights may be what is ordered
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    weights[i] = expf(ordered[i] / temperature - highest);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0, mass = 0;
    MBLM_UNROLL
    for (int64_t i = 0; i < count; ++i) sum += weights[i];
    int64_t kept = 0;
    for (; kept < count && (kept == 0 || mass < top_p); ++kept) mass += weights[kept] / sum;
    shared.kept = kept;
  }
  __syncthreads();
  return shared.kept;
}

// A row's next byte, in each thread.
MBLM_DEVICE int64_t choose_of_row(const Choice& in, const Slot& row, int64_t index,
                                  const float* logits, Shared& shared) {
  const int64_t count = in.num_tokens, at = index * in.bytes + row.done;
  const Candidate first = likeliest(logits, count, shared);
  if (first.value == -INFINITY && row.allow.classes) {  // the model rules out all that is allowed
    Candidate allowed = {-INFINITY, count};
    for (int64_t token = threadIdx.x; token < count; token += kThreads) {
      if (is_allowed(row.allow, row.allow.classes[token], row.planned)) allowed.take(0, token);
    }
    return first_of_all(allowed, shared).token;
  }
  int64_t kept = row.top_k < count ? row.top_k : count;
  if (kept <= 1 && !(row.top_p > 0)) return first.token;
  float* const ranks = in.ordered + index * 2 * count;  // of this thread's tokens
  float* const ordered = ranks + count;
  const bool has_order = row.top_p > 0 || kept < count;
  if (has_order) {
    for (int64_t token = threadIdx.x; token < count; token += kThreads) {
      const int64_t rank = rank_of(logits, token, count);
      ranks[token] = float(rank);
      ordered[rank] = logits[token];
    }
    __syncthreads();
  }
  if (row.top_p > 0) {
    kept = count_of_mass(ordered, ordered, count, row.temperature, row.top_p, shared);
  }
  Candidate best = {-INFINITY, first.token};
  const float highest = first.value / row.temperature;
  for (int64_t token = threadIdx.x; token < count; token += kThreads) {
    if (has_order && ranks[token] >= float(kept)) continue;
    const float value = logits[token] / row.temperature;
    if (row.min_p > 0 && expf(value - highest) < row.min_p) continue;
    const float number = row.has_numbers
                             ? in.uniform[at * count + token]
                             : uniform_number(in.drawn[at].seed, in.drawn[at].offset, row.threads,
                                              row.first_number + uint32_t(token));
    best.take(value - bounded_log(-bounded_log(number)), token);
  }
  return first_of_all(best, shared).token;
}

__global__ void __launch_bounds__(kThreads) choose_of_rows(Choice in) {
  release_dependents();
  Shared& shared = *shared_memory<Shared>();
  wait_for_inputs();
  const int64_t count = in.num_tokens;
  for (int64_t index = blockIdx.x; index < in.slots; index += gridDim.x) {
    const Slot& row = in.rows[index];
    const bool has_stepped = in.positions[index] >= 0;
    if (row.left <= 0 || row.done >= in.bytes || (row.pending >= 0 && !has_stepped)) continue;
    const int64_t at = index * in.bytes + row.done;
    float* const logits = in.logits + index * count;
    int64_t id = -1;
    float log_prob = 0;
    if (row.way == Way::kFeed) id = in.ids[at];
    if (row.way == Way::kChoose) {
      if (row.taken == 0 && !has_stepped) {
        for (int64_t token = threadIdx.x; token < count; token += kThreads) {
          logits[token] = in.empty_logits[token];
        }
        __syncthreads();
      }
      float sum = 0;
      if (row.has_log_probs) {
        sum = log_sum(logits, count, likeliest(logits, count, shared).value, shared);
      }
      if (row.allow.classes) {
        for (int64_t token = threadIdx.x; token < count; token += kThreads) {
          if (!is_allowed(row.allow, row.allow.classes[token], row.planned))
            logits[token] = -INFINITY;
        }
        __syncthreads();
      }
      id = choose_of_row(in, row, index, logits, shared);
      log_prob = logits[id] - sum;
    }
    __syncthreads();
    const int64_t planned = row.planned - 1;
    bool is_over = id < 0 || row.left <= 1;
    if (row.way == Way::kChoose) {
      Slot& to = in.rows[index];
      if (threadIdx.x == 0) {
        if (to.allow.classes) to.allow.state = state_after(to.allow, id);
        if (to.stop.classes) to.stop.state = state_after(to.stop, id);
      }
      __syncthreads();
      const bool stops = to.stop.classes && to.stop.distance[to.stop.state] == 0;
      is_over = is_over || stops || (to.allow.classes && !allows_any(to.allow, planned, shared));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Slot& to = in.rows[index];
      if (to.way == Way::kChoose) {
        in.ids[at] = id;
        if (to.has_log_probs) in.log_probs[at] = log_prob;
        to.planned = planned;
      }
      to.taken += has_stepped;
      to.pending = id;
      to.left = is_over ? 0 : to.left - 1;
      to.done += id >= 0;
    }
    __syncthreads();
  }
}

}  // namespace

Error choose(const Choice& in, Stream stream) {
  if (in.num_tokens < 1) return "there must be a token to choose";
  return launch_dependent(choose_of_rows, in.slots, kThreads, sizeof(Shared), stream, in);
}

Drawing drawing_of(int64_t numbers) {
  constexpr int64_t kBlock = 256, kAtOnce = 4;  // torch's
  int64_t most_blocks = 1;
  Drawing drawing;
#ifdef __CUDACC__
  int device = 0, processors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&resident, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  }
  drawing.error = message_of(error);
  most_blocks = processors * (resident / kBlock);
#endif
  const int64_t wanted = divide_up(numbers, kBlock);
  drawing.threads = kBlock * (wanted < most_blocks ? wanted : most_blocks);
  if (drawing.threads > 0) {
    drawing.offset = divide_up(numbers, drawing.threads * kAtOnce) * kAtOnce;
  }
  return drawing;
}

}  // namespace mblm::cuda
