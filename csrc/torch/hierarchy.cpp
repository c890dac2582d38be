// Builds the hierarchy from its weights, and runs it.
#include "hierarchy.h"

#include "bound_run.h"
#include "common.h"

namespace mblm {
namespace {

using at::Tensor;

int64_t dim_of(const Stage& stage) {
  return std::visit([](const auto& model) { return model.dim; }, stage.stage);
}

}  // namespace

c10::intrusive_ptr<Hierarchy> hierarchy(const std::vector<c10::intrusive_ptr<Stage>>& stages,
                                        const std::vector<int64_t>& seq_lens,
                                        const std::vector<Tensor>& weights,
                                        const std::vector<double>& eps) {
  TORCH_CHECK_VALUE(!stages.empty(), "stages must not be empty");
  check_count("seq_lens", seq_lens.size(), stages.size());
  check_count("eps", eps.size(), 2 * (stages.size() - 1));
  auto result = c10::make_intrusive<Hierarchy>();
  result->stages = stages;
  result->weights = weights;
  result->parts.resize(stages.size());
  for (const auto& stage : stages) {
    TORCH_CHECK_VALUE(weights.empty() || stage->weights.front().device() == weights[0].device(),
                      "stages must be on the weights' device");
  }
  int64_t patch_size = 1;
  for (size_t n = stages.size(); n-- > 0;) {
    TORCH_CHECK_VALUE(seq_lens[n] > 0 && seq_lens[n] <= INT64_MAX / patch_size,
                      "seq_lens must be positive, got ", seq_lens[n]);
    cpu::RunStage& part = result->parts[n];
    part.dim = dim_of(*stages[n]);
    part.seq_len = seq_lens[n];
    part.patch_size = patch_size;
    patch_size *= seq_lens[n];
  }
  Weights list(result->weights);
  const int64_t width = result->parts.back().dim;
  const Tensor table = list.tensor({-1, width});
  result->parts.back().table = table.const_data_ptr<float>();
  TORCH_CHECK_VALUE(table.size(0) > 0, "weights[0] must have a row for each token");
  result->to_logits = list.matrix(table.size(0), width);
  for (size_t n = 0; n + 1 < stages.size(); ++n) {
    cpu::RunStage& part = result->parts[n];
    const cpu::RunStage& below = result->parts[n + 1];
    const int64_t flat = part.patch_size * width;
    part.table = list.tensor({table.size(0), width}).const_data_ptr<float>();
    part.flat_norm.weight = list.vector(flat);
    part.flat_norm.bias = list.vector(flat);
    part.flat_norm.eps = float(eps[2 * n]);
    part.project = list.matrix(part.dim, flat);
    part.norm.weight = list.vector(part.dim);
    part.norm.bias = list.vector(part.dim);
    part.norm.eps = float(eps[2 * n + 1]);
    part.to_context = list.matrix(below.seq_len * below.dim, part.dim);
  }
  TORCH_CHECK_VALUE(list.empty(), "weights holds more than there are stages for");
  return result;
}

RunResults Hierarchy::run(const std::vector<Tensor>& state, const std::vector<int64_t>& cached,
                          const std::vector<int64_t>& positions, const std::vector<Tensor>& outputs,
                          const std::vector<Tensor>& start_outputs,
                          const std::vector<Tensor>& contexts, const std::vector<Tensor>& tables,
                          const std::vector<Tensor>& history, const std::vector<int64_t>& lengths,
                          const std::optional<Tensor>& pending,
                          const std::vector<int64_t>& max_tokens, const std::vector<int64_t>& room,
                          double temperature, int64_t top_k, double top_p,
                          const std::optional<at::Generator>& generator,
                          const std::optional<Tensor>& uniform,
                          const std::optional<Tensor>& ends) const {
  TORCH_CHECK_VALUE(weights.front().device().is_cpu(), "weights must be on the CPU");
  BoundRun bound(
      *this, {state, cached, positions, outputs, start_outputs, contexts, tables, history, lengths,
              pending, max_tokens, room, temperature, top_k, top_p, generator, uniform, ends});
  bound.work();
  return bound.results();
}

}  // namespace mblm
