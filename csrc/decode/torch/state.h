// A row's state as named tensors: saved, and loaded when all of it fits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "decode/memory.h"
#include "decode/parts.h"
#include "decode/rows.h"

namespace mblm::decode {

// See mblm/inference/cache.py's State. What a hosted stage itself has is not among the tensors.
struct SavedState {
  int64_t length = 0, taken = 0;
  std::map<std::string, at::Tensor> tensors;
  std::map<int64_t, HostedState> hosted = {};  // by the stage; of no use at position 0
};

// The bytes that a state tells: all that a row knows.
at::Tensor save_tail(const Row& row);
SavedState save_state(const Parts& parts, const Memory& memory, const Row& row);

// A row of that state without memory for its stages. Throws c10::ValueError or c10::TypeError that
// names what does not fit the model or the rest.
RowState check_state(const Parts& parts, const Memory& memory, const SavedState& state);

// The same, in memory of its own. The engine's own start token is kept.
RowState load_state(const Parts& parts, Memory& memory, const SavedState& state);

}  // namespace mblm::decode
