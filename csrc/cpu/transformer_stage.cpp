// The next positions of a Transformer stage: see transformer_stage.h.
#include "cpu/transformer_stage.h"

#include <cmath>

#include "cpu/attention.h"
#include "cpu/kernel.h"
#include "cpu/rms_norm.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {
namespace {

constexpr double kSmallestNorm = 1e-8;

// out = s / max(norm(s) / sqrt(n), 1e-8) * weight, s being x with its last half replaced by the
// delayed one, if there is one.
MBLM_CLONES void shifted_norm(const float* x, const float* delayed, const float* weight, int64_t n,
                              float* out) {
  const int64_t kept = delayed ? n - n / 2 : n;
  double squares = sum_of_squares(x, kept);
  if (delayed) squares += sum_of_squares(delayed, n - kept);
  const double norm = std::max(std::sqrt(squares / double(n)), kSmallestNorm);
  const float factor = float(1 / norm);
  for (int64_t i = 0; i < kept; ++i) out[i] = x[i] * factor * weight[i];
  for (int64_t i = kept; i < n; ++i) out[i] = delayed[i - kept] * factor * weight[i];
}

// The halves of x, rotated: x1 cos - x2 sin and x2 cos + x1 sin.
MBLM_INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t half,
                        float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    out[i] = first * cos[i] - second * sin[i];
    out[half + i] = second * cos[i] + first * sin[i];
  }
}

// What one head of one row works on: some positions in a row, at most kQueries.
struct Head {
  int64_t dim, first, count, capacity;
  const float *q, *k, *v;   // of the first position, (dim)
  int64_t q_stride;         // from there to the next position's, also of out
  int64_t kv_stride;        // the same of k and v
  const float *cos, *sin;   // of the first position, (count, dim / 2), or null
  float *keys, *values;     // (capacity, dim)
  float *queries, *scores;  // working memory (count, dim), (count, capacity)
  float* out;
};

constexpr int64_t kQueries = 16;
// Keys or values that stay in the first cache while all positions look at them.
constexpr int64_t kKeys = 64;

// Calls function(position, begin, end) for all keys that each position sees, in their order.
template <class Function>
MBLM_INLINE void for_keys(const Head& head, Function function) {
  for (int64_t begin = 0; begin < head.first + head.count; begin += kKeys) {
    for (int64_t i = 0; i < head.count; ++i) {
      function(i, begin, std::min(begin + kKeys, head.first + i + 1));
    }
  }
}

// Appends the positions' keys and values; each attends to all positions up to itself. What a
// position computes does not depend on how many there are.
MBLM_CLONES void attend(const Head& head) {
  const int64_t dim = head.dim;
  for (int64_t i = 0; i < head.count; ++i) {
    const float *q = head.q + i * head.q_stride, *k = head.k + i * head.kv_stride;
    float *query = head.queries + i * dim, *key = head.keys + (head.first + i) * dim;
    if (head.cos) {
      const int64_t angle = i * (dim / 2);
      rotate(q, head.cos + angle, head.sin + angle, dim / 2, query);
      rotate(k, head.cos + angle, head.sin + angle, dim / 2, key);
    } else {
      std::copy_n(q, dim, query);
      std::copy_n(k, dim, key);
    }
    std::copy_n(head.v + i * head.kv_stride, dim, head.values + (head.first + i) * dim);
  }

  const float scale = 1.f / std::sqrt(float(dim));
  for_keys(head, [&](int64_t i, int64_t begin, int64_t end) MBLM_INLINE_LAMBDA {
    multiply_keys(head.queries + i * dim, head.keys + begin * dim, end - begin, dim, scale,
                  head.scores + i * head.capacity + begin);
  });
  float factors[kQueries];
  for (int64_t i = 0; i < head.count; ++i) {
    factors[i] = exponentials(head.scores + i * head.capacity, head.first + i + 1);
    std::fill_n(head.out + i * head.q_stride, dim, 0.f);
  }
  for_keys(head, [&](int64_t i, int64_t begin, int64_t end) MBLM_INLINE_LAMBDA {
    add_values(head.scores + i * head.capacity + begin, head.values + begin * dim, end - begin, dim,
               head.out + i * head.q_stride);
  });
  for (int64_t i = 0; i < head.count; ++i) {
    float* out = head.out + i * head.q_stride;
    for (int64_t c = 0; c < dim; ++c) out[c] *= factors[i];
  }
}

// Working memory of a call, cut from one block; what is per thread comes last.
struct Scratch {
  float *q, *kv, *attended, *middle, *inner, *normed, *queries, *scores;

  Scratch(const TransformerStage& stage, int64_t positions, int64_t of_thread, int64_t thread,
          float* block) {
    const int64_t width = stage.heads * stage.head_dim;
    q = block;
    kv = q + positions * width;
    attended = kv + positions * 2 * width;
    middle = attended + positions * width;
    inner = middle + positions * stage.dim;
    normed = inner + positions * inner_width(stage) + thread * of_thread;
    queries = normed + positions * stage.dim;
    scores = queries + kQueries * stage.head_dim;
  }

  static int64_t inner_width(const TransformerStage& stage) {
    return stage.layers.empty() ? 0 : stage.layers[0].expand.outputs;
  }
};

// Floats of each thread: a multiple of a cache line's 16 and one line more, so that threads write
// apart.
int64_t per_thread(const TransformerStage& stage, const TransformerState& state, int64_t count) {
  int64_t capacity = 0;
  for (const TransformerRow& row : state.rows) capacity = std::max(capacity, row.capacity);
  const int64_t positions = int64_t(state.rows.size()) * count;
  const int64_t attention = kQueries * stage.head_dim + std::min(count, kQueries) * capacity;
  return (positions * stage.dim + attention) / 16 * 16 + 32;
}

}  // namespace

int64_t TransformerStage::weights() const {
  int64_t count = 0;
  for (const TransformerLayer& layer : layers) {
    count += layer.q.weights() + layer.kv.weights() + layer.out.weights() + layer.expand.weights() +
             layer.contract.weights();
  }
  return count;
}

int64_t TransformerStage::scratch_size(const State& state, int64_t count, int64_t threads) const {
  const int64_t positions = int64_t(state.rows.size()) * count;
  const int64_t shared = positions * (4 * heads * head_dim + dim + Scratch::inner_width(*this));
  return shared + threads * per_thread(*this, state, count);
}

void TransformerStage::restart(TransformerRow& row) const {
  row.position = 1;
  for (int64_t part = 0; part < 2 * int64_t(layers.size()); ++part) {
    std::copy_n(row.start_delayed + part * row.start_stride, dim / 2,
                row.delayed + part * row.part_stride);
  }
}

void TransformerStage::prefill(const Worker& worker, const State& state, int64_t count, float* x,
                               float* block) const {
  const int64_t rows = int64_t(state.rows.size()), positions = rows * count;
  const int64_t width = heads * head_dim, kept = dim - dim / 2;
  const int64_t threads = worker.team.threads();
  // A single row's heads are cut evenly, so that a thread finds their keys in its own cache; of
  // several rows some can have many more positions than others.
  const int64_t head_part = rows == 1 ? (heads + threads - 1) / threads : 1;
  const Scratch s(*this, positions, per_thread(*this, state, count), worker.index, block);

  // Every thread normalizes for itself: that is quicker than to wait for another's result.
  // A part is one of the shifts, two in a layer. It delays the halves of the positions before.
  const auto normalize = [&](const float* input, int64_t part, const float* weight) {
    ask_for(worker, input, positions * dim);
    for (int64_t at = 0; at < positions; ++at) {
      const TransformerRow& row = state.rows[at / count];
      const float* delayed =
          at % count > 0 ? input + (at - 1) * dim + kept : row.delayed + part * row.part_stride;
      shifted_norm(input + at * dim, delayed, weight, dim, s.normed + at * dim);
    }
  };
  const auto delay = [&](const float* input, int64_t part) {
    for (int64_t row = 0; row < rows; ++row) {
      const float* last = input + (row * count + count - 1) * dim;
      const TransformerRow& of = state.rows[row];
      std::copy_n(last + kept, dim - kept, of.delayed + part * of.part_stride);
    }
  };

  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const TransformerLayer& layer = layers[index];
    normalize(x, 2 * index, layer.attention_norm);
    multiply(worker, layer.q, s.normed, positions, s.q);
    multiply(worker, layer.kv, s.normed, positions, s.kv);
    wait_for(worker, &layer.out);

    worker.share(rows * heads, head_part, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / heads, head = item % heads;
        const TransformerRow& of = state.rows[row];
        const int64_t cache = index * of.layer_stride + head * of.capacity * head_dim;
        for (int64_t i = 0; i < count; i += kQueries) {
          const int64_t at = row * count + i, position = of.position + i;
          const int64_t angle = position * (head_dim / 2), column = head * head_dim;
          const float* key = s.kv + at * 2 * width + column;
          attend({.dim = head_dim,
                  .first = position,
                  .count = std::min(kQueries, count - i),
                  .capacity = of.capacity,
                  .q = s.q + at * width + column,
                  .k = key,
                  .v = key + width,
                  .q_stride = width,
                  .kv_stride = 2 * width,
                  .cos = of.cos ? of.cos + angle : nullptr,
                  .sin = of.cos ? of.sin + angle : nullptr,
                  .keys = of.keys + cache,
                  .values = of.values + cache,
                  .queries = s.queries,
                  .scores = s.scores,
                  .out = s.attended + at * width + column});
        }
      }
    });
    if (worker.is_first()) delay(x, 2 * index);
    wait_for(worker, &layer.out);

    multiply(worker, layer.out, s.attended, positions, s.middle, Then::kStore, x);
    wait_for(worker, &layer.expand);

    normalize(s.middle, 2 * index + 1, layer.feed_forward_norm);
    multiply(worker, layer.expand, s.normed, positions, s.inner, Then::kGelu);
    wait_for(worker, &layer.contract);

    multiply(worker, layer.contract, s.inner, positions, x, Then::kStore, s.middle);
    if (worker.is_first()) delay(s.middle, 2 * index + 1);
    wait_for(worker, index + 1 < int64_t(layers.size()) ? &layers[index + 1].q : nullptr);
  }

  if (worker.is_first()) {
    for (int64_t at = 0; at < positions; ++at) {
      shifted_norm(x + at * dim, nullptr, norm, dim, x + at * dim);
    }
  }
  worker.wait();
}

}  // namespace mblm::cpu
