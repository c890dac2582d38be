// A stage together with the states of its rows, whichever stage it is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/team.h"

namespace mblm::cpu {

// The first thread alone selects, advances and restarts.
class BoundStage {
 public:
  virtual ~BoundStage() = default;

  virtual int64_t weights() const = 0;
  // Floats of working memory for a step of all rows.
  virtual int64_t scratch_size(int64_t threads) const = 0;
  // Chooses the rows of the next steps.
  virtual void select(const std::vector<int64_t>& rows) = 0;
  // Takes in x (selected rows, dim), which the output before the last norm replaces. All threads
  // call it.
  virtual void step(const Worker& worker, float* x, float* scratch) const = 0;
  // The last norm of so many rows; out may be x. Work of the calling thread alone.
  virtual void normalize(const float* x, int64_t rows, float* out) const = 0;
  // After a step.
  virtual void advance() = 0;
  // Goes back to the state after the start token, of some rows; none is selected then.
  virtual void restart(const std::vector<int64_t>& rows) = 0;
};

// What a row's state after the start token is copied from, to go back to it.
struct Saved {
  const float* from;
  float* to;
  int64_t size;
};

template <class Row>
struct BoundRow {
  Row row;
  std::vector<float*> pages;  // that the row points to
  std::vector<Saved> start;   // empty where it never starts anew
};

template <class Stage>
class BoundStageOf : public BoundStage {
 public:
  // No row has more than `end` positions in its cache.
  BoundStageOf(Stage stage, std::vector<BoundRow<typename Stage::Row>> rows, int64_t end)
      : stage_(std::move(stage)), all_(std::move(rows)), end_(end) {}

  int64_t weights() const override { return stage_.weights(); }

  int64_t scratch_size(int64_t threads) const override {
    return stage_.scratch_size(int64_t(all_.size()), end_, threads);
  }

  void select(const std::vector<int64_t>& rows) override {
    which_ = rows;
    selected_.clear();
    for (const int64_t row : rows) selected_.push_back(all_[row].row);
  }

  void step(const Worker& worker, float* x, float* scratch) const override {
    stage_.prefill(worker, selected_, x, scratch);
  }

  void normalize(const float* x, int64_t rows, float* out) const override {
    stage_.normalize(x, rows, out);
  }

  void advance() override {
    for (size_t i = 0; i < which_.size(); ++i) {
      selected_[i].advance(1);
      all_[which_[i]].row.advance(1);
    }
  }

  void restart(const std::vector<int64_t>& rows) override {
    for (const int64_t which : rows) {
      BoundRow<typename Stage::Row>& of = all_[which];
      if constexpr (requires { of.row.position; }) of.row.position = 1;
      for (const Saved& part : of.start) std::copy_n(part.from, part.size, part.to);
    }
    which_.clear();
    selected_.clear();
  }

  // Of all rows, with so many positions each from where they are.
  std::vector<typename Stage::Row> rows(int64_t count) const {
    std::vector<typename Stage::Row> result;
    for (const auto& bound : all_) {
      result.push_back(bound.row);
      result.back().count = count;
    }
    return result;
  }
  const Stage& stage() const { return stage_; }

 private:
  const Stage stage_;
  std::vector<BoundRow<typename Stage::Row>> all_;
  const int64_t end_;
  std::vector<typename Stage::Row> selected_;
  std::vector<int64_t> which_;
};

}  // namespace mblm::cpu
