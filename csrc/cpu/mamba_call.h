// The loops over rows of a Mamba stage's call: see mamba1_stage.cpp and mamba2_stage.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "cpu/call_rows.h"
#include "cpu/mamba_row.h"

namespace mblm::cpu {

// Values is what a layer computes of all positions, cut from one block. For a position `at` among
// them and a layer, convolve(stage, layer, at, window, begin, end) takes in channels [begin, end)
// of channels(stage), and scan(stage, layer, at, ssm, part) one of parts(stage), which are apart
// from each other. Positions of a row are taken in one after the other.
template <class Values, class Stage>
class MambaCall {
 public:
  MambaCall(const Stage& stage, std::span<const MambaRow> rows) : stage_(stage), rows_(rows) {}

  int64_t positions() const { return rows_.positions(); }

  // The trail: the values of each layer, and every row's state before the call.
  static int64_t trail_size(const Stage& stage, int64_t rows, int64_t positions) {
    return layers(stage) * (Values::floats(stage, positions) + rows * state_size(stage));
  }

  // A layer's values, in the trail if there is one.
  Values values(int64_t layer, float* block, float* trail) const {
    return {stage_, positions(), trail ? trail + layer * floats() : block};
  }

  // Saves the rows' states, shared by the team, which waits.
  void save(const Worker& worker, float* trail) const {
    worker.share(rows_.size(), 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        for_states(begin, trail, [](float* state, float* saved, int64_t size) {
          std::copy_n(state, size, saved);
        });
      }
    });
    worker.wait();
  }

  void convolve(const Worker& worker, int64_t layer, const Values& values) const {
    const int64_t channels = Values::channels(stage_);
    share(worker, (channels + kChannels - 1) / kChannels,
          [&](const MambaRow& row, int64_t at, int64_t part) {
            values.convolve(stage_, layer, at, row.window + layer * row.window_stride,
                            part * kChannels, std::min((part + 1) * kChannels, channels));
          });
  }

  void scan(const Worker& worker, int64_t layer, const Values& values) const {
    share(worker, Values::parts(stage_), [&](const MambaRow& row, int64_t at, int64_t part) {
      values.scan(stage_, layer, at, row.ssm + layer * row.ssm_stride, part);
    });
  }

  // Replays a row's first positions.
  void roll_back(int64_t row, float* trail, int64_t kept) const {
    const MambaRow& of = rows_[row];
    if (kept == of.count) return;
    for_states(row, trail, [](float* state, const float* saved, int64_t size) {
      std::copy_n(saved, size, state);
    });
    for (int64_t layer = 0; layer < layers(stage_); ++layer) {
      const Values v = values(layer, nullptr, trail);
      for (int64_t at = rows_.first(row); at < rows_.first(row) + kept; ++at) {
        v.convolve(stage_, layer, at, of.window + layer * of.window_stride, 0,
                   Values::channels(stage_));
        for (int64_t part = 0; part < Values::parts(stage_); ++part) {
          v.scan(stage_, layer, at, of.ssm + layer * of.ssm_stride, part);
        }
      }
    }
  }

 private:
  // Channels that a thread takes at a time.
  static constexpr int64_t kChannels = 64;

  static int64_t layers(const Stage& stage) { return int64_t(stage.layers.size()); }
  int64_t floats() const { return Values::floats(stage_, positions()); }
  static int64_t ssm_size(const Stage& stage) { return stage.inner * stage.states; }
  static int64_t window_size(const Stage& stage) {
    return (stage.taps - 1) * Values::channels(stage);
  }
  // Of one row and layer.
  static int64_t state_size(const Stage& stage) { return ssm_size(stage) + window_size(stage); }

  // Calls function(row, at, part) for all positions and parts.
  template <class Function>
  void share(const Worker& worker, int64_t parts, Function function) const {
    worker.share(rows_.size() * parts, 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        const auto [from, to] = rows_.range(begin / parts);
        for (int64_t at = from; at < to; ++at) function(rows_[begin / parts], at, begin % parts);
      }
    });
  }

  // Calls function(state, saved, size) for each part of a row's state and where the trail has it.
  template <class Function>
  void for_states(int64_t row, float* trail, Function function) const {
    const MambaRow& of = rows_[row];
    const int64_t ssm = ssm_size(stage_), window = window_size(stage_), all = layers(stage_);
    float* saved = trail + all * floats() + row * all * (ssm + window);
    for (int64_t layer = 0; layer < all; ++layer, saved += ssm + window) {
      function(of.ssm + layer * of.ssm_stride, saved, ssm);
      function(of.window + layer * of.window_stride, saved + ssm, window);
    }
  }

  const Stage& stage_;
  const CallRows<MambaRow> rows_;
};

}  // namespace mblm::cpu
