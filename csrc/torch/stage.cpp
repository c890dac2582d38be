// Glue of a compiled stage's next positions and of packed linear layers.
#include "stage.h"

#include <memory>
#include <type_traits>

#include "bound_rows.h"
#include "common.h"
#include "cuda/decode_product.h"
#include "cuda/stage_step.h"
#include "decoding_team.h"
#include "stage_state.h"

namespace mblm {
namespace {

using at::Tensor;

// A copy of x, which must be where the weights are.
Tensor copy_of_input(const Tensor& x, int64_t dim, const c10::Device& device) {
  check_type("x", x, at::kFloat);
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) > 0 && x.size(1) > 0 && x.size(2) == dim,
                    "x must have shape [B >= 1, S >= 1, ", dim, "], got ", x.sizes());
  TORCH_CHECK_VALUE(x.device() == device, "x must be on ", device, ", got ", x.device());
  Tensor copy = make::empty(x.sizes(), x.options());
  return copy.copy_(x);
}

// x (rows, S, dim), a position at a time. Several caches come one after the other: their rows lie
// apart.
template <class Model, class Row>
Tensor prefill_on_gpu(const Model& model, const std::vector<Row>& state,
                      const std::vector<int64_t>& sizes, const std::vector<int64_t>& positions,
                      const Tensor& x) {
  const c10::DeviceGuard device(x.device());
  Tensor values = x.transpose(0, 1).contiguous();  // (S, rows, dim)
  int64_t first = 0;
  for (size_t cache = 0; cache < sizes.size(); first += sizes[cache++]) {
    const int64_t rows = sizes[cache];
    Tensor at = make::full({rows}, positions[cache], x.options().dtype(at::kLong));
    Tensor workspace = make::empty({cuda::workspace_size(model, rows)}, x.options());
    cuda::StageStep step;
    step.rows = rows;
    step.is_dependent = false;  // the weights may just have been packed
    step.positions = at.const_data_ptr<int64_t>();
    step.limit = positions[cache] + x.size(1);
    step.workspace = workspace.mutable_data_ptr<float>();
    for (int64_t n = 0; n < x.size(1); ++n) {
      if (n > 0) at.add_(1);
      step.x = values.mutable_data_ptr<float>() + (n * x.size(0) + first) * model.dim;
      launch(x.device(),
             [&](cuda::Stream stream) { return cuda::step(model, state[first], step, stream); });
    }
  }
  return values.transpose(0, 1).contiguous();
}

}  // namespace

Tensor packed_linear(const Tensor& x, const PackedLinear& linear) {
  check_type("x", x, at::kFloat);
  TORCH_CHECK_VALUE(x.dim() > 0, "x must be no scalar");
  TORCH_CHECK_VALUE(!linear.empty() && x.device() == linear[0].device(),
                    "x must be on the weight's device, got ", x.device());
  Weights list(linear);
  const cpu::Matrix matrix = list.matrix(-1, x.size(-1));
  const Tensor rows = x.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = matrix.outputs;
  Tensor out = make::empty(shape, rows.options());
  const int64_t count = matrix.outputs ? out.numel() / matrix.outputs : 0;
  if constexpr (kCuda) {
    if (on_gpu(x)) {
      cuda::Product product;
      product.is_dependent = false;  // the weights may just have been packed
      product.rows = count;
      product.x = rows.const_data_ptr<float>();
      product.x_stride = matrix.inputs;
      product.matrix = matrix;
      product.out = out.mutable_data_ptr<float>();
      const c10::DeviceGuard device(x.device());
      launch(x.device(), [&](cuda::Stream stream) { return cuda::multiply(product, stream); });
      return out;
    }
  }
  with_team(
      threads_for(count * matrix.weights()),
      [&](int64_t) { return cpu::prepared_floats(matrix, count); },
      [&](const cpu::Worker& worker) {
        cpu::multiply(worker, matrix, rows.const_data_ptr<float>(), count,
                      static_cast<float*>(out.data_ptr()));
      });
  return out;
}

Tensor Stage::prefill(const Tensor& x, const std::vector<Tensor>& state,
                      const std::vector<int64_t>& positions) const {
  return std::visit(
      [&](const auto& model) {
        const c10::Device device = weights.front().device();
        Tensor out = copy_of_input(x, model.dim, device);
        const int64_t rows = out.size(0), count = out.size(1);
        const std::vector<int64_t> counts(positions.size(), count);
        const auto groups = bind_groups(model, state, positions, counts, rows, device);
        if constexpr (kCuda) {
          if (on_gpu(out)) return prefill_on_gpu(model, groups.rows, groups.sizes, positions, out);
        }
        const auto bound = bind_rows(model, groups.rows, groups.positions);
        const auto bound_rows = bound.rows(count);
        const int64_t end = *std::max_element(positions.begin(), positions.end()) + count;
        std::unique_ptr<float[]> scratch;
        float* values = out.mutable_data_ptr<float>();
        with_team(
            threads_for(rows * count * model.weights()),
            [&](int64_t threads) {
              const int64_t floats = model.scratch_size(rows * count, end, threads);
              scratch = std::make_unique_for_overwrite<float[]>(floats);
              return model.prepared_floats(rows * count);
            },
            [&](const cpu::Worker& worker) {
              bound.stage().prefill(worker, bound_rows, values, scratch.get());
              worker.share(rows * count, 16, [&](int64_t begin, int64_t end) {
                const int64_t first = begin * model.dim;
                model.normalize(values + first, end - begin, values + first);
              });
            });
        return out;
      },
      stage);
}

}  // namespace mblm
