// The next positions of a Mamba-1 stage: see mamba1_stage.h.
#include "cpu/mamba1_stage.h"

#include <algorithm>

#include "cpu/mamba_call.h"
#include "cpu/mamba_step.h"

namespace mblm::cpu {
namespace {

// Channels of a part of the scan.
constexpr int64_t kChannels = 64;

// One row's channels [begin, end) of the selective scan, gated. x, gate, dt, out (inner); dt
// without softplus; b and c (states).
MBLM_CLONES void scan_channels(const Mamba1Layer& layer, int64_t states, const float* x,
                               const float* gate, const float* dt, const float* b, const float* c,
                               float* state, float* out, int64_t begin, int64_t end) {
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

  // See MambaCall.
  static int64_t channels(const Mamba1Stage& stage) { return stage.inner; }
  static int64_t parts(const Mamba1Stage& stage) {
    return (stage.inner + kChannels - 1) / kChannels;
  }
  void convolve(const Mamba1Stage& stage, int64_t index, int64_t at, float* window, int64_t begin,
                int64_t end) const {
    const Mamba1Layer& layer = stage.layers[index];
    convolve_position(both + at * 2 * stage.inner, layer.conv, layer.conv_bias, window, stage.inner,
                      stage.taps, convolved + at * stage.inner, begin, end);
  }
  void scan(const Mamba1Stage& stage, int64_t index, int64_t at, float* ssm, int64_t part) const {
    const int64_t inner = stage.inner, states = stage.states;
    const float* b = parameters + at * (stage.rank + 2 * states) + stage.rank;
    scan_channels(stage.layers[index], states, convolved + at * inner,
                  both + at * 2 * inner + inner, dt + at * inner, b, b + states, ssm,
                  scanned + at * inner, part * kChannels, std::min((part + 1) * kChannels, inner));
  }
};

using Call = MambaCall<Values, Mamba1Stage>;

}  // namespace

int64_t Mamba1Stage::scratch_size(int64_t positions, int64_t, int64_t threads) const {
  return Values::floats(*this, positions) +
         threads * floats_of_thread(positions, std::max(dim, rank));
}

int64_t Mamba1Stage::trail_size(int64_t rows, int64_t positions) const {
  return Call::trail_size(*this, rows, positions);
}

void Mamba1Stage::roll_back(std::span<const Row> rows, int64_t row, float* trail,
                            int64_t kept) const {
  Call(*this, rows).roll_back(row, trail, kept);
}

void Mamba1Stage::prefill(const Worker& worker, std::span<const Row> rows, float* x, float* block,
                          float* trail) const {
  const Call call(*this, rows);
  const int64_t positions = call.positions(), projected = rank + 2 * states;
  // Every thread's own, (positions, dim or rank).
  float* own = block + Values::floats(*this, positions) +
               worker.index * floats_of_thread(positions, std::max(dim, rank));
  if (trail) call.save(worker, trail);
  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const Mamba1Layer& layer = layers[index];
    const Values v = call.values(index, block, trail);
    ask_for(worker, x, positions * dim);
    for (int64_t at = 0; at < positions; ++at) {
      rms_norm(x + at * dim, layer.norm, dim, layer.eps, own + at * dim);
    }
    multiply(worker, layer.in, own, positions, v.both);
    wait_for(worker, &layer.x);
    call.convolve(worker, index, v);
    wait_for(worker, &layer.x);
    multiply(worker, layer.x, v.convolved, positions, v.parameters);
    wait_for(worker, &layer.dt);
    for (int64_t at = 0; at < positions; ++at) {
      std::copy_n(v.parameters + at * projected, rank, own + at * rank);
    }
    multiply(worker, layer.dt, own, positions, v.dt);
    wait_for(worker, &layer.out);
    call.scan(worker, index, v);
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
