// One position of a Transformer stage: see transformer_stage.h.
#include "cpu/transformer_stage.h"

#include <cmath>

#include "cpu/dot.h"
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

// What one head of one row works on.
struct Head {
  int64_t dim, position;
  const float *q, *k, *v;       // (dim), of this position
  const float *cos, *sin;       // (dim / 2), or null
  float *keys, *values;         // (capacity, dim)
  float *query, *scores, *out;  // working memory (dim), (position + 1); the result (dim)
};

// Appends this position's key and value and attends to all positions so far.
MBLM_CLONES void attend(const Head& head) {
  const int64_t dim = head.dim, count = head.position + 1;
  float* key = head.keys + head.position * dim;
  const float* query = head.q;
  if (head.cos) {
    rotate(head.q, head.cos, head.sin, dim / 2, head.query);
    rotate(head.k, head.cos, head.sin, dim / 2, key);
    query = head.query;
  } else {
    std::copy_n(head.k, dim, key);
  }
  std::copy_n(head.v, dim, head.values + head.position * dim);

  const float scale = 1.f / std::sqrt(float(dim));
  float highest = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    head.scores[i] = dot<float>(query, head.keys + i * dim, dim) * scale;
    highest = std::max(highest, head.scores[i]);
  }
  for (int64_t i = 0; i < count; ++i) head.scores[i] = vector_exp(head.scores[i] - highest);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += head.scores[i];
  for (int64_t c = 0; c < dim; ++c) head.out[c] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float* value = head.values + i * dim;
    const float weight = head.scores[i];
    for (int64_t c = 0; c < dim; ++c) head.out[c] += weight * value[c];
  }
  const float factor = float(1 / sum);
  for (int64_t c = 0; c < dim; ++c) head.out[c] *= factor;
}

// Working memory of one call, cut from one block; what is per thread comes last.
struct Scratch {
  float *q, *kv, *attended, *middle, *inner, *normed, *query, *scores;

  Scratch(const TransformerStage& stage, int64_t rows, int64_t capacity, int64_t thread,
          float* block) {
    const int64_t width = stage.heads * stage.head_dim;
    q = block;
    kv = q + rows * width;
    attended = kv + rows * 2 * width;
    middle = attended + rows * width;
    inner = middle + rows * stage.dim;
    normed = inner + rows * inner_width(stage) + thread * per_thread(stage, rows, capacity);
    query = normed + rows * stage.dim;
    scores = query + stage.head_dim;
  }

  static int64_t inner_width(const TransformerStage& stage) {
    return stage.layers.empty() ? 0 : stage.layers[0].expand.outputs;
  }

  // A multiple of a cache line's 16 floats and one line more: threads write apart.
  static int64_t per_thread(const TransformerStage& stage, int64_t rows, int64_t capacity) {
    return (rows * stage.dim + stage.head_dim + capacity) / 16 * 16 + 32;
  }
};

int64_t largest_capacity(const TransformerState& state) {
  int64_t largest = 0;
  for (const TransformerRow& row : state.rows) largest = std::max(largest, row.capacity);
  return largest;
}

}  // namespace

int64_t TransformerStage::scratch_size(const State& state, int64_t threads) const {
  const int64_t rows = int64_t(state.rows.size());
  const int64_t shared = rows * (4 * heads * head_dim + dim + Scratch::inner_width(*this));
  return shared + threads * Scratch::per_thread(*this, rows, largest_capacity(state));
}

void TransformerStage::step(const Worker& worker, const State& state, float* x,
                            float* block) const {
  Team& team = worker.team;
  const int64_t rows = int64_t(state.rows.size()), width = heads * head_dim, half = dim / 2;
  const Scratch s(*this, rows, largest_capacity(state), worker.index, block);

  // Every thread normalizes for itself: that is quicker than to wait for another's result.
  // A part is one of the shifts, two in a layer.
  const auto normalize = [&](const float* input, int64_t part, const float* weight) {
    for (int64_t row = 0; row < rows; ++row) {
      const TransformerRow& of = state.rows[row];
      shifted_norm(input + row * dim, of.delayed + part * of.part_stride, weight, dim,
                   s.normed + row * dim);
    }
  };
  const auto delay = [&](const float* input, int64_t part) {
    for (int64_t row = 0; row < rows; ++row) {
      const TransformerRow& of = state.rows[row];
      std::copy_n(input + row * dim + dim - half, half, of.delayed + part * of.part_stride);
    }
  };

  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const TransformerLayer& layer = layers[index];
    normalize(x, 2 * index, layer.attention_norm);
    multiply(worker, 0, layer.q, s.normed, rows, s.q);
    multiply(worker, 1, layer.kv, s.normed, rows, s.kv);
    team.wait();

    team.share(0, rows * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / heads, head = item % heads;
        const TransformerRow& of = state.rows[row];
        const int64_t cache = index * of.layer_stride + head * of.capacity * head_dim;
        const int64_t angle = of.position * (head_dim / 2);
        const float* key = s.kv + row * 2 * width + head * head_dim;
        attend({head_dim, of.position, s.q + row * width + head * head_dim, key, key + width,
                of.cos ? of.cos + angle : nullptr, of.cos ? of.sin + angle : nullptr,
                of.keys + cache, of.values + cache, s.query, s.scores,
                s.attended + row * width + head * head_dim});
      }
    });
    if (worker.is_first()) delay(x, 2 * index);
    team.wait();

    multiply(worker, 0, layer.out, s.attended, rows, s.middle, Then::kStore, x);
    team.wait();

    normalize(s.middle, 2 * index + 1, layer.feed_forward_norm);
    multiply(worker, 0, layer.expand, s.normed, rows, s.inner, Then::kGelu);
    team.wait();

    multiply(worker, 0, layer.contract, s.inner, rows, x, Then::kStore, s.middle);
    if (worker.is_first()) delay(s.middle, 2 * index + 1);
    team.wait();
  }

  if (worker.is_first()) {
    for (int64_t row = 0; row < rows; ++row) {
      shifted_norm(x + row * dim, nullptr, norm, dim, x + row * dim);
    }
  }
  team.wait();
}

}  // namespace mblm::cpu
