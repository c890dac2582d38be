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

// Floats of a thread's own values of all positions, and a cache line more: threads write apart.
int64_t per_thread(int64_t positions, int64_t dim, int64_t inner) {
  return positions * std::max(dim, inner) / 16 * 16 + 32;
}

}  // namespace

int64_t Mamba2Stage::weights() const {
  int64_t count = 0;
  for (const Mamba2Layer& layer : layers) {
    count += layer.in.weights() + layer.out.weights();
  }
  return count;
}

int64_t Mamba2Stage::scratch_size(int64_t positions, int64_t, int64_t threads) const {
  const int64_t convolved = inner + 2 * states;
  return positions * (inner + convolved + heads + convolved + inner) +
         threads * per_thread(positions, dim, inner);
}

void Mamba2Stage::prefill(const Worker& worker, std::span<const Row> given, float* x,
                          float* block) const {
  const CallRows<Row> rows(given);
  const int64_t positions = rows.positions();
  const int64_t width = inner / heads;
  const int64_t channels = inner + 2 * states, projected = inner + channels + heads;
  float* both = block;                                // (positions, projected): gate, x B C, dt
  float* convolved = both + positions * projected;    // (positions, channels): x, B and C
  float* scanned = convolved + positions * channels;  // (positions, inner)
  // Every thread's own, (positions, dim or inner).
  float* normed = scanned + positions * inner + worker.index * per_thread(positions, dim, inner);

  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const Mamba2Layer& layer = layers[index];
    ask_for(worker, x, positions * dim);
    for (int64_t at = 0; at < positions; ++at) {
      cpu::normalize(x + at * dim, layer.norm, dim, eps, normed + at * dim);
    }
    multiply(worker, layer.in, normed, positions, both);
    wait_for(worker, &layer.out);

    const int64_t parts = (channels + kChannels - 1) / kChannels;
    worker.share(rows.size() * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t row = item / parts, begin = item % parts * kChannels;
        float* window = rows[row].window + index * rows[row].window_stride;
        const int64_t from = rows.first(row);
        for (int64_t at = from; at < from + rows[row].count; ++at) {
          convolve_position(both + at * projected + inner, layer.conv, layer.conv_bias, window,
                            channels, taps, convolved + at * channels, begin,
                            std::min(begin + kChannels, channels));
        }
      }
    });
    wait_for(worker, &layer.out);

    worker.share(rows.size() * heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t row = item / heads, head = item % heads;
        float* ssm = rows[row].ssm + index * rows[row].ssm_stride;
        const int64_t from = rows.first(row);
        for (int64_t at = from; at < from + rows[row].count; ++at) {
          const float* projection = both + at * projected;
          const float* mixed = convolved + at * channels;
          scan_head(layer, head, width, states, projection[inner + channels + head],
                    mixed + head * width, projection + head * width, mixed + inner,
                    mixed + inner + states, ssm + head * width * states,
                    scanned + at * inner + head * width);
        }
      }
    });
    wait_for(worker, &layer.out);

    ask_for(worker, scanned, positions * inner);
    for (int64_t at = 0; at < positions; ++at) {
      cpu::normalize(scanned + at * inner, layer.gated_norm, inner, eps, normed + at * inner);
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
