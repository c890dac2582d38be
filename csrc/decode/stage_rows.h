// The rows that take part in a call of a stage's kernels, whichever kind of stage it is.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/team.h"
#include "decode/memory.h"
#include "decode/parts.h"
#include "decode/rows.h"

namespace mblm::decode {

class StageRows {
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
    float* const state = stage.blob.data();
    if (const auto* model = std::get_if<cpu::TransformerStage>(&parts_->model)) {
      cpu::TransformerRow row;
      row.position = 1 + position;
      row.count = count;
      row.keys = stage.keys.data();
      row.values = stage.values.data();
      row.head_stride = layout_->plane;
      row.layer_stride = model->heads * layout_->plane;
      row.delayed = state;
      row.part_stride = model->dim / 2;
      transformer_.push_back(row);
    } else {
      const int64_t layers = number_of_layers();
      cpu::MambaRow row;
      row.count = count;
      row.ssm = state;
      row.window = state + layout_->ssm;
      row.ssm_stride = layers ? layout_->ssm / layers : 0;
      row.window_stride = layers ? (layout_->state - layout_->ssm) / layers : 0;
      mamba_.push_back(row);
    }
  }

  // Takes in x (positions, dim), one row's after another's; the output before the last norm
  // replaces it. All threads of the team call it.
  void prefill(const cpu::Worker& worker, float* x, float* scratch) const {
    visit([&](const auto& model, const auto& rows) { model.prefill(worker, rows, x, scratch); });
  }

  // The last norm, of so many positions; out may be x. Work of the calling thread alone.
  void normalize(const float* x, int64_t positions, float* out) const {
    visit([&](const auto& model, const auto&) { model.normalize(x, positions, out); });
  }

  // Weights that a position is multiplied with.
  int64_t weights() const {
    return visit([](const auto& model, const auto&) { return model.weights(); });
  }

  // Floats of working memory, for so many positions of all rows, none after number `end`.
  int64_t scratch_size(int64_t positions, int64_t end, int64_t threads) const {
    return visit([&](const auto& model, const auto&) {
      return model.scratch_size(positions, 1 + end, threads);
    });
  }

 private:
  // Calls function(model, rows); a hosted stage has neither, and gives 0.
  template <class Function>
  auto visit(Function function) const {
    using Result = decltype(function(cpu::TransformerStage(), transformer_));
    return std::visit(
        [&](const auto& model) -> Result {
          using Model = std::decay_t<decltype(model)>;
          if constexpr (std::is_same_v<Model, Hosted>) {
            return Result();
          } else if constexpr (std::is_same_v<Model, cpu::TransformerStage>) {
            return function(model, transformer_);
          } else {
            return function(model, mamba_);
          }
        },
        parts_->model);
  }

  int64_t number_of_layers() const {
    return std::visit(
        [](const auto& model) -> int64_t {
          if constexpr (std::is_same_v<std::decay_t<decltype(model)>, Hosted>) {
            return 0;
          } else {
            return int64_t(model.layers.size());
          }
        },
        parts_->model);
  }

  const StageParts* parts_;
  const StageLayout* layout_;
  std::vector<cpu::TransformerRow> transformer_;
  std::vector<cpu::MambaRow> mamba_;
};

}  // namespace mblm::decode
