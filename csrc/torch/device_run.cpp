// Glue of runs on a GPU: checks and binding.
#ifdef MBLM_CUDA
#include "device_run.h"

#include <type_traits>

#include "common.h"
#include "stage_state.h"

namespace mblm {

namespace {

using at::Tensor;

// Takes the tensors of a run off its list, checked, and keeps them.
class Binder {
 public:
  Binder(const std::vector<Tensor>& tensors, const c10::Device& device)
      : tensors_(tensors), device_(device) {}

  // Where the values of the next tensor are; -1 stands for any size.
  template <class T>
  T* next(const char* name, at::IntArrayRef shape) {
    const Tensor& tensor = take();
    check_type(name, tensor, c10::CppTypeToScalarType<T>::value);
    bool fits = tensor.dim() == int64_t(shape.size());
    for (int64_t d = 0; fits && d < tensor.dim(); ++d) {
      fits = shape[d] == -1 || tensor.size(d) == shape[d];
    }
    TORCH_CHECK_VALUE(fits, name, " must have shape ", shape, ", got ", tensor.sizes());
    TORCH_CHECK_VALUE(tensor.device() == device_ && tensor.is_contiguous(), name,
                      " must be contiguous and on ", device_, ", got ", tensor.device());
    return static_cast<T*>(tensor.data_ptr());
  }
  // The same, or null for a tensor without values. The first dimension may be larger.
  float* table(const char* name, int64_t rows, at::IntArrayRef others) {
    TORCH_CHECK_VALUE(next_ < tensors_.size(), "tensors must hold more than ", tensors_.size());
    if (tensors_[next_].numel() == 0) {
      ++next_;
      return nullptr;
    }
    const int64_t size = tensors_[next_].dim() ? tensors_[next_].size(0) : 0;
    TORCH_CHECK_VALUE(size >= rows, name, " must have a row for each of ", rows, ", got ", size);
    std::vector<int64_t> shape = {size};
    shape.insert(shape.end(), others.begin(), others.end());
    return next<float>(name, shape);
  }
  int64_t size_of_next(int64_t dimension) const {
    return next_ < tensors_.size() && tensors_[next_].dim() > dimension
               ? tensors_[next_].size(dimension)
               : 0;
  }
  Group group(size_t count) {
    TORCH_CHECK_VALUE(count <= tensors_.size() - next_, "tensors must hold more than ",
                      tensors_.size());
    next_ += count;
    return Group(tensors_).slice(next_ - count, count);
  }
  bool empty() const { return next_ == tensors_.size(); }

 private:
  const Tensor& take() {
    TORCH_CHECK_VALUE(next_ < tensors_.size(), "tensors must hold more than ", tensors_.size());
    return tensors_[next_++];
  }

  const std::vector<Tensor>& tensors_;
  const c10::Device device_;
  size_t next_ = 0;
};

template <class Row>
cuda::AnyModel any_model(const cpu::TransformerStage& model, const Row& row) {
  return cuda::ModelOnDevice<cpu::TransformerStage, cuda::TransformerRow>{&model, row};
}
template <class Model>
cuda::AnyModel any_model(const Model& model, const cuda::MambaRow& row) {
  return cuda::ModelOnDevice<Model, cuda::MambaRow>{&model, row};
}

}  // namespace

c10::intrusive_ptr<DeviceRun> device_run(const c10::intrusive_ptr<Hierarchy>& hierarchy,
                                         const std::vector<Tensor>& tensors,
                                         const std::vector<int64_t>& counts,
                                         const std::vector<int64_t>& limits) {
  const size_t count = hierarchy->stages.size();
  const c10::Device device = hierarchy->weights.front().device();
  TORCH_CHECK_VALUE(on_gpu(hierarchy->weights.front()), "weights must be on a GPU, got ", device);
  TORCH_CHECK_VALUE(counts.size() == count && limits.size() == count,
                    "counts and limits must have an item for each of ", count, " stages");
  auto result = c10::make_intrusive<DeviceRun>();
  result->hierarchy = hierarchy;
  result->tensors = tensors;
  Binder list(result->tensors, device);
  cuda::Run& run = result->run;
  run.to_logits = hierarchy->to_logits;
  run.num_tokens = run.to_logits.outputs;
  int* flags = list.next<int>("flags", {2});
  run.halted = {flags, flags + 1};
  run.settings = list.next<float>("settings", {3});
  run.ends = list.next<bool>("ends", {run.num_tokens});
  run.rows = list.size_of_next(0);
  TORCH_CHECK_VALUE(run.rows > 0, "next must have a row");
  run.history.next = list.next<int64_t>("next", {run.rows});
  run.history.size = hierarchy->parts[0].patch_size;
  run.history.ids = list.next<int64_t>("history", {run.rows, run.history.size});
  run.pending = list.next<int64_t>("pending", {run.rows});
  result->slots = list.size_of_next(0);
  run.uniform = list.next<float>("uniform", {result->slots, run.rows, run.num_tokens});
  run.ids = list.next<int64_t>("ids", {result->slots, run.rows});

  const auto floats = at::TensorOptions().device(device).dtype(at::kFloat);
  std::vector<Tensor> working;
  const auto allocate = [&](int64_t size) {
    working.push_back(make::empty({size}, floats));
    return working.back().mutable_data_ptr<float>();
  };
  for (size_t n = 0; n < count; ++n) {
    const cpu::RunStage& part = hierarchy->parts[n];
    cuda::DeviceStage stage;
    stage.part = part;
    stage.limit = limits[n];
    TORCH_CHECK_VALUE(stage.limit >= 0 && (n == 0 || stage.limit == part.seq_len),
                      "limits must be the stages' lengths, got ", stage.limit);
    stage.positions = list.next<int64_t>("positions", {run.rows});
    stage.output = list.next<float>("outputs", {run.rows, part.dim});
    stage.start_output = list.next<float>("start_outputs", {run.rows, part.dim});
    stage.context = list.table("contexts", run.rows, {part.seq_len, part.dim});
    TORCH_CHECK_VALUE((stage.context != nullptr) == (n > 0),
                      "contexts must be given for all stages but the first");
    stage.part.positions.fixed = list.table("positions", stage.limit, {part.dim});
    stage.part.positions.rotation = list.table("rotation", stage.limit, {part.dim / 2, 2});
    TORCH_CHECK_VALUE(!stage.part.positions.rotation || part.dim % 2 == 0,
                      "rotation needs an even width, got ", part.dim);
    const Group state = list.group(counts[n]);
    std::visit(
        [&](const auto& model) {
          const auto rows = bind(model, state, 0, 1 + stage.limit, device);
          TORCH_CHECK_VALUE(int64_t(rows.size()) == run.rows, "state must have ", run.rows,
                            " rows, got ", rows.size());
          if constexpr (std::is_same_v<std::decay_t<decltype(model)>, cpu::TransformerStage>) {
            TORCH_CHECK_VALUE(n == 0 || rows[0].start_delayed, "state must tell the start's");
          } else {
            TORCH_CHECK_VALUE(n == 0 || rows[0].start_ssm, "state must tell the start's");
          }
          stage.model = any_model(model, rows[0]);
        },
        hierarchy->stages[n]->stage);
    stage.workspace = allocate(
        cuda::Run::workspace_size(part, stage.model, run.rows, hierarchy->parts.back().dim));
    run.stages.push_back(stage);
  }
  TORCH_CHECK_VALUE(list.empty(), "tensors holds more than there are stages for");
  run.logits = allocate(run.rows * run.num_tokens);
  run.ordered = allocate(2 * run.rows * run.num_tokens);
  result->tensors.insert(result->tensors.end(), working.begin(), working.end());
  return result;
}

template <class Unit>
void DeviceRun::queue(Unit unit) const {
  const c10::Device device = tensors.front().device();
  const c10::DeviceGuard guard(device);
  launch(device, unit);
}

int64_t DeviceRun::check_slot(int64_t slot) const {
  TORCH_CHECK_VALUE(slot >= 0 && slot < slots, "slot must be in [0, ", slots, "), got ", slot);
  return slot;
}

void DeviceRun::embed_byte() const {
  queue([&](cuda::Stream stream) { return run.embed_byte(stream); });
}

void DeviceRun::step_and_sample(int64_t slot) const {
  check_slot(slot);
  queue([&](cuda::Stream stream) { return run.step_and_sample(slot, stream); });
}

void DeviceRun::sample(int64_t slot) const {
  check_slot(slot);
  queue([&](cuda::Stream stream) { return run.sample(slot, stream); });
}

void DeviceRun::take_patch(int64_t stage) const {
  TORCH_CHECK_VALUE(stage >= 0 && stage + 1 < int64_t(run.stages.size()),
                    "stage must be above the local one, got ", stage);
  queue([&](cuda::Stream stream) { return run.take_patch(stage, stream); });
}

void DeviceRun::begin_anew(int64_t stage) const {
  TORCH_CHECK_VALUE(stage > 0 && stage < int64_t(run.stages.size()),
                    "stage must be below another, got ", stage);
  queue([&](cuda::Stream stream) { return run.begin_anew(stage, stream); });
}

}  // namespace mblm
#endif
