// The next positions of a Transformer stage: see transformer_stage.h.
#include "cpu/transformer_stage.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/attention.h"
#include "cpu/cache_lines.h"
#include "cpu/call_rows.h"
#include "cpu/kernel.h"
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
  int64_t dim, first, count;
  const float *q, *k, *v;  // of the first position, (dim)
  int64_t q_stride;        // from there to the next position's
  int64_t kv_stride;
  const float *cos, *sin;  // of the first position, (count, dim / 2), or null
  float *const *keys, *const *values;
  int64_t offset;           // of the head in each page
  float *queries, *scores;  // working memory (count, dim), (count, score_stride)
  int64_t score_stride;
  float* out;
  int64_t out_stride;
};

constexpr int64_t kQueries = 16;

// Where a position's key or value is, and in its page all after it.
MBLM_INLINE float* in_page(float* const* pages, const Head& head, int64_t position) {
  return pages[position / kPagePositions] + head.offset + position % kPagePositions * head.dim;
}

// Calls function(position, begin, end) for all keys that each position sees, in their order. A
// page's keys stay in the first cache while all positions look at them.
template <class Function>
MBLM_INLINE void for_keys(const Head& head, Function function) {
  for (int64_t begin = 0; begin < head.first + head.count; begin += kPagePositions) {
    for (int64_t i = 0; i < head.count; ++i) {
      function(i, begin, std::min(begin + kPagePositions, head.first + i + 1));
    }
  }
}

// Appends the positions' keys and values; each attends to all positions up to itself. What a
// position computes does not depend on how many there are.
MBLM_CLONES void attend(const Head& head) {
  const int64_t dim = head.dim;
  for (int64_t i = 0; i < head.count; ++i) {
    const float *q = head.q + i * head.q_stride, *k = head.k + i * head.kv_stride;
    float *query = head.queries + i * dim, *key = in_page(head.keys, head, head.first + i);
    if (head.cos) {
      const int64_t angle = i * (dim / 2);
      rotate(q, head.cos + angle, head.sin + angle, dim / 2, query);
      rotate(k, head.cos + angle, head.sin + angle, dim / 2, key);
    } else {
      std::copy_n(q, dim, query);
      std::copy_n(k, dim, key);
    }
    std::copy_n(head.v + i * head.kv_stride, dim, in_page(head.values, head, head.first + i));
  }

  const float scale = 1.f / std::sqrt(float(dim));
  for_keys(head, [&](int64_t i, int64_t begin, int64_t end) MBLM_INLINE_LAMBDA {
    multiply_keys(head.queries + i * dim, in_page(head.keys, head, begin), end - begin, dim, scale,
                  head.scores + i * head.score_stride + begin);
  });
  float factors[kQueries];
  for (int64_t i = 0; i < head.count; ++i) {
    factors[i] = exponentials(head.scores + i * head.score_stride, head.first + i + 1);
    std::fill_n(head.out + i * head.out_stride, dim, 0.f);
  }
  for_keys(head, [&](int64_t i, int64_t begin, int64_t end) MBLM_INLINE_LAMBDA {
    add_values(head.scores + i * head.score_stride + begin, in_page(head.values, head, begin),
               end - begin, dim, head.out + i * head.out_stride);
  });
  for (int64_t i = 0; i < head.count; ++i) {
    float* out = head.out + i * head.out_stride;
    for (int64_t c = 0; c < dim; ++c) out[c] *= factors[i];
  }
}

// Whether each thread attends without waiting, for the heads whose queries, keys and values it has
// computed.
bool has_own_heads(const TransformerStage& stage, int64_t threads) {
  return !stage.layers.empty() && stage.heads % threads == 0 &&
         has_even_parts(threads, stage.layers[0].q);
}

// Working memory of a call, cut from one block: all threads' parts, then each thread's own.
struct Scratch {
  float *attended = nullptr, *middle = nullptr, *inner = nullptr;  // all threads'
  float *q = nullptr, *k = nullptr;  // all threads'; own with own heads; v is behind or beside k
  float *normed = nullptr, *queries = nullptr, *scores = nullptr;  // own
  int64_t floats = 0;                                              // of the block

  // Without a block, counts what it needs.
  Scratch(const TransformerStage& stage, int64_t positions, int64_t end, int64_t threads,
          int64_t thread, float* block) {
    const int64_t dim = positions * stage.dim, width = positions * stage.heads * stage.head_dim;
    const int64_t inner_size =
        stage.layers.empty() ? 0 : positions * stage.layers[0].expand.outputs;
    const bool own_heads = has_own_heads(stage, threads);

    int64_t at = block ? cache_lines::align(block) - block : cache_lines::kFloats;
    bool is_kept = true;
    const auto cut = [&](float*& part, int64_t size) {
      if (block && is_kept) part = block + at;
      at += cache_lines::round_up(size);
    };
    const auto cut_projections = [&](int64_t share) {
      cut(q, width / share);
      cut(k, 2 * width / share);
    };
    cut(attended, width);
    cut(middle, dim);
    cut(inner, inner_size);
    if (!own_heads) cut_projections(1);
    for (int64_t of = 0; of < threads; ++of) {
      at += cache_lines::kFloatsApart;
      is_kept = of == thread;
      if (own_heads) cut_projections(threads);
      cut(normed, dim);
      cut(queries, kQueries * stage.head_dim);
      cut(scores, std::min(positions, kQueries) * end);
    }
    floats = at;
  }
};

}  // namespace

int64_t TransformerStage::scratch_size(int64_t positions, int64_t end, int64_t threads) const {
  return Scratch(*this, positions, end, threads, 0, nullptr).floats;
}

// The trail: what is delayed before each position, (positions, parts, dim / 2).
int64_t TransformerStage::trail_size(int64_t, int64_t positions) const {
  return positions * 2 * int64_t(layers.size()) * (dim / 2);
}

// Keys and values after a row's last position are not looked at.
void TransformerStage::roll_back(std::span<const Row> given, int64_t row, float* trail,
                                 int64_t kept) const {
  const Row& of = given[row];
  if (kept == of.count) return;
  const int64_t parts = 2 * int64_t(layers.size()), half = dim / 2;
  const float* from = trail + (CallRows<Row>(given).first(row) + kept) * parts * half;
  for (int64_t part = 0; part < parts; ++part) {
    std::copy_n(from + part * half, half, of.delayed + part * of.part_stride);
  }
}

void TransformerStage::prefill(const Worker& worker, std::span<const Row> given, float* x,
                               float* block, float* trail) const {
  const CallRows<Row> rows(given);
  const int64_t positions = rows.positions(), width = heads * head_dim, kept = dim - dim / 2;
  const int64_t threads = worker.team.threads(), parts = 2 * int64_t(layers.size());
  int64_t end = 0;
  for (const Row& row : given) end = std::max(end, row.position + row.count);
  const Scratch s(*this, positions, end, threads, worker.index, block);
  // The thread's own heads, or all.
  const bool own_heads = has_own_heads(*this, threads);
  const int64_t few_heads = own_heads ? heads / threads : heads;
  const int64_t first_head = own_heads ? worker.index * few_heads : 0;
  const int64_t columns = few_heads * head_dim, first_column = first_head * head_dim;
  float* const v = s.k + (own_heads ? positions * columns : width);
  const int64_t kv_stride = own_heads ? columns : 2 * width;

  // A part is one of the shifts, two in a layer. Delays the halves of the positions before, and
  // normalizes. Every thread does so for itself: that is quicker than to wait for another's result.
  const auto shift = [&](const float* input, int64_t part, const float* weight) {
    ask_for(worker, input, positions * dim);
    // The first thread writes what is delayed; the others ask for it one part ahead.
    const int64_t next = (part + 1) % parts;
    for (const Row& row : given) ask_for(worker, row.delayed + next * row.part_stride, dim - kept);
    int64_t at = 0;
    for (const Row& row : given) {
      const float* delayed = row.delayed + part * row.part_stride;
      for (int64_t i = 0; i < row.count; ++i, ++at) {
        shifted_norm(input + at * dim, delayed, weight, dim, s.normed + at * dim);
        delayed = input + at * dim + kept;
      }
    }
  };
  const auto delay = [&](const float* input, int64_t part) {
    if (!worker.is_first()) return;
    int64_t at = 0;
    for (const Row& row : given) {
      float* const delayed = row.delayed + part * row.part_stride;
      for (int64_t i = 0; i < row.count; ++i, ++at) {
        if (trail) std::copy_n(delayed, dim - kept, trail + (at * parts + part) * (dim - kept));
        std::copy_n(input + at * dim + kept, dim - kept, delayed);
      }
    }
  };

  const auto attend_in_layer = [&](int64_t index, int64_t row, int64_t head) {
    const Row& of = rows[row];
    const int64_t column = (head - first_head) * head_dim;
    for (int64_t i = 0; i < of.count; i += kQueries) {
      const int64_t position = of.position + i, angle = position * (head_dim / 2);
      const int64_t at = rows.first(row) + i;
      attend({.dim = head_dim,
              .first = position,
              .count = std::min(kQueries, of.count - i),
              .q = s.q + at * columns + column,
              .k = s.k + at * kv_stride + column,
              .v = v + at * kv_stride + column,
              .q_stride = columns,
              .kv_stride = kv_stride,
              .cos = cos ? cos + angle : nullptr,
              .sin = cos ? sin + angle : nullptr,
              .keys = of.keys,
              .values = of.values,
              .offset = index * of.layer_stride + head * of.head_stride,
              .queries = s.queries,
              .scores = s.scores,
              .score_stride = end,
              .out = s.attended + at * width + head * head_dim,
              .out_stride = width});
    }
  };

  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const TransformerLayer& layer = layers[index];
    shift(x, 2 * index, layer.attention_norm);
    if (own_heads) {
      const Product own[] = {{outputs_of(layer.q, first_column, columns), s.q},
                             {outputs_of(layer.kv, first_column, columns), s.k},
                             {outputs_of(layer.kv, width + first_column, columns), v}};
      multiply_alone(worker, own, s.normed, positions);
      for (int64_t item = 0; item < rows.size() * few_heads; ++item) {
        attend_in_layer(index, item / few_heads, first_head + item % few_heads);
      }
    } else {
      const Product all[] = {{layer.q, s.q}, {layer.kv, s.k}};
      multiply(worker, all, s.normed, positions);
      wait_for(worker, &layer.out);
      // A single row's heads are cut evenly, so that a thread finds their keys in its own cache; of
      // several rows some can have many more positions than others.
      const int64_t part = rows.size() == 1 ? (heads + threads - 1) / threads : 1;
      worker.share(rows.size() * heads, part, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) attend_in_layer(index, begin / heads, begin % heads);
      });
    }
    wait_for(worker, &layer.out);
    multiply(worker, layer.out, s.attended, positions, s.middle, Then::kStore, x);
    wait_for(worker, &layer.expand);
    delay(x, 2 * index);

    shift(s.middle, 2 * index + 1, layer.feed_forward_norm);
    multiply(worker, layer.expand, s.normed, positions, s.inner, Then::kGelu);
    wait_for(worker, &layer.contract);
    multiply(worker, layer.contract, s.inner, positions, x, Then::kStore, s.middle);
    wait_for(worker, index + 1 < int64_t(layers.size()) ? &layers[index + 1].q : nullptr);
    delay(s.middle, 2 * index + 1);
  }
}

void TransformerStage::normalize(const float* x, int64_t positions, float* out) const {
  for (int64_t at = 0; at < positions; ++at) {
    shifted_norm(x + at * dim, nullptr, norm, dim, out + at * dim);
  }
}

}  // namespace mblm::cpu
