// A row of a Mamba stage's call, and copies of its state.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "cpu/team.h"

namespace mblm::cpu {

// One of the rows of a call, and its state, which is written to.
struct MambaRow {
  int64_t count = 1;        // positions of this call, at least 1
  float* ssm = nullptr;     // of the first layer, Mamba-1 (inner, states), Mamba-2 (.., P, states)
  float* window = nullptr;  // (taps - 1, channels of the convolution)
  int64_t ssm_stride = 0, window_stride = 0;  // from there to the next layer's
};

// A row's state in one piece of memory, layer after layer.
struct MambaCopy {
  int64_t layers, ssm, window;  // floats of a layer's

  // Of one row.
  int64_t floats() const { return layers * (ssm + window); }

  void save(const MambaRow& row, float* to) const {
    for (int64_t layer = 0; layer < layers; ++layer) {
      to = std::copy_n(row.ssm + layer * row.ssm_stride, ssm, to);
      to = std::copy_n(row.window + layer * row.window_stride, window, to);
    }
  }

  // Of all rows, one after the other, shared by the team, which waits.
  void save_all(const Worker& worker, std::span<const MambaRow> rows, float* to) const {
    worker.share(int64_t(rows.size()), 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) save(rows[begin], to + begin * floats());
    });
    worker.wait();
  }

  void restore(const MambaRow& row, const float* from) const {
    for (int64_t layer = 0; layer < layers; ++layer, from += ssm + window) {
      std::copy_n(from, ssm, row.ssm + layer * row.ssm_stride);
      std::copy_n(from + ssm, window, row.window + layer * row.window_stride);
    }
  }
};

}  // namespace mblm::cpu
