// Weights as the products of the CPU read them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/matrix_kernels.h"

namespace mblm::test {

// Rows of weights (outputs, inputs) as kernels of this type read them.
template <class W>
std::vector<W> pack(const std::vector<W>& rows, int64_t, int64_t) {
  return rows;
}

inline std::vector<int8_t> pack(const std::vector<int8_t>& rows, int64_t outputs, int64_t inputs) {
  using cpu::kTileInputs, cpu::kTileOutputs, cpu::round_up;
  const int64_t filled = round_up(inputs, kTileInputs);
  std::vector<int8_t> tiles(round_up(outputs, kTileOutputs) * filled);
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t first = output / kTileOutputs * filled * kTileOutputs;
    for (int64_t input = 0; input < inputs; ++input) {
      const int64_t tile = first + input / kTileInputs * kTileOutputs * kTileInputs;
      tiles[tile + output % kTileOutputs * kTileInputs + input % kTileInputs] =
          rows[output * inputs + input];
    }
  }
  return tiles;
}

}  // namespace mblm::test
