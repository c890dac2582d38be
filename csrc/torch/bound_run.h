// A run bound to the tensors that Python holds, everything checked first.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "hierarchy.h"
#include "uniform_numbers.h"

namespace mblm {

// What Hierarchy::run is given; see there.
struct RunArguments {
  const std::vector<at::Tensor>& state;
  const std::vector<int64_t>&cached, &positions;
  const std::vector<at::Tensor>&outputs, &start_outputs, &contexts, &tables, &history;
  const std::vector<int64_t>& lengths;
  const std::optional<at::Tensor>& pending;
  const std::vector<int64_t>&max_tokens, &room;
  double temperature;
  int64_t top_k;
  double top_p;
  const std::optional<at::Generator>& generator;
  const std::optional<at::Tensor>&uniform, &ends;
};

class BoundRun {
 public:
  // Throws if an argument does not fit the hierarchy or the others.
  BoundRun(const Hierarchy& hierarchy, const RunArguments& given);
  BoundRun(const BoundRun&) = delete;
  BoundRun& operator=(const BoundRun&) = delete;

  // Runs on the threads that torch has. Once alone.
  void work();
  RunResults results() const;

 private:
  bool has_stages_above() const { return hierarchy_.stages.size() > 1; }
  // A stage that may start anew in a run has a state to go back to.
  bool may_restart(size_t n) const { return has_stages_above() && n > 0; }

  void check_arguments() const;
  void bind_sampling();
  void bind_stage(size_t n);
  void bind_model(size_t n, const std::vector<int64_t>& ends);
  void bind_stage_rows(size_t n, int64_t end);
  at::Tensor bind_contexts(size_t n, int64_t end);
  void bind_rows();
  void bind_cache_rows(size_t cache, const at::Tensor& pending);

  const Hierarchy& hierarchy_;
  const RunArguments given_;
  const size_t caches_;
  const int64_t vocabulary_;
  int64_t num_rows_ = 0;

  cpu::Run run_;
  std::vector<std::unique_ptr<cpu::BoundStage>> models_;
  size_t next_tensor_ = 0;      // of the state
  std::vector<int64_t> sizes_;  // rows of each cache
  // What the run writes to, and what is kept alive while it looks at it.
  std::vector<at::Tensor> outputs_, contexts_, start_outputs_;
  at::Tensor ids_, ends_;
  std::optional<UniformNumbers> numbers_;
};

}  // namespace mblm
