// What calls on rows leave to Python: stages that it steps, and long pieces.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "decode/rows.h"
#include "decode/torch/state.h"

namespace mblm::decode {

// What a hosted stage is to take in: a patch of each of some rows.
struct Wanted {
  int64_t stage = 0;
  at::Tensor ids = {};                   // (rows, R_n) int64
  std::vector<int64_t> positions = {};   // in the stage's sequence
  at::Tensor contexts = {};              // (rows, P_n, D_n), undefined for the most global stage
  std::vector<HostedState> states = {};  // of no use where the position is 0
};

// What it computes: the outputs (rows, D_n) float32, the contexts that they give, (rows, P_{n+1} *
// D_{n+1}) float32, and its states.
struct Supplied {
  at::Tensor outputs, contexts;
  std::vector<HostedState> states;
};

// Its functions may throw; what they have been asked for has not begun then.
class Host {
 public:
  virtual ~Host() = default;
  virtual Supplied step(const Wanted& wanted) = 0;
  // What a row is after more bytes, (n) int64, and was before; none if it had no bytes.
  virtual SavedState feed(std::optional<SavedState> before, const at::Tensor& ids) = 0;
};

}  // namespace mblm::decode
