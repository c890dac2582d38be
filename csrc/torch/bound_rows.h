// Rows of the CPU's stages, made of states that lie in contiguous tensors.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/bound_stage.h"
#include "cuda/stage_step.h"

namespace mblm {

inline cpu::BoundRow<cpu::TransformerRow> bind_row(const cpu::TransformerStage& stage,
                                                   const cuda::TransformerRow& state,
                                                   int64_t position) {
  cpu::BoundRow<cpu::TransformerRow> bound;
  const int64_t pages = (state.capacity + cpu::kPagePositions - 1) / cpu::kPagePositions;
  for (float* part : {state.keys, state.values}) {
    for (int64_t page = 0; page < pages; ++page) {
      bound.pages.push_back(part + page * cpu::kPagePositions * stage.head_dim);
    }
  }
  cpu::TransformerRow& row = bound.row;
  row.position = position;
  row.keys = bound.pages.data();
  row.values = bound.pages.data() + pages;
  row.layer_stride = state.layer_stride;
  row.head_stride = state.capacity * stage.head_dim;
  row.delayed = state.delayed;
  row.part_stride = state.part_stride;
  for (int64_t part = 0; state.start_delayed && part < 2 * int64_t(stage.layers.size()); ++part) {
    const int64_t at = part * state.part_stride;
    bound.start.push_back({state.start_delayed + at, state.delayed + at, stage.dim / 2});
  }
  return bound;
}

inline int64_t window_size(const cpu::Mamba1Stage& stage) {
  return (stage.taps - 1) * stage.inner;
}
inline int64_t window_size(const cpu::Mamba2Stage& stage) {
  return (stage.taps - 1) * (stage.inner + 2 * stage.states);
}

template <class Stage>
cpu::BoundRow<cpu::MambaRow> bind_row(const Stage& stage, const cuda::MambaRow& state, int64_t) {
  cpu::BoundRow<cpu::MambaRow> bound;
  bound.row.ssm = state.ssm;
  bound.row.window = state.window;
  bound.row.ssm_stride = state.ssm_stride;
  bound.row.window_stride = state.window_stride;
  for (int64_t layer = 0; state.start_ssm && layer < int64_t(stage.layers.size()); ++layer) {
    const int64_t ssm = layer * state.ssm_stride, window = layer * state.window_stride;
    bound.start.push_back({state.start_ssm + ssm, state.ssm + ssm, stage.inner * stage.states});
    bound.start.push_back({state.start_window + window, state.window + window, window_size(stage)});
  }
  return bound;
}

// The rotary tables of the row that has the longest.
inline void take_tables(cpu::TransformerStage& stage,
                        const std::vector<cuda::TransformerRow>& rows) {
  int64_t longest = 0;
  for (const cuda::TransformerRow& row : rows) {
    if (row.angles <= longest) continue;
    longest = row.angles;
    stage.cos = row.cos;
    stage.sin = row.sin;
  }
}
template <class Stage>
void take_tables(Stage&, const std::vector<cuda::MambaRow>&) {}

inline int64_t largest_capacity(const std::vector<cuda::TransformerRow>& rows) {
  int64_t largest = 0;
  for (const cuda::TransformerRow& row : rows) largest = std::max(largest, row.capacity);
  return largest;
}
inline int64_t largest_capacity(const std::vector<cuda::MambaRow>&) {
  return 0;
}

// A stage with rows at these positions.
template <class Stage, class Row>
cpu::BoundStageOf<Stage> bind_rows(const Stage& stage, const std::vector<Row>& states,
                                   const std::vector<int64_t>& positions) {
  Stage bound = stage;
  take_tables(bound, states);
  std::vector<cpu::BoundRow<typename Stage::Row>> rows;
  for (size_t i = 0; i < states.size(); ++i) {
    rows.push_back(bind_row(stage, states[i], positions[i]));
  }
  return {std::move(bound), std::move(rows), largest_capacity(states)};
}

}  // namespace mblm
