// Glue of a compiled stage's next positions and of packed linear layers, and the registration of
// what decodes.
#include "stage.h"

#include <torch/library.h>

#include <memory>
#include <type_traits>

#include "common.h"
#include "decoding_team.h"
#include "hierarchy.h"
#include "stage_state.h"

namespace mblm {
namespace {

using at::Tensor;

Tensor copy_of_input(const Tensor& x, int64_t dim) {
  check_type("x", x, at::kFloat);
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) > 0 && x.size(1) > 0 && x.size(2) == dim,
                    "x must have shape [B >= 1, S >= 1, ", dim, "], got ", x.sizes());
  TORCH_CHECK_VALUE(x.device().is_cpu(), "x must be on the CPU");
  Tensor copy = at::empty(x.sizes(), x.options());
  return copy.copy_(x);
}

}  // namespace

Tensor packed_linear(const Tensor& x, const PackedLinear& linear) {
  check_type("x", x, at::kFloat);
  TORCH_CHECK_VALUE(x.dim() > 0 && x.device().is_cpu(), "x must be on the CPU, and no scalar");
  Weights list(linear);
  const cpu::Matrix matrix = list.matrix(-1, x.size(-1));
  const Tensor rows = x.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = matrix.outputs;
  Tensor out = at::empty(shape, rows.options());
  const int64_t count = matrix.outputs ? out.numel() / matrix.outputs : 0;
  with_team(threads_for(count * matrix.weights()), [&](const cpu::Worker& worker) {
    cpu::multiply(worker, 0, matrix, rows.const_data_ptr<float>(), count,
                  static_cast<float*>(out.data_ptr()));
  });
  return out;
}

Tensor Stage::prefill(const Tensor& x, const std::vector<Tensor>& state,
                      const std::vector<int64_t>& positions) const {
  return std::visit(
      [&](const auto& model) {
        Tensor out = copy_of_input(x, model.dim);
        const int64_t rows = out.size(0), count = out.size(1);
        const int64_t threads = threads_for(rows * count * model.weights());
        typename std::decay_t<decltype(model)>::State bound;
        const std::vector<int64_t> counts(positions.size(), count);
        bind_groups(model, state, positions, counts, rows, bound);
        const int64_t floats = model.scratch_size(bound, count, threads);
        const auto scratch = std::make_unique_for_overwrite<float[]>(floats);
        float* values = out.mutable_data_ptr<float>();
        with_team(threads, [&](const cpu::Worker& worker) {
          model.prefill(worker, bound, count, values, scratch.get());
        });
        return out;
      },
      stage);
}

}  // namespace mblm

TORCH_LIBRARY_FRAGMENT(mblm, library) {
  library.class_<mblm::Stage>("Stage").def("prefill", &mblm::Stage::prefill);
  library.class_<mblm::Hierarchy>("Hierarchy").def("run", &mblm::Hierarchy::run);
  library.def("packed_linear(Tensor x, Tensor[] linear) -> Tensor", &mblm::packed_linear);
  library.def(
      "transformer_stage(Tensor[] weights, int heads) -> "
      "__torch__.torch.classes.mblm.Stage",
      &mblm::transformer_stage);
  library.def(
      "hierarchy(__torch__.torch.classes.mblm.Stage[] stages, int[] seq_lens, Tensor[] weights, "
      "float[] eps) -> __torch__.torch.classes.mblm.Hierarchy",
      &mblm::hierarchy);
  library.def("mamba1_stage(Tensor[] weights) -> __torch__.torch.classes.mblm.Stage",
              &mblm::mamba1_stage);
  library.def("mamba2_stage(Tensor[] weights, float eps) -> __torch__.torch.classes.mblm.Stage",
              &mblm::mamba2_stage);
}
