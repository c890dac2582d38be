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
  // Takes in x (selected rows, dim) and returns the output before the last norm: x or, of the
  // calling thread alone, a part of scratch. All threads call it.
  virtual const float* step(const Worker& worker, float* x, float* scratch) const = 0;
  // The last norm of so many rows; out may be x. Work of the calling thread alone.
  virtual void normalize(const float* x, int64_t rows, float* out) const = 0;
  // After a step.
  virtual void advance() = 0;
  // Goes back to the state after the start token, of some rows; none is selected then.
  virtual void restart(const std::vector<int64_t>& rows) = 0;
};

template <class Stage>
class BoundStageOf : public BoundStage {
 public:
  BoundStageOf(const Stage& stage, typename Stage::State state)
      : stage_(stage), all_(std::move(state)) {}

  int64_t weights() const override { return stage_.weights(); }

  int64_t scratch_size(int64_t threads) const override {
    return stage_.scratch_size(all_, 1, threads);
  }

  void select(const std::vector<int64_t>& rows) override {
    which_ = rows;
    selected_.rows.clear();
    for (const int64_t row : rows) selected_.rows.push_back(all_.rows[row]);
  }

  const float* step(const Worker& worker, float* x, float* scratch) const override {
    return stage_.prefill(worker, selected_, 1, x, scratch);
  }

  void normalize(const float* x, int64_t rows, float* out) const override {
    stage_.normalize(x, rows, out);
  }

  void advance() override {
    for (size_t i = 0; i < which_.size(); ++i) {
      selected_.rows[i].advance(1);
      all_.rows[which_[i]].advance(1);
    }
  }

  void restart(const std::vector<int64_t>& rows) override {
    for (const int64_t row : rows) stage_.restart(all_.rows[row]);
    which_.clear();
    selected_.rows.clear();
  }

 private:
  const Stage& stage_;
  typename Stage::State all_, selected_;
  std::vector<int64_t> which_;
};

}  // namespace mblm::cpu
