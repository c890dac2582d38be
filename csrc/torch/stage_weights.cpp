// Builds the stages and the hierarchy from their lists of weights.

#include "common.h"
#include "cuda/decode_attention.h"
#include "hierarchy.h"

namespace mblm {

using at::Tensor;

void Weights::check(const Tensor& tensor, at::IntArrayRef shape) const {
  const c10::Device device = tensors_.front().device();
  TORCH_CHECK_VALUE(device.is_cpu() || (kCuda && device.is_cuda()),
                    "weights must be on the CPU, or on a GPU that this library is compiled for");
  TORCH_CHECK_VALUE(tensor.device() == device && tensor.is_contiguous(), "weights[", next_ - 1,
                    "] must be contiguous and on ", device, ", got ", tensor.device());
  bool fits = tensor.dim() == int64_t(shape.size());
  for (int64_t d = 0; fits && d < tensor.dim(); ++d) {
    fits = shape[d] == -1 || tensor.size(d) == shape[d];
  }
  TORCH_CHECK_VALUE(fits, "weights[", next_ - 1, "] must have shape ", shape, ", got ",
                    tensor.sizes());
}

const Tensor& Weights::take() {
  TORCH_CHECK_VALUE(next_ < tensors_.size(), "weights must hold more than ", tensors_.size(),
                    " tensors");
  return tensors_[next_++];
}

Tensor Weights::tensor(at::IntArrayRef shape) {
  const Tensor& tensor = take();
  check(tensor, shape);
  check_type("weights", tensor, at::kFloat);
  return tensor;
}

float Weights::number() {
  const Tensor& tensor = take();
  check_type("weights", tensor, at::kFloat);
  TORCH_CHECK_VALUE(tensor.numel() == 1, "weights[", next_ - 1, "] must be one value, got ",
                    tensor.sizes());
  return tensor.item<float>();
}

cpu::Matrix Weights::matrix(int64_t outputs, int64_t inputs) {
  const Tensor& weight = take();
  const bool has_tiles = weight.scalar_type() == at::kChar && !on_gpu(weight);
  cpu::Matrix matrix;
  matrix.inputs = inputs;
  if (has_tiles) {
    // Its scale, which comes next, tells how many outputs the last tile is for.
    TORCH_CHECK_VALUE(next_ < tensors_.size() && tensors_[next_].dim() == 1, "weights[", next_,
                      "] must be the scale of each output of weights[", next_ - 1, "]");
    matrix.outputs = outputs == -1 ? tensors_[next_].size(0) : outputs;
    const auto tiles = [](int64_t size, int64_t of_tile) { return (size + of_tile - 1) / of_tile; };
    check(weight, {tiles(matrix.outputs, cpu::kTileOutputs), tiles(inputs, cpu::kTileInputs),
                   cpu::kTileOutputs, cpu::kTileInputs});
  } else {
    check(weight, {outputs, inputs});
    matrix.outputs = weight.size(0);
  }
  matrix.weight = weight.const_data_ptr();
  switch (weight.scalar_type()) {
    case at::kFloat:
      matrix.type = cpu::WeightType::kFloat32;
      break;
    case at::kBFloat16:
      matrix.type = cpu::WeightType::kBFloat16;
      break;
    case at::kChar:
      matrix.type = cpu::WeightType::kInt8;
      break;
    default:
      TORCH_CHECK_TYPE(false, "weights[", next_ - 1, "] must be float32, bfloat16 or int8, got ",
                       weight.scalar_type());
  }
  const auto optional = [&](bool is_needed) -> const float* {
    const Tensor& values = take();
    if (values.numel() == 0 && !is_needed) return nullptr;
    check(values, {matrix.outputs});
    check_type("weights", values, at::kFloat);
    return values.const_data_ptr<float>();
  };
  matrix.scale = optional(matrix.type == cpu::WeightType::kInt8);
  matrix.bias = optional(false);
  return matrix;
}

c10::intrusive_ptr<Stage> transformer_stage(const std::vector<Tensor>& weights, int64_t heads) {
  auto result = c10::make_intrusive<Stage>();
  result->weights = weights;
  Weights list(result->weights);
  cpu::TransformerStage stage;
  stage.norm = [&] {
    const Tensor norm = list.tensor({-1});
    stage.dim = norm.size(0);
    return norm.const_data_ptr<float>();
  }();
  stage.heads = heads;
  while (!list.empty()) {
    cpu::TransformerLayer layer{};
    layer.attention_norm = list.vector(stage.dim);
    layer.q = list.matrix(-1, stage.dim);
    const int64_t width = layer.q.outputs;
    TORCH_CHECK_VALUE(heads > 0 && width % heads == 0, "heads must divide ", width, ", got ",
                      heads);
    TORCH_CHECK_VALUE(stage.layers.empty() || width == heads * stage.head_dim,
                      "weights: layers must have one width");
    stage.head_dim = width / heads;
    layer.kv = list.matrix(2 * width, stage.dim);
    layer.out = list.matrix(stage.dim, width);
    layer.feed_forward_norm = list.vector(stage.dim);
    layer.expand = list.matrix(-1, stage.dim);
    TORCH_CHECK_VALUE(
        stage.layers.empty() || layer.expand.outputs == stage.layers[0].expand.outputs,
        "weights: layers must have one inner width");
    layer.contract = list.matrix(stage.dim, layer.expand.outputs);
    stage.layers.push_back(layer);
  }
  TORCH_CHECK_VALUE(!on_gpu(weights[0]) || stage.head_dim <= cuda::kWidestHead,
                    "on a GPU, heads must be at most ", cuda::kWidestHead, " wide, got ",
                    stage.head_dim);
  result->stage = std::move(stage);
  return result;
}

c10::intrusive_ptr<Stage> mamba1_stage(const std::vector<Tensor>& weights) {
  TORCH_CHECK_VALUE(!weights.empty(), "weights must hold those of a layer");
  auto result = c10::make_intrusive<Stage>();
  result->weights = weights;
  Weights list(result->weights);
  cpu::Mamba1Stage stage;
  while (!list.empty()) {
    const bool is_first = stage.layers.empty();
    cpu::Mamba1Layer layer{};
    const Tensor norm = list.tensor({is_first ? -1 : stage.dim});
    layer.norm = norm.const_data_ptr<float>();
    layer.eps = list.number();
    const Tensor rates = list.tensor({is_first ? -1 : stage.inner, is_first ? -1 : stage.states});
    layer.rates = rates.const_data_ptr<float>();
    const Tensor conv = list.tensor({rates.size(0), is_first ? -1 : stage.taps});
    layer.conv = conv.const_data_ptr<float>();
    if (is_first) {
      stage.dim = norm.size(0);
      stage.inner = rates.size(0);
      stage.states = rates.size(1);
      stage.taps = conv.size(1);
      TORCH_CHECK_VALUE(stage.taps > 0, "weights: the convolution needs a tap");
    }
    layer.conv_bias = list.vector(stage.inner);
    layer.direct = list.vector(stage.inner);
    layer.in = list.matrix(2 * stage.inner, stage.dim);
    layer.x = list.matrix(-1, stage.inner);
    const int64_t rank = layer.x.outputs - 2 * stage.states;
    TORCH_CHECK_VALUE(rank > 0 && (is_first || rank == stage.rank),
                      "weights: layers must have one rank, which is positive, got ", rank);
    stage.rank = rank;
    layer.dt = list.matrix(stage.inner, rank);
    layer.out = list.matrix(stage.dim, stage.inner);
    stage.layers.push_back(layer);
  }
  result->stage = std::move(stage);
  return result;
}

c10::intrusive_ptr<Stage> mamba2_stage(const std::vector<Tensor>& weights, double eps) {
  auto result = c10::make_intrusive<Stage>();
  result->weights = weights;
  Weights list(result->weights);
  cpu::Mamba2Stage stage;
  const Tensor final_norm = list.tensor({-1});
  stage.norm = final_norm.const_data_ptr<float>();
  stage.dim = final_norm.size(0);
  stage.eps = float(eps);
  while (!list.empty()) {
    const bool is_first = stage.layers.empty();
    cpu::Mamba2Layer layer{};
    layer.norm = list.vector(stage.dim);
    const Tensor gated_norm = list.tensor({is_first ? -1 : stage.inner});
    layer.gated_norm = gated_norm.const_data_ptr<float>();
    const Tensor rates = list.tensor({is_first ? -1 : stage.heads});
    layer.rates = rates.const_data_ptr<float>();
    const Tensor conv = list.tensor({-1, is_first ? -1 : stage.taps});
    layer.conv = conv.const_data_ptr<float>();
    if (is_first) {
      stage.inner = gated_norm.size(0);
      stage.heads = rates.size(0);
      stage.taps = conv.size(1);
      stage.states = (conv.size(0) - stage.inner) / 2;
      TORCH_CHECK_VALUE(stage.heads > 0 && stage.inner % stage.heads == 0 && stage.taps > 0,
                        "weights: heads must divide the inner width, and there must be a tap");
    }
    TORCH_CHECK_VALUE(stage.states > 0 && conv.size(0) == stage.inner + 2 * stage.states,
                      "weights: the convolution's channels must be the inner width and twice the "
                      "states, got ",
                      conv.size(0));
    layer.conv_bias = list.vector(conv.size(0));
    layer.dt_bias = list.vector(stage.heads);
    layer.direct = list.vector(stage.heads);
    layer.in = list.matrix(stage.inner + conv.size(0) + stage.heads, stage.dim);
    layer.out = list.matrix(stage.dim, stage.inner);
    stage.layers.push_back(layer);
  }
  result->stage = std::move(stage);
  return result;
}

c10::intrusive_ptr<Hierarchy> hierarchy(const std::vector<c10::intrusive_ptr<Stage>>& stages,
                                        const std::vector<int64_t>& seq_lens,
                                        const std::vector<Tensor>& weights,
                                        const std::vector<double>& eps) {
  TORCH_CHECK_VALUE(!stages.empty(), "stages must not be empty");
  check_count("seq_lens", seq_lens.size(), stages.size());
  check_count("eps", eps.size(), 2 * (stages.size() - 1));
  auto result = c10::make_intrusive<Hierarchy>();
  result->stages = stages;
  result->weights = weights;
  result->parts.resize(stages.size());
  for (const auto& stage : stages) {
    TORCH_CHECK_VALUE(weights.empty() || stage->weights.front().device() == weights[0].device(),
                      "stages must be on the weights' device");
  }
  int64_t patch_size = 1;
  for (size_t n = stages.size(); n-- > 0;) {
    TORCH_CHECK_VALUE(seq_lens[n] > 0 && seq_lens[n] <= INT64_MAX / patch_size,
                      "seq_lens must be positive, got ", seq_lens[n]);
    cpu::RunStage& part = result->parts[n];
    part.dim = std::visit([](const auto& model) { return model.dim; }, stages[n]->stage);
    part.seq_len = seq_lens[n];
    part.patch_size = patch_size;
    patch_size *= seq_lens[n];
  }
  Weights list(result->weights);
  const int64_t width = result->parts.back().dim;
  const Tensor table = list.tensor({-1, width});
  result->parts.back().table = table.const_data_ptr<float>();
  TORCH_CHECK_VALUE(table.size(0) > 0, "weights[0] must have a row for each token");
  result->to_logits = list.matrix(table.size(0), width);
  for (size_t n = 0; n + 1 < stages.size(); ++n) {
    cpu::RunStage& part = result->parts[n];
    const cpu::RunStage& below = result->parts[n + 1];
    const int64_t flat = part.patch_size * width;
    part.table = list.tensor({table.size(0), width}).const_data_ptr<float>();
    part.flat_norm.weight = list.vector(flat);
    part.flat_norm.bias = list.vector(flat);
    part.flat_norm.eps = float(eps[2 * n]);
    part.project = list.matrix(part.dim, flat);
    part.norm.weight = list.vector(part.dim);
    part.norm.bias = list.vector(part.dim);
    part.norm.eps = float(eps[2 * n + 1]);
    part.to_context = list.matrix(below.seq_len * below.dim, part.dim);
  }
  TORCH_CHECK_VALUE(list.empty(), "weights holds more than there are stages for");
  return result;
}

}  // namespace mblm
