// The next positions of a Mamba-2 stage: see mamba2_stage.h.
#include "cpu/mamba2_stage.h"

#include <algorithm>
#include <cmath>

#include "cpu/mamba_call.h"
#include "cpu/mamba_step.h"

namespace mblm::cpu {
namespace {

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

// What a layer computes of all positions, cut from one block.
struct Values {
  float* both;       // (positions, projected): gate, x B C, dt
  float* convolved;  // (positions, channels): x, B and C
  float* scanned;    // (positions, inner)

  Values(const Mamba2Stage& stage, int64_t positions, float* block)
      : both(block),
        convolved(both + positions * projected(stage)),
        scanned(convolved + positions * channels(stage)) {}

  static int64_t projected(const Mamba2Stage& stage) {
    return stage.inner + channels(stage) + stage.heads;
  }
  static int64_t floats(const Mamba2Stage& stage, int64_t positions) {
    return positions * (projected(stage) + channels(stage) + stage.inner);
  }

  // See MambaCall.
  static int64_t channels(const Mamba2Stage& stage) { return stage.inner + 2 * stage.states; }
  static int64_t parts(const Mamba2Stage& stage) { return stage.heads; }
  void convolve(const Mamba2Stage& stage, int64_t index, int64_t at, float* window, int64_t begin,
                int64_t end) const {
    const Mamba2Layer& layer = stage.layers[index];
    convolve_position(both + at * projected(stage) + stage.inner, layer.conv, layer.conv_bias,
                      window, channels(stage), stage.taps, convolved + at * channels(stage), begin,
                      end);
  }
  void scan(const Mamba2Stage& stage, int64_t index, int64_t at, float* ssm, int64_t head) const {
    const int64_t inner = stage.inner, width = inner / stage.heads;
    const float* projection = both + at * projected(stage);
    const float* mixed = convolved + at * channels(stage);
    scan_head(stage.layers[index], head, width, stage.states,
              projection[inner + channels(stage) + head], mixed + head * width,
              projection + head * width, mixed + inner, mixed + inner + stage.states,
              ssm + head * width * stage.states, scanned + at * inner + head * width);
  }
};

using Call = MambaCall<Values, Mamba2Stage>;

}  // namespace

int64_t Mamba2Stage::scratch_size(int64_t positions, int64_t, int64_t threads) const {
  return Values::floats(*this, positions) +
         threads * floats_of_thread(positions, std::max(dim, inner));
}

int64_t Mamba2Stage::trail_size(int64_t rows, int64_t positions) const {
  return Call::trail_size(*this, rows, positions);
}

void Mamba2Stage::roll_back(std::span<const Row> rows, int64_t row, float* trail,
                            int64_t kept) const {
  Call(*this, rows).roll_back(row, trail, kept);
}

void Mamba2Stage::prefill(const Worker& worker, std::span<const Row> rows, float* x, float* block,
                          float* trail) const {
  const Call call(*this, rows);
  const int64_t positions = call.positions();
  // Every thread's own, (positions, dim or inner).
  float* normed = block + Values::floats(*this, positions) +
                  worker.index * floats_of_thread(positions, std::max(dim, inner));
  if (trail) call.save(worker, trail);
  for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
    const Mamba2Layer& layer = layers[index];
    const Values v = call.values(index, block, trail);
    ask_for(worker, x, positions * dim);
    for (int64_t at = 0; at < positions; ++at) {
      rms_norm(x + at * dim, layer.norm, dim, eps, normed + at * dim);
    }
    multiply(worker, layer.in, normed, positions, v.both);
    wait_for(worker, &layer.out);
    call.convolve(worker, index, v);
    wait_for(worker, &layer.out);
    call.scan(worker, index, v);
    wait_for(worker, &layer.out);
    ask_for(worker, v.scanned, positions * inner);
    for (int64_t at = 0; at < positions; ++at) {
      rms_norm(v.scanned + at * inner, layer.gated_norm, inner, eps, normed + at * inner);
    }
    multiply(worker, layer.out, normed, positions, x, Then::kStore, x);
    wait_for(worker, index + 1 < int64_t(layers.size()) ? &layers[index + 1].in : nullptr);
  }
}

void Mamba2Stage::normalize(const float* x, int64_t positions, float* out) const {
  for (int64_t at = 0; at < positions; ++at) {
    rms_norm(x + at * dim, norm, dim, eps, out + at * dim);
  }
}

}  // namespace mblm::cpu
