// Glue of the compiled stages: checks of states and inputs, threads, random numbers, registration.
#include "stage.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/uniform.h>
#include <torch/library.h>

#include <exception>
#include <optional>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common.h"
#include "cpu/run.h"

namespace mblm {
namespace {

using at::Tensor;

const Tensor& check_state(const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  check_shape(name, tensor, shape);
  check_type(name, tensor, at::kFloat);
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous(), name,
                    " must be contiguous and on the CPU");
  return tensor;
}

// keys, values, delayed and, with rotary positions, cosines and sines.
cpu::TransformerState bind_state(const cpu::TransformerStage& stage,
                                 const std::vector<Tensor>& state, int64_t rows, int64_t first,
                                 int64_t count) {
  TORCH_CHECK_VALUE(state.size() == 3 || state.size() == 5, "state must hold 3 or 5 tensors, got ",
                    state.size());
  const int64_t layers = int64_t(stage.layers.size());
  TORCH_CHECK_VALUE(state[0].dim() == 5, "keys must have five dimensions, got ", state[0].sizes());
  cpu::TransformerState bound;
  bound.rows = rows;
  bound.capacity = state[0].size(3);
  TORCH_CHECK_VALUE(first >= 0 && count <= bound.capacity - first, "state has room for ",
                    bound.capacity, " positions, got ", first, " + ", count);
  const std::vector<int64_t> cache = {layers, rows, stage.heads, bound.capacity, stage.head_dim};
  bound.keys = check_state("keys", state[0], cache).mutable_data_ptr<float>();
  bound.values = check_state("values", state[1], cache).mutable_data_ptr<float>();
  bound.delayed =
      check_state("delayed", state[2], {layers, 2, rows, stage.dim / 2}).mutable_data_ptr<float>();
  if (state.size() == 5) {
    TORCH_CHECK_VALUE(stage.head_dim % 2 == 0, "rotary positions need an even width of heads");
    TORCH_CHECK_VALUE(state[3].dim() == 2 && state[3].size(0) >= first + count,
                      "cos must have a row for each of ", first + count, " positions, got ",
                      state[3].sizes());
    const std::vector<int64_t> angles = {state[3].size(0), stage.head_dim / 2};
    bound.cos = check_state("cos", state[3], angles).const_data_ptr<float>();
    bound.sin = check_state("sin", state[4], angles).const_data_ptr<float>();
  }
  return bound;
}

cpu::MambaState bind_state(const std::vector<Tensor>& state, const std::vector<int64_t>& ssm,
                           const std::vector<int64_t>& window, int64_t rows) {
  TORCH_CHECK_VALUE(state.size() == 2, "state must hold 2 tensors, got ", state.size());
  cpu::MambaState bound;
  bound.rows = rows;
  bound.ssm = check_state("ssm", state[0], ssm).mutable_data_ptr<float>();
  bound.window = check_state("window", state[1], window).mutable_data_ptr<float>();
  return bound;
}

cpu::MambaState bind_state(const cpu::Mamba1Stage& stage, const std::vector<Tensor>& state,
                           int64_t rows, int64_t, int64_t) {
  const int64_t layers = int64_t(stage.layers.size());
  return bind_state(state, {layers, rows, stage.inner, stage.states},
                    {layers, rows, stage.taps - 1, stage.inner}, rows);
}

cpu::MambaState bind_state(const cpu::Mamba2Stage& stage, const std::vector<Tensor>& state,
                           int64_t rows, int64_t, int64_t) {
  const int64_t layers = int64_t(stage.layers.size());
  return bind_state(state, {layers, rows, stage.heads, stage.inner / stage.heads, stage.states},
                    {layers, rows, stage.taps - 1, stage.inner + 2 * stage.states}, rows);
}

// Calls function(worker) on every thread of a team; the caller's own is the first.
template <class Function>
void with_team(int64_t threads, Function function) {
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
    std::optional<cpu::Team> team;
#pragma omp parallel num_threads(int(threads))
    {
#pragma omp single
      team.emplace(omp_get_num_threads());
      function(cpu::Worker{*team, omp_get_thread_num()});
    }
    return;
  }
#endif
  cpu::Team team(1);
  function(cpu::Worker{team, 0});
}

Tensor check_rows(const Tensor& x, int64_t dim) {
  check_type("x", x, at::kFloat);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) > 0 && x.size(1) == dim,
                    "x must have shape [B >= 1, ", dim, "], got ", x.sizes());
  TORCH_CHECK_VALUE(x.device().is_cpu(), "x must be on the CPU");
  Tensor copy = at::empty(x.sizes(), x.options());
  return copy.copy_(x);
}

// What the local stage takes in for each of `steps` positions.
cpu::LocalInput check_input(const Tensor& table, const std::optional<Tensor>& positions,
                            const std::optional<Tensor>& rotation,
                            const std::optional<Tensor>& context, int64_t rows, int64_t vocabulary,
                            int64_t dim, int64_t steps) {
  const auto check_steps = [&](const char* name, const Tensor& tensor, int64_t dims, int64_t axis) {
    TORCH_CHECK_VALUE(tensor.dim() == dims && tensor.size(axis) >= steps, name,
                      " must have a row for each of ", steps, " steps");
  };
  cpu::LocalInput input;
  input.dim = dim;
  input.table = check_state("table", table, {vocabulary, dim}).const_data_ptr<float>();
  if (positions) {
    check_steps("positions", *positions, 2, 0);
    input.positions =
        check_state("positions", *positions, {positions->size(0), dim}).const_data_ptr<float>();
  }
  if (rotation) {
    check_steps("rotation", *rotation, 3, 0);
    input.rotation =
        check_state("rotation", *rotation, {rotation->size(0), dim / 2, 2}).const_data_ptr<float>();
  }
  if (context) {
    check_steps("context", *context, 3, 1);
    check_type("context", *context, at::kFloat);
    TORCH_CHECK_VALUE(context->size(0) == rows && context->size(2) == dim &&
                          context->stride(2) == 1 && context->stride(1) == dim &&
                          context->device().is_cpu(),
                      "context must be [", rows, ", S, ", dim, "], its positions contiguous, got ",
                      context->sizes());
    input.context = context->const_data_ptr<float>();
    input.context_stride = context->stride(0);
  }
  return input;
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
  with_team(at::get_num_threads(), [&](const cpu::Worker& worker) {
    cpu::multiply(worker, 0, matrix, rows.const_data_ptr<float>(),
                  matrix.inputs ? rows.numel() / matrix.inputs : 0,
                  static_cast<float*>(out.data_ptr()));
  });
  return out;
}

Tensor Stage::step(const Tensor& x, const std::vector<Tensor>& state, int64_t position) const {
  return std::visit(
      [&](const auto& model) {
        Tensor out = check_rows(x, model.dim);
        auto bound = bind_state(model, state, out.size(0), position, 1);
        std::vector<int64_t> positions(out.size(0), position);
        bound.positions = positions.data();
        const int64_t threads = at::get_num_threads();
        std::vector<float> scratch(model.scratch_size(bound, threads));
        float* values = out.mutable_data_ptr<float>();
        with_team(threads, [&](const cpu::Worker& worker) {
          model.step(worker, bound, values, scratch.data());
        });
        return out;
      },
      stage);
}

std::tuple<Tensor, Tensor, int64_t> Stage::run(
    const Tensor& x, const std::optional<Tensor>& pending, int64_t max_tokens, int64_t max_steps,
    const std::vector<Tensor>& state, int64_t position, const Tensor& table,
    const std::optional<Tensor>& positions, const std::optional<Tensor>& rotation,
    const std::optional<Tensor>& context, const PackedLinear& to_logits, double temperature,
    int64_t top_k, double top_p, const std::optional<at::Generator>& generator,
    const std::optional<Tensor>& ends) const {
  return std::visit(
      [&](const auto& model) {
        const int64_t dim = model.dim;
        Tensor hidden = check_rows(x, dim);
        const int64_t rows = hidden.size(0);
        TORCH_CHECK_VALUE(max_tokens > 0, "max_tokens must be positive, got ", max_tokens);
        TORCH_CHECK_VALUE(max_steps >= (pending ? 1 : 0), "max_steps: no room for the next byte");
        TORCH_CHECK_VALUE(temperature > 0 && top_k > 0, "temperature and top_k must be positive");

        cpu::Run run;
        run.rows = rows;
        run.max_tokens = max_tokens;
        run.max_steps = max_steps;
        Weights list(to_logits);
        run.to_logits = list.matrix(-1, dim);
        const int64_t vocabulary = run.to_logits.outputs;
        run.sampling = {float(temperature), std::min(top_k, vocabulary), float(top_p)};

        run.input =
            check_input(table, positions, rotation, context, rows, vocabulary, dim, max_steps);
        Tensor ending;  // kept alive while the run looks at it
        if (ends) {
          check_type("ends", *ends, at::kBool);
          check_shape("ends", *ends, {vocabulary});
          TORCH_CHECK_VALUE(ends->device().is_cpu(), "ends must be on the CPU");
          ending = ends->contiguous();
          run.ends = static_cast<const uint8_t*>(ending.const_data_ptr());
        }

        auto bound = bind_state(model, state, rows, position, max_steps);
        std::vector<int64_t> places(rows, position);
        bound.positions = places.data();

        Tensor ids = at::empty({rows, max_tokens}, at::kLong);
        run.ids = ids.mutable_data_ptr<int64_t>();
        run.x = hidden.mutable_data_ptr<float>();
        std::vector<int64_t> next(rows);
        if (pending) {
          check_type("pending", *pending, at::kLong);
          check_shape("pending", *pending, {rows});
          check_ids_range(pending->contiguous(), vocabulary);
          for (int64_t row = 0; row < rows; ++row) {
            next[row] = pending->const_data_ptr<int64_t>()[row * pending->stride(0)];
          }
        }
        run.pending = next.data();
        run.has_pending = pending.has_value();
        run.logits.resize(rows * vocabulary);
        run.uniform.resize(rows * vocabulary);

        // The generator's numbers, as torch's uniform_ draws them for (rows, vocabulary).
        Tensor uniform = at::empty({rows, vocabulary}, hidden.options());
        std::exception_ptr failure;
        run.draw = [&](float* out) {
          try {
            uniform.uniform_(0, 1, generator);
            std::copy_n(uniform.const_data_ptr<float>(), rows * vocabulary, out);
          } catch (...) {
            failure = std::current_exception();
            std::fill_n(out, rows * vocabulary, 0.5f);
          }
        };

        const int64_t threads = at::get_num_threads();
        std::vector<float> scratch(model.scratch_size(bound, threads));
        with_team(threads, [&](const cpu::Worker& worker) {
          cpu::run_patch(worker, model, bound, run, scratch.data());
        });
        if (failure) std::rethrow_exception(failure);
        return std::make_tuple(ids.narrow(1, 0, run.num_tokens), hidden, run.num_steps);
      },
      stage);
}

}  // namespace mblm

TORCH_LIBRARY_FRAGMENT(mblm, library) {
  library.class_<mblm::Stage>("Stage")
      .def("step", &mblm::Stage::step)
      .def("run", &mblm::Stage::run);
  library.def("packed_linear(Tensor x, Tensor[] linear) -> Tensor", &mblm::packed_linear);
  library.def(
      "transformer_stage(Tensor[] weights, int heads) -> "
      "__torch__.torch.classes.mblm.Stage",
      &mblm::transformer_stage);
  library.def("mamba1_stage(Tensor[] weights) -> __torch__.torch.classes.mblm.Stage",
              &mblm::mamba1_stage);
  library.def("mamba2_stage(Tensor[] weights, float eps) -> __torch__.torch.classes.mblm.Stage",
              &mblm::mamba2_stage);
}
