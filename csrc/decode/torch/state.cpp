// Copies a row's state to tensors and back, checked: see state.h.
#include "decode/torch/state.h"

#include <algorithm>
#include <vector>

#include "decode/torch/given.h"
#include "decode/torch/weights.h"
#include "torch/common.h"

namespace mblm::decode {

using at::Tensor;
using Part = StageLayout::Part;

namespace {

// What is saved of a stage after so many bytes, with the names that it has in a state.
std::vector<Part> parts_of(const Parts& parts, const Memory& memory, int64_t n, int64_t taken) {
  std::vector<Part> all = memory.layout(n).saved;
  for (Part& part : all) {
    part.name = std::to_string(n) + "." + part.name;
    if (part.is_paged) part.shape[2] = 1 + parts.schedule.position(n, taken);
  }
  return all;
}

// Calls function(floats in the tensor, floats in the state, how many) for what lies together of a
// part, of keys and values from the start token on or after it.
template <class Function>
void for_runs(const StageLayout& layout, const StageState& stage, const Part& part,
              bool has_start_token, Function function) {
  if (!part.is_paged) {
    return function(0, stage.blob.data() + part.at, c10::multiply_integers(part.shape));
  }
  const int64_t size = layout.page_positions, dim = layout.head_dim, positions = part.shape[2];
  for (int64_t begin = !has_start_token; begin < positions; begin = (begin / size + 1) * size) {
    const int64_t count = std::min((begin / size + 1) * size, positions) - begin;
    for (int64_t plane = 0; plane < layout.planes; ++plane) {
      float* const page = stage.pages[begin / size].data() + part.at;
      function((plane * positions + begin) * dim, page + plane * layout.plane + begin % size * dim,
               count * dim);
    }
  }
}

// The tensor of that name, as contiguous float32 on the CPU.
Tensor take(const SavedState& state, const Part& part) {
  const auto found = state.tensors.find(part.name);
  TORCH_CHECK_VALUE(found != state.tensors.end(), "state must have ", part.name);
  return check_given(part.name.c_str(), found->second, part.shape, at::kFloat);
}

// mblm/inference/torch_stages.py has checked it by the model's sizes, which anybody can change.
Bytes take_tail(const Parts& parts, const Memory& memory, const SavedState& state) {
  const Ids tail = own_ids("tail", state.tensors.at("tail"), parts.num_tokens());
  const int64_t length = state.length, taken = state.taken, size = int64_t(tail.size());
  const int64_t limit = parts.max_length > 0 ? parts.max_length : kMostBytes;
  const int64_t patch = parts.schedule.patch_size(0);
  TORCH_CHECK_VALUE(0 <= taken && taken <= length && length - 1 <= taken && length <= limit &&
                        size <= length &&
                        length - size <= std::max<int64_t>(taken - 1, 0) / patch * patch,
                    "state: length ", length, ", taken ", taken, " and a tail of ", size,
                    " bytes do not fit the model's weights");
  Bytes bytes;
  bytes.reserve(memory.bytes(), size);
  for (const int64_t id : tail) bytes.push_back(int32_t(id));
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
    const StageState& stage = row.stages[n];
    if (parts.stages[n].is_hosted()) state.hosted.emplace(n, stage.hosted);
    for (const Part& part : parts_of(parts, memory, n, row.taken)) {
      Tensor tensor = own_tensor(part.shape, at::kFloat);
      float* const to = tensor.mutable_data_ptr<float>();
      for_runs(
          memory.layout(n), stage, part, true,
          [&](int64_t at, const float* from, int64_t count) { std::copy_n(from, count, to + at); });
      state.tensors.emplace(part.name, tensor);
    }
  }
  return state;
}

RowState check_state(const Parts& parts, const Memory& memory, const SavedState& state) {
  RowState row;
  row.length = state.length;
  row.taken = state.taken;
  row.stages.resize(parts.stages.size());
  row.bytes = take_tail(parts, memory, state);
  size_t used = 1;
  for (int64_t n = 0; state.taken > 0 && n < parts.schedule.stages(); ++n) {
    for (const Part& part : parts_of(parts, memory, n, state.taken)) {
      take(state, part);
      ++used;
    }
    TORCH_CHECK_VALUE(!parts.stages[n].is_hosted() || state.hosted.contains(n),
                      "state must have that of stage ", n, ", which is hosted");
  }
  TORCH_CHECK_VALUE(used == state.tensors.size(), "state must hold ", used, " tensors, got ",
                    state.tensors.size());
  return row;
}

RowState load_state(const Parts& parts, Memory& memory, const SavedState& state) {
  RowState row = check_state(parts, memory, state);
  for (int64_t n = 0; state.taken > 0 && n < parts.schedule.stages(); ++n) {
    StageState& stage = row.stages[n];
    memory.allocate(parts, n, stage, 1 + parts.schedule.position(n, state.taken));
    if (parts.stages[n].is_hosted()) stage.hosted = state.hosted.at(n);
    for (const Part& part : parts_of(parts, memory, n, state.taken)) {
      const Tensor tensor = take(state, part);
      const float* const from = tensor.const_data_ptr<float>();
      for_runs(memory.layout(n), stage, part, false,
               [&](int64_t at, float* to, int64_t count) { std::copy_n(from + at, count, to); });
    }
  }
  return row;
}

}  // namespace mblm::decode
