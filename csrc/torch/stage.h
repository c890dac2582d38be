// A stage model in compiled code, as Python holds it: packed weights, no state.
#pragma once

#include <torch/custom_class.h>

#include <tuple>
#include <variant>
#include <vector>

#include "cpu/mamba1_stage.h"
#include "cpu/mamba2_stage.h"
#include "cpu/transformer_stage.h"

namespace mblm {

// A linear layer's weight (outputs, inputs) in float32, bfloat16 or int8, the scale of int8's rows
// and the bias, each (outputs); what there is not has no elements.
using PackedLinear = std::vector<at::Tensor>;

struct Stage : torch::CustomClassHolder {
  std::vector<at::Tensor> weights;  // kept alive
  std::variant<cpu::TransformerStage, cpu::Mamba1Stage, cpu::Mamba2Stage> stage;

  // One position of every row, x (rows, dim) -> (rows, dim). The rows are those of one cache or
  // of several: `state` holds the tensors of one after the other, which are written to, `positions`
  // the position of each.
  at::Tensor step(const at::Tensor& x, const std::vector<at::Tensor>& state,
                  const std::vector<int64_t>& positions) const;

  // See Run in cpu/run.h. max_tokens, max_steps, cached (positions in the cache) and first are per
  // cache, x (rows, dim), pending (rows), context (rows, positions, dim) and uniform (rows, most
  // tokens, vocabulary) per row. Returns the sampled ids (rows, most tokens), the outputs of the
  // last positions (rows, dim), and per cache how many bytes were sampled and positions taken in.
  std::tuple<at::Tensor, at::Tensor, std::vector<int64_t>, std::vector<int64_t>> run(
      const at::Tensor& x, const std::optional<at::Tensor>& pending,
      const std::vector<int64_t>& max_tokens, const std::vector<int64_t>& max_steps,
      const std::vector<at::Tensor>& state, const std::vector<int64_t>& cached,
      const std::vector<int64_t>& first, const at::Tensor& table,
      const std::optional<at::Tensor>& positions, const std::optional<at::Tensor>& rotation,
      const std::optional<at::Tensor>& context, const PackedLinear& to_logits, double temperature,
      int64_t top_k, double top_p, const std::optional<at::Generator>& generator,
      const std::optional<at::Tensor>& uniform, const std::optional<at::Tensor>& ends) const;
};

// x (.., inputs) @ weight.T + bias: (.., outputs).
at::Tensor packed_linear(const at::Tensor& x, const PackedLinear& linear);

c10::intrusive_ptr<Stage> transformer_stage(const std::vector<at::Tensor>& weights, int64_t heads);
c10::intrusive_ptr<Stage> mamba1_stage(const std::vector<at::Tensor>& weights);
c10::intrusive_ptr<Stage> mamba2_stage(const std::vector<at::Tensor>& weights, double eps);

// Takes tensors off a list, checked: each must be where and what its reader says.
class Weights {
 public:
  explicit Weights(const std::vector<at::Tensor>& tensors) : tensors_(tensors) {}

  bool empty() const { return next_ == tensors_.size(); }

  // A float32 tensor of this shape; -1 stands for any size.
  at::Tensor tensor(at::IntArrayRef shape);
  const float* vector(int64_t size) { return tensor({size}).const_data_ptr<float>(); }
  // outputs of -1 stands for any number.
  cpu::Matrix matrix(int64_t outputs, int64_t inputs);

 private:
  const at::Tensor& take();

  const std::vector<at::Tensor>& tensors_;
  size_t next_ = 0;
};

}  // namespace mblm
