// One position of a Mamba-1 stage: see mamba1_stage.h.
#include "cpu/mamba1_stage.h"

#include <algorithm>

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

}  // namespace

int64_t Mamba1Stage::scratch_size(const State& state, int64_t threads) const {
  const int64_t rows = int64_t(state.rows.size());
  return rows * (2 * inner + 3 * inner + rank + 2 * states) + threads * (rows * dim / 16 * 16 + 32);
}

void Mamba1Stage::step(const Worker& worker, const State& state, float* x, float* block) const {
  Team& team = worker.team;
  const int64_t rows = int64_t(state.rows.size()), projected = rank + 2 * states;
  float* both = block;                           // (rows, 2 inner): the scanned branch and the gate
  float* convolved = both + rows * 2 * inner;    // (rows, inner)
  float* parameters = convolved + rows * inner;  // (rows, rank + 2 states): dt, B and C
  float* dt = parameters + rows * projected;     // (rows, inner)
  float* scanned = dt + rows * inner;            // (rows, inner)
  float* normed = scanned + rows * inner + worker.index * (rows * dim / 16 * 16 + 32);

  const auto for_channels = [&](auto function) {
    const int64_t parts = (inner + kChannels - 1) / kChannels;
    team.share(0, rows * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t begin = item % parts * kChannels;
        function(item / parts, begin, std::min(begin + kChannels, inner));
      }
    });
  };

  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const Mamba1Layer& layer = layers[index];
    for (int64_t row = 0; row < rows; ++row) {
      normalize(x + row * dim, layer.norm, dim, layer.eps, normed + row * dim);
    }
    multiply(worker, 0, layer.in, normed, rows, both);
    team.wait();

    for_channels([&](int64_t row, int64_t begin, int64_t end) {
      convolve_position(both + row * 2 * inner, layer.conv, layer.conv_bias,
                        state.rows[row].window + index * state.rows[row].window_stride, inner, taps,
                        convolved + row * inner, begin, end);
    });
    team.wait();

    multiply(worker, 0, layer.x, convolved, rows, parameters);
    team.wait();

    // dt's matrix takes the first values of a row of parameters: one row at a time.
    for (int64_t row = 0; row < rows; ++row) {
      multiply(worker, row % 2, layer.dt, parameters + row * projected, 1, dt + row * inner);
      if (row % 2 || row + 1 == rows) team.wait();
    }

    for_channels([&](int64_t row, int64_t begin, int64_t end) {
      const float* b = parameters + row * projected + rank;
      scan(layer, states, convolved + row * inner, both + row * 2 * inner + inner, dt + row * inner,
           b, b + states, state.rows[row].ssm + index * state.rows[row].ssm_stride,
           scanned + row * inner, begin, end);
    });
    team.wait();

    multiply(worker, 0, layer.out, scanned, rows, x, Then::kStore, x);
    team.wait();
  }
}

}  // namespace mblm::cpu
