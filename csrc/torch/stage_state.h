// Binds the tensors of decoding states, checked, to the rows that compiled stages work on.
#pragma once

#include <vector>

#include "common.h"
#include "cuda/stage_step.h"

namespace mblm {

inline const at::Tensor& check_state(const char* name, const at::Tensor& tensor,
                                     at::IntArrayRef shape, const c10::Device& device = at::kCPU) {
  check_shape(name, tensor, shape);
  check_type(name, tensor, at::kFloat);
  TORCH_CHECK_VALUE(tensor.device() == device && tensor.is_contiguous(), name,
                    " must be contiguous and on ", device, ", got ", tensor.device());
  return tensor;
}

// The tensors of one cache, which holds one row or several at the same position.
using Group = c10::ArrayRef<at::Tensor>;

// keys, values, delayed; with rotary positions, cosines and sines; where the stage may start anew,
// delayed after the start token.

inline std::vector<cuda::TransformerRow> bind(const cpu::TransformerStage& stage, Group group,
                                              int64_t first, int64_t count,
                                              const c10::Device& device = at::kCPU) {
  const int64_t layers = int64_t(stage.layers.size());
  TORCH_CHECK_VALUE(!group.empty() && group[0].dim() == 5, "keys must have five dimensions");
  const int64_t rows = group[0].size(1), capacity = group[0].size(3), half = stage.dim / 2;
  TORCH_CHECK_VALUE(first >= 0 && count <= capacity - first, "state has room for ", capacity,
                    " positions, got ", first, " + ", count);
  TORCH_CHECK_VALUE(group.size() >= 3 && group.size() <= 6, "state must hold 3 to 6 tensors, got ",
                    group.size());
  const std::vector<int64_t> cache = {layers, rows, stage.heads, capacity, stage.head_dim};
  const int64_t of_row = stage.heads * capacity * stage.head_dim;
  cuda::TransformerRow row;
  row.capacity = capacity;
  row.keys = check_state("keys", group[0], cache, device).mutable_data_ptr<float>();
  row.values = check_state("values", group[1], cache, device).mutable_data_ptr<float>();
  row.layer_stride = rows * of_row;
  row.delayed =
      check_state("delayed", group[2], {layers, 2, rows, half}, device).mutable_data_ptr<float>();
  row.part_stride = rows * half;
  if (group.size() % 2 == 0) {
    row.start_delayed =
        check_state("start", group.back(), {layers, 2, rows, half}, device).const_data_ptr<float>();
  }
  if (group.size() >= 5) {
    TORCH_CHECK_VALUE(stage.head_dim % 2 == 0, "rotary positions need an even width of heads");
    TORCH_CHECK_VALUE(group[3].dim() == 2 && group[3].size(0) >= first + count,
                      "cos must have a row for each of ", first + count, " positions, got ",
                      group[3].sizes());
    const std::vector<int64_t> angles = {group[3].size(0), stage.head_dim / 2};
    row.angles = angles[0];
    row.cos = check_state("cos", group[3], angles, device).const_data_ptr<float>();
    row.sin = check_state("sin", group[4], angles, device).const_data_ptr<float>();
  }
  std::vector<cuda::TransformerRow> result;
  for (int64_t i = 0; i < rows; ++i) {
    result.push_back(row);
    row.keys += of_row;
    row.values += of_row;
    row.delayed += half;
    if (row.start_delayed) row.start_delayed += half;
  }
  return result;
}

// ssm and window and, where the stage may start anew, the same after the start token. Those of one
// row and layer have these dimensions.
inline std::vector<cuda::MambaRow> bind(Group group, int64_t layers, std::vector<int64_t> ssm,
                                        std::vector<int64_t> window, const c10::Device& device) {
  TORCH_CHECK_VALUE((group.size() == 2 || group.size() == 4) && group[0].dim() > 1,
                    "state must hold 2 or 4 tensors with rows, got ", group.size());
  const int64_t rows = group[0].size(1);
  const auto bind_part = [&](const char* name, const at::Tensor& part, std::vector<int64_t> shape) {
    shape.insert(shape.begin(), {layers, rows});
    return check_state(name, part, shape, device).mutable_data_ptr<float>();
  };
  const int64_t of_ssm = c10::multiply_integers(ssm), of_window = c10::multiply_integers(window);
  cuda::MambaRow row;
  row.ssm = bind_part("ssm", group[0], ssm);
  row.window = bind_part("window", group[1], window);
  row.ssm_stride = rows * of_ssm;
  row.window_stride = rows * of_window;
  if (group.size() == 4) {
    row.start_ssm = bind_part("start", group[2], ssm);
    row.start_window = bind_part("start", group[3], window);
  }
  std::vector<cuda::MambaRow> result;
  for (int64_t i = 0; i < rows; ++i) {
    result.push_back(row);
    row.ssm += of_ssm;
    row.window += of_window;
    if (row.start_ssm) {
      row.start_ssm += of_ssm;
      row.start_window += of_window;
    }
  }
  return result;
}

inline std::vector<cuda::MambaRow> bind(const cpu::Mamba1Stage& stage, Group group, int64_t,
                                        int64_t, const c10::Device& device = at::kCPU) {
  return bind(group, int64_t(stage.layers.size()), {stage.inner, stage.states},
              {stage.taps - 1, stage.inner}, device);
}

inline std::vector<cuda::MambaRow> bind(const cpu::Mamba2Stage& stage, Group group, int64_t,
                                        int64_t, const c10::Device& device = at::kCPU) {
  return bind(group, int64_t(stage.layers.size()),
              {stage.heads, stage.inner / stage.heads, stage.states},
              {stage.taps - 1, stage.inner + 2 * stage.states}, device);
}

// The rows of several caches.
template <class Row>
struct BoundGroups {
  std::vector<Row> rows;
  std::vector<int64_t> positions;  // of each row
  std::vector<int64_t> sizes;      // how many rows each cache has
};

// Binds them, each cache with room for its count from its position on. `tensors` holds those of one
// after the other.
template <class AnyStage>
auto bind_groups(const AnyStage& stage, Group tensors, at::IntArrayRef positions,
                 at::IntArrayRef counts, int64_t rows, const c10::Device& device = at::kCPU) {
  TORCH_CHECK_VALUE(!positions.empty() && tensors.size() % positions.size() == 0,
                    "state must hold as many tensors for each of ", positions.size(),
                    " caches, got ", tensors.size());
  const size_t each = tensors.size() / positions.size();
  BoundGroups<typename decltype(bind(stage, tensors, 0, 0, device))::value_type> bound;
  for (size_t group = 0; group < positions.size(); ++group) {
    const auto of_group =
        bind(stage, tensors.slice(group * each, each), positions[group], counts[group], device);
    bound.rows.insert(bound.rows.end(), of_group.begin(), of_group.end());
    bound.positions.resize(bound.rows.size(), positions[group]);
    bound.sizes.push_back(int64_t(of_group.size()));
  }
  TORCH_CHECK_VALUE(int64_t(bound.rows.size()) == rows,
                    "x must have a row for each of the state's ", bound.rows.size(), ", got ",
                    rows);
  return bound;
}

}  // namespace mblm
