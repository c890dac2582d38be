// A stage model in compiled code, as Python holds it: packed weights, no state.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

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
  std::vector<at::Tensor> weights;  // kept alive; all on one device
  std::variant<cpu::TransformerStage, cpu::Mamba1Stage, cpu::Mamba2Stage> stage;

  // The next positions of every row, x (rows, count, dim) -> (rows, count, dim). The rows are those
  // of one cache or of several: `state` holds the tensors of one after the other, which are written
  // to, `positions` the position of each.
  at::Tensor prefill(const at::Tensor& x, const std::vector<at::Tensor>& state,
                     const std::vector<int64_t>& positions) const;
};

// x (.., inputs) @ weight.T + bias: (.., outputs).
at::Tensor packed_linear(const at::Tensor& x, const PackedLinear& linear);

c10::intrusive_ptr<Stage> transformer_stage(const std::vector<at::Tensor>& weights, int64_t heads);
c10::intrusive_ptr<Stage> mamba1_stage(const std::vector<at::Tensor>& weights);
c10::intrusive_ptr<Stage> mamba2_stage(const std::vector<at::Tensor>& weights, double eps);

// Takes tensors off a list, checked: all on one device, each where and what its reader says.
class Weights {
 public:
  explicit Weights(const std::vector<at::Tensor>& tensors) : tensors_(tensors) {}

  bool empty() const { return next_ == tensors_.size(); }

  // A float32 tensor of this shape; -1 stands for any size.
  at::Tensor tensor(at::IntArrayRef shape);
  const float* vector(int64_t size) { return tensor({size}).const_data_ptr<float>(); }
  // A float32 tensor of one value, wherever it is.
  float number();
  // outputs of -1 stands for any number.
  cpu::Matrix matrix(int64_t outputs, int64_t inputs);

 private:
  const at::Tensor& take();
  void check(const at::Tensor& tensor, at::IntArrayRef shape) const;

  const std::vector<at::Tensor>& tensors_;
  size_t next_ = 0;
};

}  // namespace mblm
