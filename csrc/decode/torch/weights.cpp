// Checks packed weights and points to them: see weights.h.
#include "decode/torch/weights.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <initializer_list>
#include <utility>

#include "cpu/cores.h"
#include "cuda/decode_attention.h"
#include "cuda/decode_graph.h"
#include "decode/pages.h"
#include "torch/common.h"

namespace mblm::decode {
namespace {

using at::Tensor;

// Positions that tables are made for at first.
constexpr int64_t kFewestPositions = 64;

// A size that tensors are to have in common. While it is 0 it is not known, and becomes that of the
// first tensor, which must be positive.
struct Size {
  Size(int64_t& of) : value(of), learned(of == 0 ? &of : nullptr) {}
  Size(int64_t&& of) : value(of) {}

  int64_t value;
  int64_t* learned = nullptr;
};
using Sizes = std::initializer_list<Size>;

// Takes tensors off a list, each checked to be what its reader says, and all on one device.
class Reader {
 public:
  explicit Reader(const std::vector<Tensor>& tensors) : tensors_(tensors) {
    TORCH_CHECK_VALUE(!tensors.empty(), "weights must not be empty");
    const c10::Device device = tensors.front().device();
    TORCH_CHECK_VALUE(device.is_cpu() || (kCuda && device.is_cuda()),
                      "weights must be on the CPU, or on a GPU that this library is compiled for");
  }

  bool empty() const { return next_ == tensors_.size(); }

  // Float32 numbers of this shape.
  Tensor tensor(Sizes shape) {
    const Tensor& tensor = take();
    check(tensor, shape);
    check_type("weights", tensor, at::kFloat);
    return tensor;
  }
  // The same, or an undefined tensor for one without elements.
  Tensor optional(Sizes shape) {
    if (next_ < tensors_.size() && tensors_[next_].numel() == 0) {
      ++next_;
      return {};
    }
    return tensor(shape);
  }
  const float* floats(Sizes shape) { return tensor(shape).const_data_ptr<float>(); }

  // A linear layer's three tensors.
  cpu::Matrix matrix(Size outputs, Size inputs) {
    const Tensor& weight = take();
    const size_t index = next_ - 1;
    cpu::Matrix matrix;
    matrix.type = weight_type(weight);
    matrix.inputs = inputs.value;
    if (matrix.type == cpu::WeightType::kInt8 && !on_gpu(weight)) {
      // Its scale, which comes next, tells how many outputs the last tile is for.
      TORCH_CHECK_VALUE(next_ < tensors_.size() && tensors_[next_].dim() == 1, "weights[", next_,
                        "] must be the scale of each output of weights[", index, "]");
      matrix.outputs = outputs.learned ? tensors_[next_].size(0) : outputs.value;
      if (outputs.learned) *outputs.learned = matrix.outputs;
      check(weight, {divide_up(matrix.outputs, cpu::kTileOutputs),
                     divide_up(inputs.value, cpu::kTileInputs), int64_t(cpu::kTileOutputs),
                     int64_t(cpu::kTileInputs)});
    } else {
      check(weight, {outputs, inputs});
      matrix.outputs = weight.size(0);
    }
    matrix.weight = weight.const_data_ptr();
    const auto values = [&](bool is_needed) {
      const Tensor found = is_needed ? tensor({matrix.outputs}) : optional({matrix.outputs});
      return found.defined() ? found.const_data_ptr<float>() : nullptr;
    };
    matrix.scale = values(matrix.type == cpu::WeightType::kInt8);
    matrix.bias = values(false);
    return matrix;
  }

 private:
  const Tensor& take() {
    TORCH_CHECK_VALUE(next_ < tensors_.size(), "weights must hold more than ", tensors_.size(),
                      " tensors");
    return tensors_[next_++];
  }

  void check(const Tensor& tensor, Sizes shape) const {
    const c10::Device device = tensors_.front().device();
    TORCH_CHECK_VALUE(tensor.device() == device && tensor.is_contiguous(), "weights[", next_ - 1,
                      "] must be contiguous and on ", device, ", got ", tensor.device());
    bool fits = tensor.dim() == int64_t(shape.size());
    std::vector<int64_t> expected;
    for (const Size& size : shape) {
      const auto d = int64_t(expected.size());
      expected.push_back(size.learned ? -1 : size.value);
      fits = fits && tensor.size(d) > 0 && (size.learned || tensor.size(d) == size.value);
    }
    TORCH_CHECK_VALUE(fits, "weights[", next_ - 1, "] must have shape ", at::IntArrayRef(expected),
                      ", where -1 is any, got ", tensor.sizes());
    int64_t d = 0;
    for (const Size& size : shape) {
      if (size.learned) *size.learned = tensor.size(d);
      ++d;
    }
  }

  cpu::WeightType weight_type(const Tensor& weight) const {
    switch (weight.scalar_type()) {
      case at::kFloat:
        return cpu::WeightType::kFloat32;
      case at::kBFloat16:
        return cpu::WeightType::kBFloat16;
      case at::kChar:
        return cpu::WeightType::kInt8;
      default:
        TORCH_CHECK_TYPE(false, "weights[", next_ - 1, "] must be float32, bfloat16 or int8, got ",
                         weight.scalar_type());
    }
  }

  const std::vector<Tensor>& tensors_;
  size_t next_ = 0;
};

const float* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

// Cosines and sines of positions 0 .. count - 1, (count, frequencies) each.
std::array<Tensor, 2> rotations(const Tensor& frequencies, int64_t count) {
  const Tensor positions = at::arange(count, frequencies.options());
  const Tensor angles = positions.outer(frequencies);
  return {angles.cos(), angles.sin()};
}

}  // namespace

std::shared_ptr<Stage> transformer_stage(std::vector<Tensor> weights, int64_t heads) {
  auto result = std::make_shared<Stage>();
  result->weights = std::move(weights);
  Reader list(result->weights);
  cpu::TransformerStage stage;
  int64_t pairs = 0, width = 0, inner = 0;
  stage.norm = list.floats({stage.dim});
  result->frequencies = list.optional({pairs});
  do {
    cpu::TransformerLayer& layer = stage.layers.emplace_back();
    layer.attention_norm = list.floats({stage.dim});
    layer.q = list.matrix(width, stage.dim);
    layer.kv = list.matrix(2 * width, stage.dim);
    layer.out = list.matrix(stage.dim, width);
    layer.feed_forward_norm = list.floats({stage.dim});
    layer.expand = list.matrix(inner, stage.dim);
    layer.contract = list.matrix(stage.dim, inner);
  } while (!list.empty());
  TORCH_CHECK_VALUE(heads > 0 && width % heads == 0, "heads must divide ", width, ", got ", heads);
  stage.heads = heads;
  stage.head_dim = width / heads;
  TORCH_CHECK_VALUE(pairs == 0 || 2 * pairs == stage.head_dim,
                    "weights[1] must hold a frequency for each pair of a head's ", stage.head_dim,
                    " channels");
  TORCH_CHECK_VALUE(!on_gpu(result->weights[0]) || stage.head_dim <= cuda::kWidestHead,
                    "on a GPU, heads must be at most ", cuda::kWidestHead, " wide, got ",
                    stage.head_dim);
  result->dim = stage.dim;
  result->model = std::move(stage);
  return result;
}

std::shared_ptr<Stage> mamba1_stage(std::vector<Tensor> weights, const std::vector<double>& eps) {
  auto result = std::make_shared<Stage>();
  result->weights = std::move(weights);
  Reader list(result->weights);
  cpu::Mamba1Stage stage;
  int64_t projected = 0;
  for (const double of_layer : eps) {
    cpu::Mamba1Layer& layer = stage.layers.emplace_back();
    layer.eps = float(of_layer);
    layer.norm = list.floats({stage.dim});
    layer.rates = list.floats({stage.inner, stage.states});
    layer.conv = list.floats({stage.inner, stage.taps});
    layer.conv_bias = list.floats({stage.inner});
    layer.direct = list.floats({stage.inner});
    layer.in = list.matrix(2 * stage.inner, stage.dim);
    layer.x = list.matrix(projected, stage.inner);
    stage.rank = projected - 2 * stage.states;
    TORCH_CHECK_VALUE(stage.rank > 0, "weights: the rank must be positive, got ", stage.rank);
    layer.dt = list.matrix(stage.inner, stage.rank);
    layer.out = list.matrix(stage.dim, stage.inner);
  }
  TORCH_CHECK_VALUE(list.empty(), "eps must have one value per layer, got ", eps.size());
  result->dim = stage.dim;
  result->model = std::move(stage);
  return result;
}

std::shared_ptr<Stage> mamba2_stage(std::vector<Tensor> weights, double eps) {
  auto result = std::make_shared<Stage>();
  result->weights = std::move(weights);
  Reader list(result->weights);
  cpu::Mamba2Stage stage;
  int64_t channels = 0;
  stage.eps = float(eps);
  stage.norm = list.floats({stage.dim});
  do {
    cpu::Mamba2Layer& layer = stage.layers.emplace_back();
    layer.norm = list.floats({stage.dim});
    layer.gated_norm = list.floats({stage.inner});
    layer.rates = list.floats({stage.heads});
    layer.conv = list.floats({channels, stage.taps});
    layer.conv_bias = list.floats({channels});
    layer.dt_bias = list.floats({stage.heads});
    layer.direct = list.floats({stage.heads});
    layer.in = list.matrix(stage.inner + channels + stage.heads, stage.dim);
    layer.out = list.matrix(stage.dim, stage.inner);
  } while (!list.empty());
  stage.states = (channels - stage.inner) / 2;
  TORCH_CHECK_VALUE(stage.inner % stage.heads == 0, "weights: heads must divide ", stage.inner,
                    ", got ", stage.heads);
  TORCH_CHECK_VALUE(stage.states > 0 && channels == stage.inner + 2 * stage.states,
                    "weights: the convolution's channels must be the inner width and twice the "
                    "states, got ",
                    channels);
  result->dim = stage.dim;
  result->model = std::move(stage);
  return result;
}

std::shared_ptr<Stage> hosted_stage(int64_t dim) {
  TORCH_CHECK_VALUE(dim > 0, "dim must be positive, got ", dim);
  auto result = std::make_shared<Stage>();
  result->dim = dim;
  return result;
}

Hierarchy::Hierarchy(std::vector<std::shared_ptr<Stage>> stages, std::vector<int64_t> seq_lens,
                     std::vector<Tensor> weights, const std::vector<double>& eps)
    : stages_(std::move(stages)), weights_(std::move(weights)), frequencies_(stages_.size()) {
  cpu::note_threads();  // decoding begins
  const size_t count = stages_.size();
  TORCH_CHECK_VALUE(count > 0, "stages must not be empty");
  check_count("seq_lens", seq_lens.size(), count);
  check_count("eps", eps.size(), 2 * (count - 1));
  int64_t bytes = 1;
  for (const int64_t seq_len : seq_lens) {
    TORCH_CHECK_VALUE(seq_len > 0 && seq_len <= kMostBytes / bytes,
                      "seq_lens must be positive and of a product of at most ", kMostBytes,
                      ", got ", c10::IntArrayRef(seq_lens));
    bytes *= seq_len;
  }
  TORCH_CHECK_VALUE(stages_.back() && !std::holds_alternative<Hosted>(stages_.back()->model),
                    "the last of the stages must not be hosted");
  Reader list(weights_);
  for (const auto& stage : stages_) {
    TORCH_CHECK_VALUE(stage, "stages must not hold None");
    TORCH_CHECK_VALUE(stage->weights.empty() || stage->weights.front().device() == device(),
                      "stages must be on the weights' device");
  }
  int64_t width = stages_.back()->dim;
  int64_t num_tokens = 0;
  const float* const table = list.floats({num_tokens, width});
  parts_.to_logits = list.matrix(num_tokens, width);
  parts_.empty_logits = list.floats({num_tokens});
  parts_.schedule = Schedule(seq_lens);
  parts_.stages.resize(count);
  for (size_t n = 0; n < count; ++n) {
    StageParts& part = parts_.stages[n];
    part.dim = stages_[n]->dim;
    part.model = stages_[n]->model;
    part.start_token = list.floats({part.dim});
    int64_t positions = 0, pairs = 0;
    const Tensor fixed = list.optional({positions, part.dim});
    TORCH_CHECK_VALUE(!fixed.defined() || positions >= seq_lens[n],
                      "weights: fixed positions must be at least ", seq_lens[n], ", got ",
                      positions);
    part.fixed = data_or_null(fixed);
    frequencies_[n] = list.optional({pairs});
    TORCH_CHECK_VALUE(pairs == 0 || 2 * pairs == part.dim,
                      "weights: rotary positions must have a frequency for each pair of ", part.dim,
                      " channels, got ", pairs);
    if (n + 1 == count) {
      part.table = table;
      continue;
    }
    int64_t dim_below = stages_[n + 1]->dim;
    if (part.is_hosted()) {
      part.start.output = list.floats({part.dim});
      part.start.context_below = list.floats({seq_lens[n + 1], dim_below});
      continue;
    }
    int64_t flat = parts_.schedule.patch_size(int64_t(n)) * width;
    part.table = list.floats({num_tokens, width});
    part.flat_norm = {list.floats({flat}), list.floats({flat}), float(eps[2 * n])};
    part.project = list.matrix(part.dim, flat);
    part.norm = {list.floats({part.dim}), list.floats({part.dim}), float(eps[2 * n + 1])};
    part.to_context = list.matrix(seq_lens[n + 1] * dim_below, part.dim);
  }
  TORCH_CHECK_VALUE(list.empty(), "weights holds more than there are stages for");
  if (parts_.stages[0].fixed) parts_.max_length = bytes;
  static std::atomic<int64_t> last_id{0};
  parts_.start_id = ++last_id;
  if (is_on_cpu()) starts_ = add_start_states(parts_);
  wait_until_made();
}

bool Hierarchy::is_on_cpu() const {
  return !on_gpu(weights_.front());
}

// Other threads may use another stream of a GPU than the one that is to make weights and tables.
void Hierarchy::wait_until_made() const {
  if constexpr (kCuda) {
    if (is_on_cpu()) return;
    const c10::DeviceGuard guard(device());
    launch(device(), cuda::wait_for);
  }
}

std::shared_ptr<DeviceSlots> Hierarchy::exchange_slots(std::shared_ptr<DeviceSlots> slots) const {
  const std::lock_guard lock(table_mutex());
  left_slots_.swap(slots);
  return slots;
}

std::shared_ptr<const Parts> Hierarchy::parts(int64_t most_bytes) const {
  TORCH_CHECK_VALUE(most_bytes >= 0 && most_bytes <= kMostBytes, "a row must have at most ",
                    kMostBytes, " bytes, got ", most_bytes);
  std::shared_ptr<const Parts> last;
  {
    const std::lock_guard lock(table_mutex());
    last = last_;
  }
  if (last && last->most_bytes >= most_bytes) return last;
  struct Held {
    Parts parts;
    std::vector<Tensor> tables;  // kept alive
  };
  auto held = std::make_shared<Held>();
  Parts& parts = held->parts;
  parts = parts_;
  const int64_t patch_size = parts.schedule.patch_size(0);
  // Of the most global stage, which has no end, twice as many from time to time.
  const int64_t earlier = last ? last->most_bytes : 0;
  parts.most_bytes = std::max({most_bytes, 2 * earlier, kFewestPositions * patch_size});
  const auto keep = [&](Tensor table) {
    held->tables.push_back(std::move(table));
    return held->tables.back().const_data_ptr<float>();
  };
  for (int64_t n = 0; n < parts.schedule.stages(); ++n) {
    const bool has_end = n > 0 || parts.max_length > 0;
    const int64_t count = has_end ? parts.schedule.seq_len(n) : parts.most_bytes / patch_size;
    StageParts& part = parts.stages[n];
    if (frequencies_[n].defined()) {
      const auto [cos, sin] = rotations(frequencies_[n], count);
      part.rotation = keep(at::stack({cos, sin}, -1));
    }
    if (!stages_[n]->frequencies.defined()) continue;
    auto& model = std::get<cpu::TransformerStage>(part.model);
    model.angles = 1 + count;  // with the start token
    const auto [cos, sin] = rotations(stages_[n]->frequencies, model.angles);
    model.cos = keep(cos);
    model.sin = keep(sin);
  }
  wait_until_made();
  std::shared_ptr<const Parts> made(held, &parts);
  last = made;
  const std::lock_guard lock(table_mutex());
  if (!last_ || last_->most_bytes < parts.most_bytes) last_.swap(last);
  return made;
}

}  // namespace mblm::decode
