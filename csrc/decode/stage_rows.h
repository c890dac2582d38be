// The rows that take part in a call of a stage's kernels, whichever kind of stage it is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/team.h"
#include "decode/memory.h"
#include "decode/parts.h"
#include "decode/rows.h"

namespace mblm::decode {

class StageRows {
  // function(model, rows); of a hosted stage, which has neither, 0 or nothing.
  template <class Function>
  auto visit(Function function) const {
    using Result = decltype(function(cpu::TransformerStage(), transformer_));
    return std::visit(
        [&](const auto& model) -> Result {
          using Model = std::decay_t<decltype(model)>;
          if constexpr (std::is_same_v<Model, cpu::TransformerStage>) {
            return function(model, transformer_);
          } else if constexpr (!std::is_same_v<Model, Hosted>) {
            return function(model, mamba_);
          } else {
            return Result();
          }
        },
        parts_->model);
  }

 public:
  StageRows(const StageParts& parts, const StageLayout& layout)
      : parts_(&parts), layout_(&layout) {}

  void reserve(int64_t rows) {
    transformer_.reserve(rows);
    mamba_.reserve(rows);
  }
  void clear() {
    transformer_.clear();
    mamba_.clear();
  }

  // A row that takes in so many positions, the first of which has this number in its sequence, the
  // start token not counted.
  void add(const StageState& stage, int64_t position, int64_t count) {
    add(stage.blob.data(), stage.keys.data(), stage.values.data(), 1 + position, count);
  }

  // One that takes in its start token, with a recurrent state of zeros; the pages stay given.
  void add_start(float* state, float* const* keys, float* const* values) {
    add(state, keys, values, 0, 1);
  }

  // Takes in x (positions, dim), one row's after another's, and makes it the output before the last
  // norm. All threads of the team call it. A trail, of trail_size floats, is to roll back with.
  void prefill(const cpu::Worker& worker, float* x, float* scratch, float* trail = nullptr) const {
    visit([&](const auto& model, const auto& rows) {
      model.prefill(worker, rows, x, scratch, trail);
    });
  }

  // Brings one of the rows, once after a call with a trail, to the state after only the first
  // `kept` of its positions. Work of the calling thread alone.
  void roll_back(int64_t row, float* trail, int64_t kept) const {
    visit([&](const auto& model, const auto& rows) { model.roll_back(rows, row, trail, kept); });
  }
  int64_t trail_size(int64_t rows, int64_t positions) const {
    return visit([&](const auto& model, const auto&) { return model.trail_size(rows, positions); });
  }

  // The last norm, of so many positions; out may be x. Work of the calling thread alone.
  void normalize(const float* x, int64_t positions, float* out) const {
    visit([&](const auto& model, const auto&) { model.normalize(x, positions, out); });
  }

  // Weights that a position is multiplied with.
  int64_t weights() const {
    return visit([](const auto& model, const auto&) { return model.weights(); });
  }

  // Floats that each thread needs for what products prepare.
  int64_t prepared_floats(int64_t positions) const {
    return visit([&](const auto& model, const auto&) { return model.prepared_floats(positions); });
  }
  // Floats of working memory, for so many positions of all rows, none of which comes to have more
  // than `end` positions in its sequence.
  int64_t scratch_size(int64_t positions, int64_t end, int64_t threads) const {
    return visit([&](const auto& model, const auto&) {
      return model.scratch_size(positions, 1 + end, threads);
    });
  }

 private:
  void add(float* state, float* const* keys, float* const* values, int64_t first, int64_t count) {
    if (const auto* model = std::get_if<cpu::TransformerStage>(&parts_->model)) {
      cpu::TransformerRow row;
      row.position = first;
      row.count = count;
      row.keys = keys;
      row.values = values;
      row.head_stride = layout_->plane;
      row.layer_stride = model->heads * layout_->plane;
      row.delayed = state;
      row.part_stride = model->dim / 2;
      transformer_.push_back(row);
      return;
    }
    const int64_t layers = std::max<int64_t>(layout_->layers, 1);
    cpu::MambaRow row;
    row.count = count;
    row.ssm = state;
    row.window = state + layout_->ssm;
    row.ssm_stride = layout_->ssm / layers;
    row.window_stride = (layout_->state - layout_->ssm) / layers;
    mamba_.push_back(row);
  }

  const StageParts* parts_;
  const StageLayout* layout_;
  std::vector<cpu::TransformerRow> transformer_;
  std::vector<cpu::MambaRow> mamba_;
};

}  // namespace mblm::decode
