// Copies a row's state to tensors and back, checked: see state.h.
#include "decode/state.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <vector>

#include "decode/given.h"
#include "decode/weights.h"
#include "torch/common.h"

namespace mblm::decode {

using at::Tensor;

Tensor own_tensor(at::IntArrayRef shape, at::ScalarType type) {
  const c10::InferenceMode guard(false);
  return make::empty(shape, type);
}

namespace {

// A part of a row's state in one stage: its name, its shape, and where its floats lie.
struct Part {
  std::string name;
  std::vector<int64_t> shape;
  int64_t at;  // in the blob
};

std::vector<Part> parts_of_blob(const Parts& parts, const StageLayout& layout, int64_t n) {
  const std::string prefix = std::to_string(n) + ".";
  const StageModel& stage = parts.stages[n].model;
  std::vector<Part> all = {{prefix + "output", {layout.dim}, layout.output}};
  if (n > 0) all.push_back({prefix + "context", {layout.seq_len, layout.dim}, layout.context});
  const int64_t layers = layout.layers;
  if (layout.has_pages()) {
    all.push_back({prefix + "delayed", {layers, 2, layout.dim / 2}, 0});
  } else if (const auto* model = std::get_if<cpu::Mamba1Stage>(&stage)) {
    all.push_back({prefix + "ssm", {layers, model->inner, model->states}, 0});
    all.push_back({prefix + "window", {layers, model->taps - 1, model->inner}, layout.ssm});
  } else if (const auto* model = std::get_if<cpu::Mamba2Stage>(&stage)) {
    all.push_back(
        {prefix + "ssm", {layers, model->heads, model->inner / model->heads, model->states}, 0});
    all.push_back({prefix + "window",
                   {layers, model->taps - 1, model->inner + 2 * model->states},
                   layout.ssm});
  }
  return all;
}

std::vector<int64_t> shape_of_keys(const StageLayout& layout, int64_t positions) {
  return {layout.layers, layout.planes / layout.layers, positions, layout.head_dim};
}

// Calls function(floats in the tensor, floats in a page, how many) for the runs of positions from
// `first` on that keys or values have.
template <class Function>
void for_runs(const StageLayout& layout, const std::vector<float*>& pages, int64_t first,
              int64_t positions, Function function) {
  const int64_t size = layout.page_positions, dim = layout.head_dim;
  for (int64_t begin = first; begin < positions; begin = (begin / size + 1) * size) {
    const int64_t count = std::min((begin / size + 1) * size, positions) - begin;
    for (int64_t plane = 0; plane < layout.planes; ++plane) {
      function((plane * positions + begin) * dim,
               pages[begin / size] + plane * layout.plane + begin % size * dim, count * dim);
    }
  }
}

// The tensor of that name, as contiguous float32 on the CPU.
Tensor take(const SavedState& state, const std::string& name, at::IntArrayRef shape) {
  const auto found = state.tensors.find(name);
  TORCH_CHECK_VALUE(found != state.tensors.end(), "state must have ", name);
  return check_given(name.c_str(), found->second, shape, at::kFloat);
}

Bytes take_tail(const Parts& parts, const Memory& memory, const SavedState& state) {
  const auto found = state.tensors.find("tail");
  TORCH_CHECK_VALUE(found != state.tensors.end(), "state must have tail");
  const Tensor tail = own_ids("tail", found->second, parts.num_tokens());
  const int64_t count = tail.size(0), first = state.length - count;
  TORCH_CHECK_VALUE(first >= 0 && first <= first_kept(parts.schedule, state.taken) &&
                        first % parts.schedule.patch_size(0) == 0,
                    "tail must hold the bytes from number ",
                    first_kept(parts.schedule, state.taken), " on, of ", state.length, ", got ",
                    count);
  const int64_t* data = tail.const_data_ptr<int64_t>();
  Bytes bytes;
  bytes.reserve(memory.bytes(), count);
  for (int64_t i = 0; i < count; ++i) bytes.push_back(int32_t(data[i]));
  return bytes;
}

}  // namespace

Tensor save_tail(const Row& row) {
  Tensor tail = own_tensor({row.bytes.size()}, at::kLong);
  int64_t* const to = tail.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < row.bytes.size(); ++i) to[i] = row.bytes[i];
  return tail;
}

SavedState save_state(const Parts& parts, const Memory& memory, const Row& row) {
  SavedState state{row.length, row.taken, {{"tail", save_tail(row)}}};
  for (int64_t n = 0; row.taken > 0 && n < parts.schedule.stages(); ++n) {
    const StageLayout& layout = memory.layout(n);
    const StageState& stage = row.stages[n];
    if (parts.stages[n].is_hosted()) state.hosted.emplace(n, stage.hosted);
    for (const Part& part : parts_of_blob(parts, layout, n)) {
      Tensor tensor = own_tensor(part.shape, at::kFloat);
      std::copy_n(stage.blob.data() + part.at, tensor.numel(), tensor.mutable_data_ptr<float>());
      state.tensors.emplace(part.name, tensor);
    }
    if (!layout.has_pages()) continue;
    const int64_t positions = 1 + parts.schedule.position(n, row.taken);
    for (const auto& [name, pages] :
         {std::pair(".keys", &stage.keys), {".values", &stage.values}}) {
      Tensor tensor = own_tensor(shape_of_keys(layout, positions), at::kFloat);
      float* const to = tensor.mutable_data_ptr<float>();
      for_runs(layout, *pages, 0, positions, [&](int64_t at, const float* from, int64_t count) {
        std::copy_n(from, count, to + at);
      });
      state.tensors.emplace(std::to_string(n) + name, tensor);
    }
  }
  return state;
}

std::map<std::string, std::vector<int64_t>> state_shapes(const Parts& parts, const Memory& memory,
                                                         int64_t taken) {
  std::map<std::string, std::vector<int64_t>> shapes;
  for (int64_t n = 0; taken > 0 && n < parts.schedule.stages(); ++n) {
    const StageLayout& layout = memory.layout(n);
    for (const Part& part : parts_of_blob(parts, layout, n)) shapes.emplace(part.name, part.shape);
    if (!layout.has_pages()) continue;
    const auto shape = shape_of_keys(layout, 1 + parts.schedule.position(n, taken));
    shapes.emplace(std::to_string(n) + ".keys", shape);
    shapes.emplace(std::to_string(n) + ".values", shape);
  }
  return shapes;
}

RowState check_state(const Parts& parts, const Memory& memory, const SavedState& state) {
  const int64_t limit = parts.max_length > 0 ? parts.max_length : kMostBytes;
  TORCH_CHECK_VALUE(0 <= state.length && state.length <= limit,
                    "length must be at most the context of ", limit, " bytes, got ", state.length);
  TORCH_CHECK_VALUE(
      state.taken >= 0 && (state.taken == state.length || state.taken == state.length - 1),
      "taken must be length or length - 1 and not negative, got ", state.taken, " of length ",
      state.length);
  RowState row;
  row.length = state.length;
  row.taken = state.taken;
  row.stages.resize(parts.stages.size());
  row.bytes = take_tail(parts, memory, state);
  size_t used = 1;
  for (int64_t n = 0; state.taken > 0 && n < parts.schedule.stages(); ++n) {
    const StageLayout& layout = memory.layout(n);
    const int64_t positions = 1 + parts.schedule.position(n, state.taken);
    for (const Part& part : parts_of_blob(parts, layout, n)) {
      take(state, part.name, part.shape);
      ++used;
    }
    TORCH_CHECK_VALUE(!parts.stages[n].is_hosted() || state.hosted.contains(n),
                      "state must have that of stage ", n, ", which is hosted");
    for (const char* name : {".keys", ".values"}) {
      if (!layout.has_pages()) break;
      take(state, std::to_string(n) + name, shape_of_keys(layout, positions));
      ++used;
    }
  }
  TORCH_CHECK_VALUE(used == state.tensors.size(), "state must hold ", used, " tensors, got ",
                    state.tensors.size());
  return row;
}

RowState load_state(const Parts& parts, Memory& memory, const SavedState& state) {
  RowState row = check_state(parts, memory, state);
  for (int64_t n = 0; state.taken > 0 && n < parts.schedule.stages(); ++n) {
    const StageLayout& layout = memory.layout(n);
    StageState& stage = row.stages[n];
    std::vector<std::pair<Part, Tensor>> found;
    for (const Part& part : parts_of_blob(parts, layout, n)) {
      found.emplace_back(part, take(state, part.name, part.shape));
    }
    Tensor keys, values;
    const int64_t positions = 1 + parts.schedule.position(n, state.taken);
    if (layout.has_pages()) {
      const std::string prefix = std::to_string(n);
      keys = take(state, prefix + ".keys", shape_of_keys(layout, positions));
      values = take(state, prefix + ".values", shape_of_keys(layout, positions));
    }
    memory.allocate(parts, n, stage, positions);
    if (parts.stages[n].is_hosted()) stage.hosted = state.hosted.at(n);
    for (const auto& [part, tensor] : found) {
      std::copy_n(tensor.const_data_ptr<float>(), tensor.numel(), stage.blob.data() + part.at);
    }
    for (const auto& [tensor, pages] : {std::pair(&keys, &stage.keys), {&values, &stage.values}}) {
      if (!layout.has_pages()) break;
      const float* const from = tensor->const_data_ptr<float>();
      for_runs(layout, *pages, 1, positions,
               [&](int64_t at, float* to, int64_t count) { std::copy_n(from + at, count, to); });
    }
  }
  return row;
}

}  // namespace mblm::decode
