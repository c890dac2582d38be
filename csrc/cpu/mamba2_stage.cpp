// The next positions of a Mamba-2 stage: see mamba2_stage.h.
#include "cpu/mamba2_stage.h"

#include <algorithm>
#include <cmath>

#include "cpu/call_rows.h"
#include "cpu/mamba_step.h"
#include "cpu/rms_norm.h"

namespace mblm::cpu {
namespace {

// Channels that a thread takes at a time in the loop over the convolution's.
constexpr int64_t kChannels = 64;

MBLM_CLONES void normalize(const float* x, const float* weight, int64_t n, float eps, float* out) {
  rms_norm(x, weight, n, eps, out);
}

// One head of one row, gated: x, gate and out (width), b and c (states), state (width, states).
MBLM_CLONES void scan_head(const Mamba2Layer& layer, int64_t head, int64_t width, int64_t states,
                           float dt, const float* x, const float* gate, const float* b,
                           const float* c, float* state, float* out) {
  const float step = softplus(dt + layer.dt_bias[head]);
  const float decay = std::exp(step * layer.rates[head]);
  for (int64_t i = 0; i < width; ++i) {
    const float y = update_state(
        state + i * states, [&](int64_t) MBLM_INLINE_LAMBDA { return decay; }, step * x[i], b, c,
        states);
    out[i] = (y + x[i] * layer.direct[head]) * silu(gate[i]);
  }
}

int64_t channels_of(const Mamba2Stage& stage) {
  return stage.inner + 2 * stage.states;
}

int64_t projected_width(const Mamba2Stage& stage) {
  return stage.inner + channels_of(stage) + stage.heads;
}

// What a layer computes of all positions, cut from one block.
struct Values {
  float* both;       // (positions, projected): gate, x B C, dt
  float* convolved;  // (positions, channels): x, B and C
  float* scanned;    // (positions, inner)

  Values(const Mamba2Stage& stage, int64_t positions, float* block)
      : both(block),
        convolved(both + positions * projected_width(stage)),
        scanned(convolved + positions * channels_of(stage)) {}

  static int64_t floats(const Mamba2Stage& stage, int64_t positions) {
    return positions * (projected_width(stage) + channels_of(stage) + stage.inner);
  }

  // A head's position, of one row.
  void scan(const Mamba2Stage& stage, int64_t index, int64_t head, int64_t at, float* ssm) const {
    const int64_t inner = stage.inner, channels = channels_of(stage), width = inner / stage.heads;
    const float* projection = both + at * projected_width(stage);
    const float* mixed = convolved + at * channels;
    scan_head(stage.layers[index], head, width, stage.states, projection[inner + channels + head],
              mixed + head * width, projection + head * width, mixed + inner,
              mixed + inner + stage.states, ssm + head * width * stage.states,
              scanned + at * inner + head * width);
  }
};

MambaCopy copy_of(const Mamba2Stage& stage) {
  return {int64_t(stage.layers.size()), stage.inner * stage.states,
          (stage.taps - 1) * channels_of(stage)};
}

// Floats of a thread's own values of all positions, and a cache line more: threads write apart.
int64_t per_thread(int64_t positions, int64_t dim, int64_t inner) {
  return positions * std::max(dim, inner) / 16 * 16 + 32;
}

}  // namespace

int64_t Mamba2Stage::scratch_size(int64_t positions, int64_t, int64_t threads) const {
  return Values::floats(*this, positions) + threads * per_thread(positions, dim, inner);
}

// The trail: the values of each layer, and every row's state before the call.
int64_t Mamba2Stage::trail_size(int64_t rows, int64_t positions) const {
  return int64_t(layers.size()) * Values::floats(*this, positions) + rows * copy_of(*this).floats();
}

void Mamba2Stage::roll_back(std::span<const Row> given, int64_t row, float* trail,
                            int64_t kept) const {
  const CallRows<Row> rows(given);
  const Row& of = rows[row];
  if (kept == of.count) return;
  const int64_t first = rows.first(row), of_layer = Values::floats(*this, rows.positions());
  const int64_t of_layers = int64_t(layers.size()) * of_layer, channels = channels_of(*this);
  copy_of(*this).restore(of, trail + of_layers + row * copy_of(*this).floats());
  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const Mamba2Layer& layer = layers[index];
    const Values values(*this, rows.positions(), trail + index * of_layer);
    for (int64_t at = first; at < first + kept; ++at) {
      convolve_position(values.both + at * projected_width(*this) + inner, layer.conv,
                        layer.conv_bias, of.window + index * of.window_stride, channels, taps,
                        values.convolved + at * channels, 0, channels);
      for (int64_t head = 0; head < heads; ++head) {
        values.scan(*this, index, head, at, of.ssm + index * of.ssm_stride);
      }
    }
  }
}

void Mamba2Stage::prefill(const Worker& worker, std::span<const Row> given, float* x, float* block,
                          float* trail) const {
  const CallRows<Row> rows(given);
  const int64_t positions = rows.positions();
  const int64_t channels = channels_of(*this), projected = projected_width(*this);
  const int64_t of_layer = Values::floats(*this, positions);
  // Every thread's own, (positions, dim or inner).
  float* normed = block + of_layer + worker.index * per_thread(positions, dim, inner);
  if (trail) {
    copy_of(*this).save_all(worker, given, trail + int64_t(layers.size()) * of_layer);
  }

  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const Mamba2Layer& layer = layers[index];
    const Values values(*this, positions, trail ? trail + index * of_layer : block);
    ask_for(worker, x, positions * dim);
    for (int64_t at = 0; at < positions; ++at) {
      cpu::normalize(x + at * dim, layer.norm, dim, eps, normed + at * dim);
    }
    multiply(worker, layer.in, normed, positions, values.both);
    wait_for(worker, &layer.out);

    const int64_t parts = (channels + kChannels - 1) / kChannels;
    worker.share(rows.size() * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t row = item / parts, begin = item % parts * kChannels;
        float* window = rows[row].window + index * rows[row].window_stride;
        const auto [from, to] = rows.range(row);
        for (int64_t at = from; at < to; ++at) {
          convolve_position(values.both + at * projected + inner, layer.conv, layer.conv_bias,
                            window, channels, taps, values.convolved + at * channels, begin,
                            std::min(begin + kChannels, channels));
        }
      }
    });
    wait_for(worker, &layer.out);

    worker.share(rows.size() * heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t row = item / heads, head = item % heads;
        float* ssm = rows[row].ssm + index * rows[row].ssm_stride;
        const auto [from, to] = rows.range(row);
        for (int64_t at = from; at < to; ++at) values.scan(*this, index, head, at, ssm);
      }
    });
    wait_for(worker, &layer.out);

    ask_for(worker, values.scanned, positions * inner);
    for (int64_t at = 0; at < positions; ++at) {
      cpu::normalize(values.scanned + at * inner, layer.gated_norm, inner, eps,
                     normed + at * inner);
    }
    multiply(worker, layer.out, normed, positions, x, Then::kStore, x);
    wait_for(worker, index + 1 < int64_t(layers.size()) ? &layers[index + 1].in : nullptr);
  }
}

void Mamba2Stage::normalize(const float* x, int64_t positions, float* out) const {
  for (int64_t at = 0; at < positions; ++at) {
    cpu::normalize(x + at * dim, norm, dim, eps, out + at * dim);
  }
}

}  // namespace mblm::cpu
