// The next positions of a Mamba-1 stage: see mamba1_stage.h.
#include "cpu/mamba1_stage.h"

#include <algorithm>

#include "cpu/call_rows.h"
#include "cpu/mamba_step.h"
#include "cpu/rms_norm.h"

namespace mblm::cpu {
namespace {

// Channels that a thread takes at a time in the loops over them.
constexpr int64_t kChannels = 64;

MBLM_CLONES void normalize(const float* x, const float* weight, int64_t n, float eps, float* out) {
  rms_norm(x, weight, n, eps, out);
}

// One row's channels [begin, end) of the selective scan, gated. x, gate, dt, out (inner); dt
// without softplus; b and c (states).
MBLM_CLONES void scan(const Mamba1Layer& layer, int64_t states, const float* x, const float* gate,
                      const float* dt, const float* b, const float* c, float* state, float* out,
                      int64_t begin, int64_t end) {
  for (int64_t channel = begin; channel < end; ++channel) {
    const float step = softplus(dt[channel]), value = x[channel];
    const float* rates = layer.rates + channel * states;
    const float y = update_state(
        state + channel * states,
        [&](int64_t i) MBLM_INLINE_LAMBDA { return vector_exp(step * rates[i]); }, step * value, b,
        c, states);
    out[channel] = (y + value * layer.direct[channel]) * silu(gate[channel]);
  }
}

// What a layer computes of all positions, cut from one block.
struct Values {
  float* both;        // (positions, 2 inner): the scanned branch and the gate
  float* convolved;   // (positions, inner)
  float* parameters;  // (positions, rank + 2 states): dt, B and C
  float* dt;          // (positions, inner)
  float* scanned;     // (positions, inner)

  Values(const Mamba1Stage& stage, int64_t positions, float* block)
      : both(block),
        convolved(both + positions * 2 * stage.inner),
        parameters(convolved + positions * stage.inner),
        dt(parameters + positions * (stage.rank + 2 * stage.states)),
        scanned(dt + positions * stage.inner) {}

  static int64_t floats(const Mamba1Stage& stage, int64_t positions) {
    return positions * (5 * stage.inner + stage.rank + 2 * stage.states);
  }
};

// Floats of a thread's own values of all positions, and a cache line more: threads write apart.
int64_t per_thread(int64_t positions, int64_t dim, int64_t rank) {
  return positions * std::max(dim, rank) / 16 * 16 + 32;
}

MambaCopy copy_of(const Mamba1Stage& stage) {
  return {int64_t(stage.layers.size()), stage.inner * stage.states, (stage.taps - 1) * stage.inner};
}

}  // namespace

int64_t Mamba1Stage::scratch_size(int64_t positions, int64_t, int64_t threads) const {
  return Values::floats(*this, positions) + threads * per_thread(positions, dim, rank);
}

// The trail: the values of each layer, and every row's state before the call.
int64_t Mamba1Stage::trail_size(int64_t rows, int64_t positions) const {
  return int64_t(layers.size()) * Values::floats(*this, positions) + rows * copy_of(*this).floats();
}

void Mamba1Stage::roll_back(std::span<const Row> given, int64_t row, float* trail,
                            int64_t kept) const {
  const CallRows<Row> rows(given);
  const Row& of = rows[row];
  if (kept == of.count) return;
  const int64_t first = rows.first(row), of_layer = Values::floats(*this, rows.positions());
  const int64_t of_layers = int64_t(layers.size()) * of_layer;
  copy_of(*this).restore(of, trail + of_layers + row * copy_of(*this).floats());
  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const Mamba1Layer& layer = layers[index];
    const Values values(*this, rows.positions(), trail + index * of_layer);
    for (int64_t at = first; at < first + kept; ++at) {
      float* x = values.convolved + at * inner;
      const float *both = values.both + at * 2 * inner, *dt = values.dt + at * inner;
      const float* b = values.parameters + at * (rank + 2 * states) + rank;
      convolve_position(both, layer.conv, layer.conv_bias, of.window + index * of.window_stride,
                        inner, taps, x, 0, inner);
      scan(layer, states, x, both + inner, dt, b, b + states, of.ssm + index * of.ssm_stride,
           values.scanned + at * inner, 0, inner);
    }
  }
}

void Mamba1Stage::prefill(const Worker& worker, std::span<const Row> given, float* x, float* block,
                          float* trail) const {
  const CallRows<Row> rows(given);
  const int64_t positions = rows.positions();
  const int64_t projected = rank + 2 * states;
  const int64_t of_layer = Values::floats(*this, positions);
  // Every thread's own, (positions, dim or rank).
  float* own = block + of_layer + worker.index * per_thread(positions, dim, rank);
  if (trail) {
    copy_of(*this).save_all(worker, given, trail + int64_t(layers.size()) * of_layer);
  }

  // Calls function(row, at, begin, end) for each position of a row in turn, `at` among all
  // positions, and a part of its channels.
  const auto for_channels = [&](auto function) {
    const int64_t parts = (inner + kChannels - 1) / kChannels;
    worker.share(rows.size() * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t row = item / parts, begin = item % parts * kChannels;
        const auto [from, to] = rows.range(row);
        for (int64_t at = from; at < to; ++at) {
          function(rows[row], at, begin, std::min(begin + kChannels, inner));
        }
      }
    });
  };

  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const Mamba1Layer& layer = layers[index];
    const Values v(*this, positions, trail ? trail + index * of_layer : block);
    ask_for(worker, x, positions * dim);
    for (int64_t at = 0; at < positions; ++at) {
      cpu::normalize(x + at * dim, layer.norm, dim, layer.eps, own + at * dim);
    }
    multiply(worker, layer.in, own, positions, v.both);
    wait_for(worker, &layer.x);

    for_channels([&](const MambaRow& row, int64_t at, int64_t begin, int64_t end) {
      convolve_position(v.both + at * 2 * inner, layer.conv, layer.conv_bias,
                        row.window + index * row.window_stride, inner, taps,
                        v.convolved + at * inner, begin, end);
    });
    wait_for(worker, &layer.x);

    multiply(worker, layer.x, v.convolved, positions, v.parameters);
    wait_for(worker, &layer.dt);

    for (int64_t at = 0; at < positions; ++at) {
      std::copy_n(v.parameters + at * projected, rank, own + at * rank);
    }
    multiply(worker, layer.dt, own, positions, v.dt);
    wait_for(worker, &layer.out);

    for_channels([&](const MambaRow& row, int64_t at, int64_t begin, int64_t end) {
      const float* b = v.parameters + at * projected + rank;
      scan(layer, states, v.convolved + at * inner, v.both + at * 2 * inner + inner,
           v.dt + at * inner, b, b + states, row.ssm + index * row.ssm_stride,
           v.scanned + at * inner, begin, end);
    });
    wait_for(worker, &layer.out);

    multiply(worker, layer.out, v.scanned, positions, x, Then::kStore, x);
    wait_for(worker, index + 1 < int64_t(layers.size()) ? &layers[index + 1].in : nullptr);
  }
}

// It has none.
void Mamba1Stage::normalize(const float* x, int64_t positions, float* out) const {
  if (out != x) std::copy_n(x, positions * dim, out);
}

}  // namespace mblm::cpu
