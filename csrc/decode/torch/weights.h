// A model's weights as Python has packed them: checked, kept alive, and shared by all its caches.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "decode/parts.h"
#include "decode/start.h"

namespace mblm::decode {

class DeviceSlots;

// A stage's model. It never changes.
struct Stage {
  int64_t dim = 0;
  StageModel model;                 // without the tables of its rotary positions
  std::vector<at::Tensor> weights;  // kept alive, all on one device; none if it is hosted
  at::Tensor frequencies;           // (head_dim / 2), of rotary positions, if it has them
};

// Below, a linear layer is three tensors: weight (outputs, inputs) in float32, bfloat16 or int8, on
// a CPU the last in tiles (see cpu/matrix.h); the scale of int8's outputs; and the bias, both
// (outputs). What there is not is a tensor without elements. All else is float32. Each function
// throws c10::ValueError or c10::TypeError that names what does not fit.

// The last norm (dim), the frequencies of rotary positions (head_dim / 2) or none; then of each
// layer attention's norm (dim), its linear layers q, kv, out; the feed-forward's norm (dim), its
// linear layers expand, contract.
std::shared_ptr<Stage> transformer_stage(std::vector<at::Tensor> weights, int64_t heads);

// Of each layer: norm (dim), rates -exp(A_log) (inner, states), convolution (inner, taps), its bias
// (inner), D (inner); the linear layers in, x, dt, out. eps: of each layer's norm.
std::shared_ptr<Stage> mamba1_stage(std::vector<at::Tensor> weights,
                                    const std::vector<double>& eps);

// The last norm (dim); then of each layer norm (dim), the gated norm (inner), rates -exp(A_log)
// (heads), convolution (inner + 2 states, taps), its bias, dt_bias (heads), D (heads); the linear
// layers in, out. eps: of all norms.
std::shared_ptr<Stage> mamba2_stage(std::vector<at::Tensor> weights, double eps);

// One that Python steps.
std::shared_ptr<Stage> hosted_stage(int64_t dim);

// Bytes that a row may have at most, so that sums and products of lengths do not overflow.
constexpr int64_t kMostBytes = int64_t(1) << 40;

// The stages of a model and what lies between them. All threads may use it.
class Hierarchy {
 public:
  // weights: the local stage's table (V, D_N), the linear layer of the logits, and the logits of a
  // row without bytes (V). Then for each stage, the most global one first: its start token (D_n),
  // fixed positions (>= P_n, D_n) or none, the frequencies of its rotary positions (D_n / 2) or
  // none. Of each stage above the local one, further: its table (V, D_N), the flat norm's weight
  // and bias (R_n D_N), the linear layer of patches, the norm's weight and bias (D_n), the linear
  // layer of the context; of one that is hosted, instead: its output after the start token (D_n)
  // and the context that this gives (P_{n+1}, D_{n+1}).
  //
  // eps: of the flat norm and the norm of each stage above the local one; of a hosted one of no
  // use.
  Hierarchy(std::vector<std::shared_ptr<Stage>> stages, std::vector<int64_t> seq_lens,
            std::vector<at::Tensor> weights, const std::vector<double>& eps);

  // For rows of at most so many bytes. What was given before stays as it is.
  std::shared_ptr<const Parts> parts(int64_t most_bytes) const;

  // Bytes that a row may have, 0 for no limit.
  int64_t max_length() const { return parts_.max_length; }
  int64_t num_tokens() const { return parts_.num_tokens(); }
  c10::Device device() const { return weights_.front().device(); }
  // Whether the kernels of a CPU read them, which no kernels of a GPU do that are emulated.
  bool is_on_cpu() const;

  // Leaves slots on a GPU, with the graphs of their kernels, to the next cache with these weights;
  // gives those that were left.
  std::shared_ptr<DeviceSlots> exchange_slots(std::shared_ptr<DeviceSlots> slots) const;

 private:
  void wait_until_made() const;

  std::vector<std::shared_ptr<Stage>> stages_;  // kept alive
  std::vector<at::Tensor> weights_;             // kept alive
  StartMemory starts_;
  std::vector<at::Tensor> frequencies_;  // per stage, of rotary positions, or undefined
  Parts parts_;                          // without tables

  // Guarded by table_mutex().
  mutable std::shared_ptr<const Parts> last_;
  mutable std::shared_ptr<DeviceSlots> left_slots_;
};

}  // namespace mblm::decode
