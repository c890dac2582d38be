// Memory of rows on a GPU: see device_slots.h.
#ifdef MBLM_CUDA
#include "decode/torch/device_slots.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <utility>

#include "decode/memory.h"
#include "torch/common.h"

namespace mblm::decode {
namespace {

using at::Tensor;

template <class T>
T* pointer(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

cuda::LayerNormOf norm_of(const LayerNorm& norm) {
  return {norm.weight, norm.bias, norm.eps};
}

// Copies what a tensor has to a larger one of the same kind.
void copy_common(const Tensor& from, Tensor to) {
  for (int64_t d = 0; d < to.dim(); ++d) to = to.narrow(d, 0, from.size(d));
  to.copy_(from);
}

// Whether nothing of what rows have grows with them.
bool is_endless(const Parts& parts) {
  const StageParts& top = parts.stages[0];
  const bool is_transformer = std::holds_alternative<cpu::TransformerStage>(top.model);
  return !is_transformer && !top.rotation && !top.fixed;
}

// Tokens that there must be room for in the most global stage.
int64_t limit_of(const Parts& parts) {
  if (is_endless(parts)) return kMostBytes;
  const Schedule& schedule = parts.schedule;
  return parts.max_length > 0 ? schedule.seq_len(0) : parts.most_bytes / schedule.patch_size(0);
}

// Of a stage's buffers, those of its model's state come after these.
constexpr size_t kState = 2;

}  // namespace

std::vector<DeviceSlots::Buffer> DeviceSlots::buffers_of(int64_t n, int64_t slots,
                                                         int64_t limit) const {
  const StageParts& part = parts_->stages[n];
  std::vector<Buffer> all;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape, int64_t slot_dim,
                       int64_t position_dim = -1) {
    all.push_back({name, slot_dim, position_dim, make::zeros(shape, floats())});
  };
  add("output", {slots, part.dim}, 0);
  add("context", {n > 0 ? slots : 0, n > 0 ? limit : 0, part.dim}, 0);
  for (StageLayout::Part of : StageLayout(*parts_, n).saved) {
    if (of.name == "output" || of.name == "context") continue;
    // Slots come after the layers, and after the two halves of each.
    const int64_t slot_dim = of.name == "delayed" ? 2 : 1;
    if (of.is_paged) of.shape[2] = 1 + limit;
    of.shape.insert(of.shape.begin() + slot_dim, slots);
    add(of.name, std::move(of.shape), slot_dim, of.is_paged ? 3 : -1);
  }
  return all;
}

cuda::AnyModelInSlots DeviceSlots::bind(int64_t n, const std::vector<Buffer>& buffers) const {
  const Tensor &first = buffers[kState].tensor, &second = buffers[kState + 1].tensor;
  const auto of_mamba = [&](const auto& model) -> cuda::AnyModelInSlots {
    return cuda::ModelInSlots<std::decay_t<decltype(model)>, cuda::MambaRow>{
        &model, {pointer<float>(first), pointer<float>(second), first.stride(0), second.stride(0)}};
  };
  const StageModel& model = parts_->stages[n].model;
  if (const auto* of = std::get_if<cpu::Mamba1Stage>(&model)) return of_mamba(*of);
  if (const auto* of = std::get_if<cpu::Mamba2Stage>(&model)) return of_mamba(*of);
  const auto& of = std::get<cpu::TransformerStage>(model);
  cuda::TransformerRow row;
  row.capacity = second.size(3);
  row.keys = pointer<float>(second);
  row.values = pointer<float>(buffers[kState + 2].tensor);
  row.layer_stride = second.stride(0);
  row.delayed = pointer<float>(first);
  row.part_stride = first.stride(1);
  row.cos = of.cos;
  row.sin = of.sin;
  row.angles = of.angles;
  return cuda::ModelInSlots<cpu::TransformerStage, cuda::TransformerRow>{&of, row};
}

int64_t DeviceSlots::slots_for(int64_t rows) {
  int64_t slots = 1;
  while (slots < rows) slots *= 2;
  return slots;
}

void DeviceSlots::reserve(const Hierarchy& hierarchy, int64_t rows, int64_t bytes) {
  std::shared_ptr<const Parts> parts = hierarchy.parts(0);
  const bool is_same = parts_ && parts_->start_id == parts->start_id;
  const bool has_room = is_same && (bytes <= parts_->most_bytes || is_endless(*parts_));
  if (has_room && rows <= slots_) return;
  if (has_room) {
    parts = parts_;
  } else if (!is_endless(*parts)) {
    const int64_t context = parts->schedule.seq_len(0) * parts->schedule.patch_size(0);
    parts = hierarchy.parts(std::max(bytes, context));
  }
  const c10::DeviceGuard guard(device_);
  DeviceSlots made(device_);  // which leaves this as it is if there is no memory
  made.parts_ = std::move(parts);
  made.slots_ = slots_for(std::max(rows, slots_));
  made.limit_ = std::max(limit_, limit_of(*made.parts_));
  made.allocate(*this);
  made.point();
  launch(device_, cuda::wait_for);
  *this = std::move(made);
}

void DeviceSlots::allocate(const DeviceSlots& from) {
  const Schedule& schedule = parts_->schedule;
  stages_.resize(schedule.stages());
  for (int64_t n = 0; n < schedule.stages(); ++n) {
    StageMemory& stage = stages_[n];
    stage.buffers = buffers_of(n, slots_, n > 0 ? schedule.seq_len(n) : limit_);
    stage.start = start_of(n);
    for (size_t i = 0; i < stage.buffers.size(); ++i) {
      const Buffer& to = stage.buffers[i];
      if (from.parts_) copy_common(from.stages_[n].buffers[i].tensor, to.tensor);
      // Keys and values of the start token stay; all else is copied when a sequence begins.
      if (to.position_dim >= 0) {
        to.tensor.narrow(to.position_dim, 0, 1).copy_(stage.start[i].tensor);
      }
    }
  }
  last_bytes_ = make::zeros({slots_, schedule.patch_size(0)}, floats().dtype(at::kLong));
  if (from.parts_) copy_common(from.last_bytes_, last_bytes_);
  allocate_exchange();
}

// One step of a stage, of its start token.
std::vector<DeviceSlots::Buffer> DeviceSlots::start_of(int64_t n) const {
  const StageParts& part = parts_->stages[n];
  std::vector<Buffer> buffers = buffers_of(n, 1, 0);
  float* const output = pointer<float>(buffers[0].tensor);
  buffers[0].tensor.copy_(
      at::from_blob(const_cast<float*>(part.start_token), {1, part.dim}, floats()));
  const Tensor position = make::zeros({1}, floats().dtype(at::kLong));
  cuda::StageStep step;
  step.rows = 1;
  step.positions = pointer<int64_t>(position);
  step.limit = 1;
  step.x = output;
  std::visit(
      [&](const auto& of) {
        const Tensor space = make::empty({cuda::workspace_size(*of.model, 1, 1)}, floats());
        step.workspace = pointer<float>(space);
        launch(device_,
               [&](cuda::Stream stream) { return cuda::step(*of.model, of.row, step, stream); });
      },
      bind(n, buffers));
  return buffers;
}

void DeviceSlots::allocate_exchange() {
  const auto integers = floats().dtype(at::kLong);
  const Schedule& schedule = parts_->schedule;
  const int64_t stages = schedule.stages(), vocabulary = parts_->num_tokens();
  std::vector<int64_t> sizes(stages);
  for (int64_t n = 0; n < stages; ++n) sizes[n] = schedule.patch_size(n);
  patch_sizes_ = make::empty({stages}, integers);
  patch_sizes_.copy_(at::from_blob(sizes.data(), {stages}, at::kLong));
  masks_ = make::zeros({2 * stages + 1, slots_}, integers);
  logits_ = make::zeros({slots_, vocabulary}, floats());
  keys_ = make::empty({slots_, cuda::keys_of(vocabulary)}, integers);
  const auto bytes_of = [&](int64_t size) { return slots_ * kBytes * size; };
  ids_at_ = slots_ * int64_t(sizeof(cuda::Slot));
  drawn_at_ = ids_at_ + bytes_of(sizeof(int64_t));
  log_probs_at_ = drawn_at_ + bytes_of(sizeof(cuda::Drawn));
  const int64_t size = log_probs_at_ + bytes_of(sizeof(float));
  const bool is_pinned = !device_.is_cpu();
  device_io_ = make::zeros({size}, floats().dtype(at::kByte));
  host_ = make::empty({size}, at::TensorOptions().dtype(at::kByte).pinned_memory(is_pinned));
  for (int64_t slot = 0; slot < slots_; ++slot) new (&row(slot)) cuda::Slot;
  uniform_ = device_uniform_ = Tensor();
}

float* DeviceSlots::uniform(int64_t slot) {
  const int64_t vocabulary = parts_->num_tokens();
  if (!uniform_.defined()) {
    uniform_ = make::zeros({slots_, kBytes, vocabulary}, at::kFloat);
    device_uniform_ = make::zeros({slots_, kBytes, vocabulary}, floats());
    point();
  }
  has_uniform_ = true;
  return pointer<float>(uniform_) + slot * kBytes * vocabulary;
}

void DeviceSlots::point() {
  repeated_.clear();
  units_ = {};
  units_.to_logits = parts_->to_logits;
  const Schedule& schedule = parts_->schedule;
  unsigned char* const io = pointer<uint8_t>(device_io_);
  cuda::Slots& all = units_.slots;
  all.count = slots_;
  all.num_tokens = parts_->num_tokens();
  all.width = parts_->local().dim;
  all.bytes = kBytes;
  all.rows = reinterpret_cast<cuda::Slot*>(io);
  all.schedule = {schedule.stages(), pointer<int64_t>(patch_sizes_)};
  all.last_bytes = pointer<int64_t>(last_bytes_);
  all.last_size = schedule.patch_size(0);
  all.begins = pointer<int64_t>(masks_);
  all.takes = all.begins + schedule.stages() * slots_;
  all.positions = all.takes + schedule.stages() * slots_;
  all.logits = pointer<float>(logits_);
  all.empty_logits = parts_->empty_logits;
  all.keys = pointer<uint64_t>(keys_);
  all.drawn = reinterpret_cast<cuda::Drawn*>(io + drawn_at_);
  if (device_uniform_.defined()) all.uniform = pointer<float>(device_uniform_);
  all.ids = reinterpret_cast<int64_t*>(io + ids_at_);
  all.log_probs = reinterpret_cast<float*>(io + log_probs_at_);
  for (int64_t n = 0; n < schedule.stages(); ++n) point_at(n);
}

void DeviceSlots::point_at(int64_t n) {
  const StageParts& part = parts_->stages[n];
  StageMemory& memory = stages_[n];
  cuda::UnitStage& stage = units_.stages.emplace_back();
  stage.model = bind(n, memory.buffers);
  if (auto* of = std::get_if<0>(&stage.model)) {
    memory.tickets = make::zeros({slots_, of->model->heads}, floats().dtype(at::kInt));
    of->row.tickets = pointer<uint32_t>(memory.tickets);
  }
  stage.index = n;
  stage.dim = part.dim;
  stage.patch_size = parts_->schedule.patch_size(n);
  stage.limit = n > 0 ? parts_->schedule.seq_len(n) : limit_;
  stage.table = part.table;
  stage.fixed = part.fixed;
  stage.rotation = part.rotation;
  stage.output = pointer<float>(memory.buffers[0].tensor);
  stage.context = pointer<float>(memory.buffers[1].tensor);
  stage.flat_norm = norm_of(part.flat_norm);
  stage.norm = norm_of(part.norm);
  stage.project = part.project;
  stage.to_context = part.to_context;
  cuda::StageSlots::Part* start = stage.start;
  for (size_t i = 0; i < memory.buffers.size(); ++i) {
    const Buffer& buffer = memory.buffers[i];
    if (i == 1 || buffer.position_dim >= 0) continue;  // they do not begin anew
    const at::IntArrayRef shape = buffer.tensor.sizes();
    *start++ = {pointer<float>(memory.start[i].tensor), pointer<float>(buffer.tensor),
                c10::multiply_integers(shape.slice(0, buffer.slot_dim)),
                c10::multiply_integers(shape.slice(buffer.slot_dim + 1))};
  }
  memory.workspace = make::empty({units_.workspace_size(stage)}, floats());
  stage.workspace = pointer<float>(memory.workspace);
}

void DeviceSlots::run(bool has_turn, int64_t count) {
  const c10::DeviceGuard guard(device_);
  device_io_.copy_(host_, true);
  if (has_uniform_) device_uniform_.copy_(uniform_);
  has_uniform_ = false;
  const auto queue = [this, has_turn, count](cuda::Stream stream) {
    return units_.queue(has_turn, count, stream);
  };
  cuda::Repeated& unit = repeated_[{has_turn, count}];
  launch(device_, [&](cuda::Stream stream) { return unit.launch(capture_, queue, stream); });
  host_.copy_(device_io_, true);
  launch(device_, cuda::wait_for);
}

at::Tensor DeviceSlots::logits() {
  const c10::DeviceGuard guard(device_);
  launch(device_, [&](cuda::Stream stream) { return units_.compute_logits(stream); });
  return logits_.cpu();
}

at::Tensor DeviceSlots::empty_logits() const {
  return at::from_blob(const_cast<float*>(parts_->empty_logits), {parts_->num_tokens()}, floats())
      .cpu();
}

DeviceSlots::Tensors DeviceSlots::save(int64_t slot, int64_t taken) const {
  const c10::DeviceGuard guard(device_);
  Tensors tensors;
  for (int64_t n = 0; taken > 0 && n < parts_->schedule.stages(); ++n) {
    const int64_t positions = 1 + parts_->schedule.position(n, taken);
    for (const Buffer& buffer : stages_[n].buffers) {
      if (buffer.tensor.size(buffer.slot_dim) == 0) continue;
      tensors.emplace(std::to_string(n) + "." + buffer.name,
                      buffer.of(slot, positions).contiguous().cpu().clone());
    }
  }
  return tensors;
}

void DeviceSlots::load(int64_t slot, int64_t taken, const Bytes& bytes, int64_t length,
                       const Tensors& tensors) {
  const c10::DeviceGuard guard(device_);
  for (int64_t n = 0; taken > 0 && n < parts_->schedule.stages(); ++n) {
    const int64_t positions = 1 + parts_->schedule.position(n, taken);
    for (const Buffer& buffer : stages_[n].buffers) {
      const auto found = tensors.find(std::to_string(n) + "." + buffer.name);
      if (found != tensors.end()) buffer.of(slot, positions).copy_(found->second);
    }
  }
  const int64_t size = parts_->schedule.patch_size(0), first = length - bytes.size();
  Tensor ring = make::zeros({size}, at::kLong);
  for (int64_t at = std::max(first, length - size); at < taken; ++at) {
    ring.mutable_data_ptr<int64_t>()[at % size] = bytes[at - first];
  }
  last_bytes_.select(0, slot).copy_(ring);
  launch(device_, cuda::wait_for);  // other threads may use another stream
}

void DeviceSlots::copy(int64_t from, int64_t to) {
  const c10::DeviceGuard guard(device_);
  for (const StageMemory& stage : stages_) {
    for (const Buffer& buffer : stage.buffers) {
      if (buffer.tensor.size(buffer.slot_dim) == 0) continue;
      buffer.of(to).copy_(buffer.of(from));
    }
  }
  last_bytes_.select(0, to).copy_(last_bytes_.select(0, from));
  launch(device_, cuda::wait_for);
}

}  // namespace mblm::decode
#endif
