// Chooses the next byte of every row: see decode_slots.h.
//
// A block takes a row. Tokens are compared, and sorted where filters need their order, by keys: a
// number in whose upper half the value falls and in whose lower half the token rises.
#include <cmath>

#include "cuda/decode_slots.h"
#include "cuda/kernel.cuh"
#include "cuda/philox.h"
#include "cuda/row_math.cuh"

namespace mblm::cuda {
namespace {

using Key = uint64_t;
constexpr Key kLast = ~Key(0);  // after every token
constexpr int64_t kMostShared = 4096;

// The smallest that is no smaller.
MBLM_ANYWHERE int64_t power_of_two(int64_t count) {
  int64_t power = 1;
  while (power < count) power *= 2;
  return power;
}

MBLM_DEVICE float bounded_log(float x) {
  return logf(fmaxf(x, 1e-20f));
}

// The lowest key is that of the highest value. NaN counts as the highest, as it does in torch; ties
// go to the lower id.
MBLM_DEVICE Key key_of(float value, int64_t token) {
  const uint32_t bits = __float_as_uint(value + 0.f);  // which makes no difference but to -0
  const uint32_t falling = value != value ? 0 : bits >> 31 ? bits : 0x7fffffffu - bits;
  return Key(falling) << 32 | uint32_t(token);
}

MBLM_DEVICE int64_t token_of(Key key) {
  return int64_t(uint32_t(key));
}

MBLM_DEVICE Key earlier(Key a, Key b) {
  return a < b ? a : b;
}

struct Shared {
  Key firsts[kWarps];
  float sums[kWarps];
  double masses[kWarps];
  bool may_go_on;
};

// The lowest key of all threads, in each of them.
MBLM_DEVICE Key first_of_all(Key own, Shared& shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    own = earlier(own, __shfl_xor_sync(0xffffffffu, own, offset));
  }
  if (threadIdx.x % kWarp == 0) shared.firsts[threadIdx.x / kWarp] = own;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) own = earlier(own, shared.firsts[w]);
  __syncthreads();
  return own;
}

// The likeliest token, in each thread.
MBLM_DEVICE int64_t likeliest(const float* logits, int64_t count, Shared& shared) {
  Key own = kLast;
  MBLM_UNROLL
  for (int64_t token = threadIdx.x; token < count; token += kThreads) {
    own = earlier(own, key_of(logits[token], token));
  }
  return token_of(first_of_all(own, shared));
}

// The logarithm of the sum of exponentials beside the highest, in each thread.
MBLM_DEVICE float log_sum(const float* logits, int64_t count, float highest, Shared& shared) {
  float sum = 0;
  for (int64_t token = threadIdx.x; token < count; token += kThreads) {
    sum += expf(logits[token] - highest);
  }
  return logf(block_sum(sum, shared.sums));
}

// Sorts keys, a power of two of them, by a bitonic network. Where pairs are at most a warp apart, a
// warp's own stay its own from step to step.
MBLM_DEVICE void sort(Key* keys, int64_t size) {
  int64_t before = size;  // distance in the last step
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t distance = run / 2; distance > 0; distance /= 2) {
      if (before > kWarp || distance > kWarp || run == 2) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      before = distance;
      for (int64_t pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        const int64_t low = 2 * pair - (pair & (distance - 1)), high = low + distance;
        const Key a = keys[low], b = keys[high];
        if ((a > b) != ((low & run) != 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// The state after a token of a class; -1 if it is forbidden, as all are from there on.
MBLM_DEVICE int64_t next_state(const Automaton& automaton, int64_t of_class) {
  if (automaton.state < 0) return -1;
  return automaton.next[automaton.state * automaton.num_classes + of_class];
}

// Whether tokens of a class may come next, with so many to come, this one included: where
// acceptance can be reached with so many, it stays reachable.
MBLM_DEVICE bool is_allowed(const Automaton& automaton, int64_t of_class, int64_t left) {
  const int64_t next = next_state(automaton, of_class);
  return next >= 0 &&
         (automaton.distance[automaton.state] > left || automaton.distance[next] <= left - 1);
}

// Takes a token in.
MBLM_DEVICE void follow(Automaton& automaton, int64_t token) {
  if (automaton.classes) automaton.state = next_state(automaton, automaton.classes[token]);
}

MBLM_DEVICE bool accepts(const Automaton& automaton) {
  return automaton.classes && automaton.state >= 0 && automaton.distance[automaton.state] == 0;
}

// Whether anything may come next, in each thread.
MBLM_DEVICE bool allows_any(const Automaton& automaton, int64_t left, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.may_go_on = false;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < automaton.num_classes; c += kThreads) {
    if (is_allowed(automaton, c, left)) shared.may_go_on = true;
  }
  __syncthreads();
  return shared.may_go_on;
}

// The sum of what all threads before have, and that of all, in each thread.
MBLM_DEVICE double sum_before(double own, Shared& shared, double& all) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double sum = own;  // up to this lane
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double more = __shfl_sync(0xffffffffu, sum, lane < offset ? lane : lane - offset);
    if (lane >= offset) sum += more;
  }
  double before = __shfl_sync(0xffffffffu, sum, lane > 0 ? lane - 1 : 0);
  if (lane == 0) before = 0;
  if (lane == kWarp - 1) shared.masses[warp] = sum;
  __syncthreads();
  all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared.masses[w];
    all += shared.masses[w];
  }
  __syncthreads();
  return before;
}

// How many of the sorted tokens top_p keeps: each while those before it do not reach it. A thread
// takes neighbors.
MBLM_DEVICE int64_t count_of_mass(const Key* keys, const float* logits, int64_t count,
                                  const Slot& row, Shared& shared) {
  const float highest = logits[token_of(keys[0])] / row.temperature;
  const auto beside_highest = [&](int64_t i) {
    return expf(logits[token_of(keys[i])] / row.temperature - highest);
  };
  const int64_t each = (count + kThreads - 1) / kThreads, first = threadIdx.x * each;
  const int64_t end = first + each < count ? first + each : count;
  double own = 0, all;
  for (int64_t i = first; i < end; ++i) own += beside_highest(i);
  sum_before(own, shared, all);
  const float sum = float(all);
  own = 0;
  for (int64_t i = first; i < end; ++i) own += beside_highest(i) / sum;
  double mass = sum_before(own, shared, all);
  int64_t kept = count;
  for (int64_t i = first; i < end && kept == count; ++i) {
    const float probability = beside_highest(i) / sum;
    mass += probability;
    if (float(mass) - probability >= row.top_p) kept = i;
  }
  return int64_t(first_of_all(Key(kept), shared));
}

// A row's next byte, in each thread.
MBLM_DEVICE int64_t choose_of_row(const Slots& in, const Slot& row, int64_t index,
                                  const float* logits, Key* keys, Shared& shared) {
  const int64_t count = in.num_tokens, at = index * in.bytes + row.done;
  const int64_t first = likeliest(logits, count, shared);
  const float highest = logits[first];
  if (highest == -INFINITY && row.allow.classes) {  // the model rules out all that is allowed
    Key own = key_of(-INFINITY, first);
    for (int64_t token = threadIdx.x; token < count; token += kThreads) {
      const bool may_come = is_allowed(row.allow, row.allow.classes[token], row.planned);
      if (may_come) own = earlier(own, key_of(0, token));
    }
    return token_of(first_of_all(own, shared));
  }
  // No noise changes what NaN and infinity decide.
  const bool is_finite = fabsf(highest) < INFINITY;
  if (!is_finite || (row.top_k == 1 && !(row.top_p > 0))) return first;
  int64_t kept = row.top_k < count ? row.top_k : count;
  const bool is_sorted = row.top_p > 0 || kept < count;
  if (is_sorted) {
    const int64_t size = power_of_two(count);
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      keys[i] = i < count ? key_of(logits[i], i) : kLast;
    }
    sort(keys, size);
  }
  if (row.top_p > 0) kept = count_of_mass(keys, logits, count, row, shared);
  Key best = key_of(-INFINITY, first);
  for (int64_t i = threadIdx.x; i < kept; i += kThreads) {
    const int64_t token = is_sorted ? token_of(keys[i]) : i;
    if ((logits[token] - highest) / row.temperature < row.least) continue;
    const float number = row.has_numbers
                             ? in.uniform[at * count + token]
                             : uniform_number(in.drawn[at].seed, in.drawn[at].offset, row.threads,
                                              row.first_number + uint32_t(token));
    const float value = logits[token] / row.temperature - bounded_log(-bounded_log(number));
    best = earlier(best, key_of(value, token));
  }
  return token_of(first_of_all(best, shared));
}

struct Chosen {
  int64_t id = -1;
  float log_prob = 0;
};

// What comes next in a row, and how likely it was, in each thread.
MBLM_DEVICE Chosen next_of_row(const Slots& in, const Slot& row, int64_t index, bool has_stepped,
                               Key* own_keys, Shared& shared) {
  const int64_t count = in.num_tokens;
  if (row.way == Way::kPause) return {};
  if (row.way == Way::kFeed) return {in.ids[index * in.bytes + row.done], 0};
  float* const logits = in.logits + index * count;
  if (row.taken == 0 && !has_stepped) {
    for (int64_t token = threadIdx.x; token < count; token += kThreads) {
      logits[token] = in.empty_logits[token];
    }
    __syncthreads();
  }
  float highest = 0, sum = 0;
  if (row.has_log_probs) {
    highest = logits[likeliest(logits, count, shared)];
    sum = log_sum(logits, count, highest, shared);
  }
  if (row.allow.classes) {
    for (int64_t token = threadIdx.x; token < count; token += kThreads) {
      if (!is_allowed(row.allow, row.allow.classes[token], row.planned)) logits[token] = -INFINITY;
    }
    __syncthreads();
  }
  Key* const keys = in.keys ? in.keys + index * power_of_two(count) : own_keys;
  const int64_t id = choose_of_row(in, row, index, logits, keys, shared);
  return {id, logits[id] - highest - sum};
}

// Has a row grow by what comes next.
MBLM_DEVICE void move_on(const Slots& in, int64_t index, bool has_stepped, const Chosen& chosen,
                         Shared& shared) {
  Slot& row = in.rows[index];
  const int64_t planned = row.planned - 1, at = index * in.bytes + row.done;
  bool is_over = chosen.id < 0 || row.left <= 1;
  if (row.way == Way::kChoose) {
    __syncthreads();
    if (threadIdx.x == 0) {
      follow(row.allow, chosen.id);
      follow(row.stop, chosen.id);
    }
    __syncthreads();
    is_over = is_over || accepts(row.stop) ||
              (row.allow.classes && !allows_any(row.allow, planned, shared));
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  if (row.way == Way::kChoose) {
    in.ids[at] = chosen.id;
    if (row.has_log_probs) in.log_probs[at] = chosen.log_prob;
    row.planned = planned;
  }
  row.taken += has_stepped;
  row.pending = chosen.id;
  row.left = is_over ? 0 : row.left - 1;
  row.done += chosen.id >= 0;
}

__global__ void __launch_bounds__(kThreads, 1)
    choose_of_rows(Slots in, StageSlots local, bool has_next) {
  release_dependents();
  Shared& shared = *shared_memory<Shared>();
  Key* const own_keys = reinterpret_cast<Key*>(&shared + 1);
  wait_for_inputs();
  for (int64_t index = blockIdx.x; index < in.count; index += gridDim.x) {
    const Slot& row = in.rows[index];
    const bool has_stepped = in.positions[index] >= 0;
    if (row.left > 0 && row.done < in.bytes && (row.pending < 0 || has_stepped)) {
      const Chosen chosen = next_of_row(in, row, index, has_stepped, own_keys, shared);
      move_on(in, index, has_stepped, chosen, shared);
    }
    __syncthreads();
    if (has_next) embed_byte(in, local, false, index);
  }
}

}  // namespace

Error choose(const Slots& in, const StageSlots& local, bool has_next, Stream stream) {
  if (in.num_tokens < 1) return "there must be a token to choose";
  const int64_t own_keys = in.keys ? 0 : power_of_two(in.num_tokens);
  const size_t shared_bytes = sizeof(Shared) + size_t(own_keys) * sizeof(Key);
  return launch_dependent(choose_of_rows, in.count, kThreads, shared_bytes, stream, in, local,
                          has_next);
}

int64_t keys_of(int64_t num_tokens) {
  const int64_t keys = power_of_two(num_tokens);
  return keys > kMostShared ? keys : 0;
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
