// The next positions of a Transformer stage: see transformer_stage.h.
#include "cpu/transformer_stage.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "cpu/attention.h"
#include "cpu/cache_lines.h"
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
  const float *q, *k, *v;  // of the first position, (dim)
  int64_t q_stride;        // from there to the next position's
  int64_t kv_stride;
  const float *cos, *sin;   // of the first position, (count, dim / 2), or null
  float *keys, *values;     // (capacity, dim)
  float *queries, *scores;  // working memory (count, dim), (count, capacity)
  float* out;
  int64_t out_stride;
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
    std::fill_n(head.out + i * head.out_stride, dim, 0.f);
  }
  for_keys(head, [&](int64_t i, int64_t begin, int64_t end) MBLM_INLINE_LAMBDA {
    add_values(head.scores + i * head.capacity + begin, head.values + begin * dim, end - begin, dim,
               head.out + i * head.out_stride);
  });
  for (int64_t i = 0; i < head.count; ++i) {
    float* out = head.out + i * head.out_stride;
    for (int64_t c = 0; c < dim; ++c) out[c] *= factors[i];
  }
}

// How the threads of a team share a layer, as its widths allow.
struct Sharing {
  // Each attends without waiting, for the heads whose queries, keys and values it has computed.
  bool has_own_heads;
  // Each of two threads adds up what it has computed itself, of heads and of inner columns, and
  // then they exchange the sums: they wait twice in a layer, not four times.
  bool has_halves;

  Sharing(const TransformerStage& stage, int64_t threads)
      : has_own_heads(stage.heads % threads == 0 &&
                      has_even_parts(threads, stage.heads * stage.head_dim)),
        has_halves(has_own_heads && threads == 2) {
    for (const TransformerLayer& layer : stage.layers) {
      has_halves = has_halves && layer.out.is_halved && layer.contract.is_halved &&
                   has_even_parts(threads, layer.expand.outputs);
    }
  }
};

// Working memory of a call, cut from one block: all threads' parts, then each thread's own.
struct Scratch {
  float *attended = nullptr, *middle = nullptr, *inner = nullptr;  // all threads'; own with halves
  float *q = nullptr, *k = nullptr;  // all threads'; own with own heads; v is behind or beside k
  float* output = nullptr;           // own, with halves alone
  float *normed = nullptr, *queries = nullptr, *scores = nullptr;  // own
  float* sums[2][2] = {};  // of both of a layer's exchanges, each thread's
  int64_t floats = 0;      // of the block

  // Without a block, counts what it needs.
  Scratch(const TransformerStage& stage, const Sharing& sharing, const TransformerState& state,
          int64_t count, int64_t threads, int64_t thread, float* block) {
    int64_t capacity = 0;
    for (const TransformerRow& row : state.rows) capacity = std::max(capacity, row.capacity);
    const int64_t positions = int64_t(state.rows.size()) * count, dim = positions * stage.dim;
    const int64_t width = positions * stage.heads * stage.head_dim;
    const int64_t inner_size =
        stage.layers.empty() ? 0 : positions * stage.layers[0].expand.outputs;

    int64_t at = block ? cache_lines::align(block) - block : cache_lines::kFloats;
    bool is_kept = true;
    const auto cut = [&](float*& part, int64_t size) {
      if (block && is_kept) part = block + at;
      at += cache_lines::round_up(size);
    };
    const auto cut_results = [&](int64_t share) {
      cut(attended, width / share);
      cut(middle, dim);
      cut(inner, inner_size / share);
    };
    const auto cut_projections = [&](int64_t share) {
      cut(q, width / share);
      cut(k, 2 * width / share);
    };
    if (!sharing.has_halves) cut_results(1);
    if (!sharing.has_own_heads) cut_projections(1);
    for (int64_t of = 0; of < threads; ++of) {
      at += cache_lines::kFloatsApart;
      is_kept = true;
      for (int64_t exchange = 0; sharing.has_halves && exchange < 2; ++exchange) {
        cut(sums[exchange][of], dim);
      }
      at += cache_lines::kFloatsApart;
      is_kept = of == thread;
      if (sharing.has_own_heads) cut_projections(threads);
      if (sharing.has_halves) {
        cut_results(threads);
        cut(output, dim);
      }
      cut(normed, dim);
      cut(queries, kQueries * stage.head_dim);
      cut(scores, std::min(count, kQueries) * capacity);
    }
    floats = at;
  }
};

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
  const Sharing sharing(*this, threads);
  return Scratch(*this, sharing, state, count, threads, 0, nullptr).floats;
}

void TransformerStage::restart(TransformerRow& row) const {
  row.position = 1;
  for (int64_t part = 0; part < 2 * int64_t(layers.size()); ++part) {
    std::copy_n(row.start_delayed + part * row.start_stride, dim / 2,
                row.delayed + part * row.part_stride);
  }
}

const float* TransformerStage::prefill(const Worker& worker, const State& state, int64_t count,
                                       float* x, float* block) const {
  const int64_t rows = int64_t(state.rows.size()), positions = rows * count;
  const int64_t width = heads * head_dim, kept = dim - dim / 2;
  const int64_t threads = worker.team.threads();
  const Sharing sharing(*this, threads);
  // The thread's own heads, or all.
  const int64_t few_heads = sharing.has_own_heads ? heads / threads : heads;
  const int64_t first_head = sharing.has_own_heads ? worker.index * few_heads : 0;
  const int64_t columns = few_heads * head_dim, first_column = first_head * head_dim;
  const Scratch s(*this, sharing, state, count, threads, worker.index, block);
  float* const v = s.k + (sharing.has_own_heads ? positions * columns : width);
  const int64_t kv_stride = sharing.has_own_heads ? columns : 2 * width;

  // A part is one of the shifts, two in a layer. The first thread keeps what it delays; others ask
  // for that one part ahead.
  const auto ask_for_delayed = [&](int64_t part) {
    for (const TransformerRow& row : state.rows) {
      ask_for(worker, row.delayed + part * row.part_stride, dim - kept);
    }
  };
  // Delays the halves of the positions before, and normalizes. Every thread does so for itself:
  // that is quicker than to wait for another's result.
  const auto shift = [&](const float* input, int64_t part, const float* weight) {
    if (input == x || !sharing.has_halves) ask_for(worker, input, positions * dim);
    ask_for_delayed((part + 1) % (2 * int64_t(layers.size())));
    for (int64_t at = 0; at < positions; ++at) {
      const TransformerRow& row = state.rows[at / count];
      const float* delayed =
          at % count > 0 ? input + (at - 1) * dim + kept : row.delayed + part * row.part_stride;
      shifted_norm(input + at * dim, delayed, weight, dim, s.normed + at * dim);
    }
  };
  const auto delay = [&](const float* input, int64_t part) {
    for (int64_t row = 0; worker.is_first() && row < rows; ++row) {
      const float* last = input + (row * count + count - 1) * dim;
      const TransformerRow& of = state.rows[row];
      std::copy_n(last + kept, dim - kept, of.delayed + part * of.part_stride);
    }
  };

  const auto attend_in_layer = [&](int64_t index, int64_t row, int64_t head) {
    const TransformerRow& of = state.rows[row];
    const int64_t cache = index * of.layer_stride + head * of.capacity * head_dim;
    const int64_t out_stride = sharing.has_halves ? columns : width;
    const int64_t out_column = (sharing.has_halves ? head - first_head : head) * head_dim;
    for (int64_t i = 0; i < count; i += kQueries) {
      const int64_t position = of.position + i, angle = position * (head_dim / 2);
      const int64_t at = row * count + i;
      const int64_t column = (head - first_head) * head_dim;
      attend({.dim = head_dim,
              .first = position,
              .count = std::min(kQueries, count - i),
              .capacity = of.capacity,
              .q = s.q + at * columns + column,
              .k = s.k + at * kv_stride + column,
              .v = v + at * kv_stride + column,
              .q_stride = columns,
              .kv_stride = kv_stride,
              .cos = of.cos ? of.cos + angle : nullptr,
              .sin = of.cos ? of.sin + angle : nullptr,
              .keys = of.keys + cache,
              .values = of.values + cache,
              .queries = s.queries,
              .scores = s.scores,
              .out = s.attended + at * out_stride + out_column,
              .out_stride = out_stride});
    }
  };

  // out = the product with what the threads have computed, and input.
  const auto add_product = [&](const Matrix& matrix, const float* values, float* const sums[2],
                               const float* input, float* out, const Matrix* next) {
    if (sharing.has_halves) {
      multiply_half(worker, matrix, worker.index, values, positions, sums[worker.index]);
      wait_for(worker, next);
      ask_for(worker, sums[1 - worker.index], positions * dim);
      add_halves(matrix, sums[0], sums[1], positions, out, input);
    } else {
      wait_for(worker, &matrix);
      multiply(worker, matrix, values, positions, out, Then::kStore, input);
      wait_for(worker, next);
    }
  };

  float* const output = sharing.has_halves ? s.output : x;
  const float* stream = x;
  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const TransformerLayer& layer = layers[index];
    shift(stream, 2 * index, layer.attention_norm);
    if (sharing.has_own_heads) {
      const Product own[] = {{outputs_of(layer.q, first_column, columns), s.q},
                             {outputs_of(layer.kv, first_column, columns), s.k},
                             {outputs_of(layer.kv, width + first_column, columns), v}};
      multiply_alone(worker, own, s.normed, positions);
      for (int64_t item = 0; item < rows * few_heads; ++item) {
        attend_in_layer(index, item / few_heads, first_head + item % few_heads);
      }
    } else {
      const Product all[] = {{layer.q, s.q}, {layer.kv, s.k}};
      multiply(worker, all, s.normed, positions);
      wait_for(worker, &layer.out);
      // A single row's heads are cut evenly, so that a thread finds their keys in its own cache; of
      // several rows some can have many more positions than others.
      const int64_t part = rows == 1 ? (heads + threads - 1) / threads : 1;
      worker.share(rows * heads, part, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) attend_in_layer(index, begin / heads, begin % heads);
      });
    }
    add_product(layer.out, s.attended, s.sums[0], stream, s.middle, &layer.expand);
    delay(stream, 2 * index);

    shift(s.middle, 2 * index + 1, layer.feed_forward_norm);
    if (sharing.has_halves) {
      const int64_t inner = layer.expand.outputs / 2;
      const Product expansion[] = {
          {outputs_of(layer.expand, worker.index * inner, inner), s.inner}};
      multiply_alone(worker, expansion, s.normed, positions, Then::kGelu);
    } else {
      multiply(worker, layer.expand, s.normed, positions, s.inner, Then::kGelu);
    }
    add_product(layer.contract, s.inner, s.sums[1], s.middle, output,
                index + 1 < int64_t(layers.size()) ? &layers[index + 1].q : nullptr);
    delay(s.middle, 2 * index + 1);
    stream = output;
  }
  return stream;
}

void TransformerStage::normalize(const float* x, int64_t positions, float* out) const {
  for (int64_t at = 0; at < positions; ++at) {
    shifted_norm(x + at * dim, nullptr, norm, dim, out + at * dim);
  }
}

}  // namespace mblm::cpu
