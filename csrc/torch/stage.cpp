// Glue of the compiled stages: checks of states and inputs, threads, random numbers, registration.
#include "stage.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/uniform.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <type_traits>

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

// The tensors of one cache, which holds one row or several at the same position.
using Group = c10::ArrayRef<Tensor>;

// keys, values, delayed and, with rotary positions, cosines and sines.
int64_t tensors_of(const cpu::TransformerStage&, const std::vector<Tensor>& state, size_t groups) {
  const int64_t each = groups ? int64_t(state.size() / groups) : 0;
  TORCH_CHECK_VALUE(each == 3 || each == 5, "state must hold 3 or 5 tensors, got ", state.size(),
                    " for ", groups, " caches");
  return each;
}

void bind(const cpu::TransformerStage& stage, Group group, int64_t first, int64_t count,
          cpu::TransformerState& state) {
  const int64_t layers = int64_t(stage.layers.size());
  TORCH_CHECK_VALUE(group[0].dim() == 5, "keys must have five dimensions, got ", group[0].sizes());
  const int64_t rows = group[0].size(1), capacity = group[0].size(3), half = stage.dim / 2;
  TORCH_CHECK_VALUE(first >= 0 && count <= capacity - first, "state has room for ", capacity,
                    " positions, got ", first, " + ", count);
  const std::vector<int64_t> cache = {layers, rows, stage.heads, capacity, stage.head_dim};
  const int64_t of_row = stage.heads * capacity * stage.head_dim;
  cpu::TransformerRow row;
  row.position = first;
  row.capacity = capacity;
  row.keys = check_state("keys", group[0], cache).mutable_data_ptr<float>();
  row.values = check_state("values", group[1], cache).mutable_data_ptr<float>();
  row.layer_stride = rows * of_row;
  row.delayed = check_state("delayed", group[2], {layers, 2, rows, half}).mutable_data_ptr<float>();
  row.part_stride = rows * half;
  if (group.size() == 5) {
    TORCH_CHECK_VALUE(stage.head_dim % 2 == 0, "rotary positions need an even width of heads");
    TORCH_CHECK_VALUE(group[3].dim() == 2 && group[3].size(0) >= first + count,
                      "cos must have a row for each of ", first + count, " positions, got ",
                      group[3].sizes());
    const std::vector<int64_t> angles = {group[3].size(0), stage.head_dim / 2};
    row.cos = check_state("cos", group[3], angles).const_data_ptr<float>();
    row.sin = check_state("sin", group[4], angles).const_data_ptr<float>();
  }
  for (int64_t i = 0; i < rows; ++i) {
    state.rows.push_back(row);
    row.keys += of_row;
    row.values += of_row;
    row.delayed += half;
  }
}

template <class MambaStage>
int64_t tensors_of(const MambaStage&, const std::vector<Tensor>& state, size_t groups) {
  TORCH_CHECK_VALUE(state.size() == 2 * groups, "state must hold 2 tensors, got ", state.size(),
                    " for ", groups, " caches");
  return 2;
}

// A state (layers, rows, ..) of one row has these dimensions.
void bind(Group group, int64_t layers, std::vector<int64_t> ssm, std::vector<int64_t> window,
          cpu::MambaState& state) {
  TORCH_CHECK_VALUE(group[0].dim() > 1, "ssm must have rows, got ", group[0].sizes());
  const int64_t rows = group[0].size(1);
  const auto bind_part = [&](const char* name, const Tensor& part, std::vector<int64_t> shape) {
    shape.insert(shape.begin(), {layers, rows});
    return check_state(name, part, shape).mutable_data_ptr<float>();
  };
  const int64_t of_ssm = c10::multiply_integers(ssm), of_window = c10::multiply_integers(window);
  cpu::MambaRow row{bind_part("ssm", group[0], ssm), bind_part("window", group[1], window),
                    rows * of_ssm, rows * of_window};
  for (int64_t i = 0; i < rows; ++i) {
    state.rows.push_back(row);
    row.ssm += of_ssm;
    row.window += of_window;
  }
}

void bind(const cpu::Mamba1Stage& stage, Group group, int64_t, int64_t, cpu::MambaState& state) {
  bind(group, int64_t(stage.layers.size()), {stage.inner, stage.states},
       {stage.taps - 1, stage.inner}, state);
}

void bind(const cpu::Mamba2Stage& stage, Group group, int64_t, int64_t, cpu::MambaState& state) {
  bind(group, int64_t(stage.layers.size()), {stage.heads, stage.inner / stage.heads, stage.states},
       {stage.taps - 1, stage.inner + 2 * stage.states}, state);
}

// The rows of several caches, from positions of their own, each with room for its count. Returns
// how many rows each has.
template <class AnyStage>
std::vector<int64_t> bind_groups(const AnyStage& stage, const std::vector<Tensor>& tensors,
                                 const std::vector<int64_t>& positions,
                                 const std::vector<int64_t>& counts, int64_t rows,
                                 typename AnyStage::State& state) {
  const int64_t each = tensors_of(stage, tensors, positions.size());
  TORCH_CHECK_VALUE(tensors.size() == each * positions.size(), "state must hold ", each,
                    " tensors for each of ", positions.size(), " caches, got ", tensors.size());
  std::vector<int64_t> sizes;
  for (size_t group = 0; group < positions.size(); ++group) {
    const size_t before = state.rows.size();
    bind(stage, Group(tensors).slice(group * each, each), positions[group], counts[group], state);
    sizes.push_back(int64_t(state.rows.size() - before));
  }
  TORCH_CHECK_VALUE(int64_t(state.rows.size()) == rows,
                    "x must have a row for each of the state's ", state.rows.size(), ", got ",
                    rows);
  return sizes;
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

// What the local stage takes in for each of `count` positions of a patch.
cpu::LocalInput check_input(const Tensor& table, const std::optional<Tensor>& positions,
                            const std::optional<Tensor>& rotation, int64_t vocabulary, int64_t dim,
                            int64_t count) {
  const auto check_count = [&](const char* name, const Tensor& tensor, int64_t dims) {
    TORCH_CHECK_VALUE(tensor.dim() == dims && tensor.size(0) >= count, name,
                      " must have a row for each of ", count, " positions, got ", tensor.sizes());
  };
  cpu::LocalInput input;
  input.dim = dim;
  input.table = check_state("table", table, {vocabulary, dim}).const_data_ptr<float>();
  if (positions) {
    check_count("positions", *positions, 2);
    input.positions =
        check_state("positions", *positions, {positions->size(0), dim}).const_data_ptr<float>();
  }
  if (rotation) {
    check_count("rotation", *rotation, 3);
    input.rotation =
        check_state("rotation", *rotation, {rotation->size(0), dim / 2, 2}).const_data_ptr<float>();
  }
  return input;
}

// Uniform random numbers for the rows of a run: those given, or a generator's as torch's uniform_
// draws them for (rows, vocabulary), whenever all rows come to their next byte.
class UniformNumbers {
 public:
  UniformNumbers(const std::optional<Tensor>& given, const std::optional<at::Generator>& generator,
                 int64_t rows, int64_t most, int64_t vocabulary, const at::TensorOptions& options)
      : generator_(generator), is_given_(given.has_value()), most_(most), vocabulary_(vocabulary) {
    if (is_given_) {
      numbers_ = check_state("uniform", *given, {rows, most, vocabulary});
    } else {
      numbers_ = at::empty({rows, vocabulary}, options);
    }
  }

  const float* of(int64_t row, int64_t n) {
    if (is_given_) return numbers_.const_data_ptr<float>() + (row * most_ + n) * vocabulary_;
    if (n == drawn_) draw();
    return numbers_.const_data_ptr<float>() + row * vocabulary_;
  }

  // An exception must not leave a team's thread.
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void draw() {
    ++drawn_;
    try {
      numbers_.uniform_(0, 1, generator_);
    } catch (...) {
      failure_ = std::current_exception();
      std::fill_n(numbers_.mutable_data_ptr<float>(), numbers_.numel(), 0.5f);
    }
  }

  const std::optional<at::Generator> generator_;
  const bool is_given_;
  const int64_t most_, vocabulary_;
  Tensor numbers_;
  int64_t drawn_ = 0;
  std::exception_ptr failure_;
};

int64_t largest(const std::vector<int64_t>& values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
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

Tensor Stage::step(const Tensor& x, const std::vector<Tensor>& state,
                   const std::vector<int64_t>& positions) const {
  return std::visit(
      [&](const auto& model) {
        Tensor out = check_rows(x, model.dim);
        typename std::decay_t<decltype(model)>::State bound;
        bind_groups(model, state, positions, std::vector<int64_t>(positions.size(), 1), out.size(0),
                    bound);
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

std::tuple<Tensor, Tensor, std::vector<int64_t>, std::vector<int64_t>> Stage::run(
    const Tensor& x, const std::optional<Tensor>& pending, const std::vector<int64_t>& max_tokens,
    const std::vector<int64_t>& max_steps, const std::vector<Tensor>& state,
    const std::vector<int64_t>& cached, const std::vector<int64_t>& first, const Tensor& table,
    const std::optional<Tensor>& positions, const std::optional<Tensor>& rotation,
    const std::optional<Tensor>& context, const PackedLinear& to_logits, double temperature,
    int64_t top_k, double top_p, const std::optional<at::Generator>& generator,
    const std::optional<Tensor>& uniform, const std::optional<Tensor>& ends) const {
  return std::visit(
      [&](const auto& model) {
        const int64_t dim = model.dim;
        Tensor hidden = check_rows(x, dim);
        const int64_t rows = hidden.size(0);
        const size_t groups = cached.size();
        TORCH_CHECK_VALUE(
            max_tokens.size() == groups && max_steps.size() == groups && first.size() == groups,
            "max_tokens, max_steps and first must have a number for each of ", groups, " caches");
        int64_t last = 0;
        for (size_t group = 0; group < groups; ++group) {
          TORCH_CHECK_VALUE(max_tokens[group] > 0, "max_tokens must be positive, got ",
                            max_tokens[group]);
          TORCH_CHECK_VALUE(max_steps[group] >= (pending ? 1 : 0),
                            "max_steps: no room for the next byte");
          TORCH_CHECK_VALUE(first[group] >= 0 && first[group] <= INT64_MAX - max_steps[group],
                            "first must be a position, got ", first[group]);
          last = std::max(last, first[group] + max_steps[group]);
        }
        TORCH_CHECK_VALUE(temperature > 0 && top_k > 0, "temperature and top_k must be positive");

        cpu::Run run;
        Weights list(to_logits);
        run.to_logits = list.matrix(-1, dim);
        const int64_t vocabulary = run.to_logits.outputs;
        run.sampling = {float(temperature), std::min(top_k, vocabulary), float(top_p)};
        run.input = check_input(table, positions, rotation, vocabulary, dim, last);
        if (context) {
          check_type("context", *context, at::kFloat);
          TORCH_CHECK_VALUE(context->dim() == 3 && context->size(0) == rows &&
                                context->size(1) >= last && context->size(2) == dim &&
                                context->stride(2) == 1 && context->stride(1) == dim &&
                                context->device().is_cpu(),
                            "context must be [", rows, ", >= ", last, ", ", dim,
                            "], its positions contiguous, got ", context->sizes());
        }
        Tensor ending;  // kept alive while the run looks at it
        if (ends) {
          check_type("ends", *ends, at::kBool);
          check_shape("ends", *ends, {vocabulary});
          TORCH_CHECK_VALUE(ends->device().is_cpu(), "ends must be on the CPU");
          ending = ends->contiguous();
          run.ends = static_cast<const uint8_t*>(ending.const_data_ptr());
        }
        Tensor next;
        if (pending) {
          check_type("pending", *pending, at::kLong);
          check_shape("pending", *pending, {rows});
          next = pending->contiguous();
          check_ids_range(next, vocabulary);
        }
        run.has_pending = pending.has_value();
        typename std::decay_t<decltype(model)>::State bound;
        const auto sizes = bind_groups(model, state, cached, max_steps, rows, bound);

        const int64_t most = largest(max_tokens);
        Tensor ids = at::zeros({rows, most}, at::kLong);
        UniformNumbers numbers(uniform, generator, rows, most, vocabulary, hidden.options());
        run.uniform = [&](int64_t row, int64_t n) { return numbers.of(row, n); };
        for (size_t group = 0; group < groups; ++group) {
          for (int64_t i = 0; i < sizes[group]; ++i) {
            const int64_t row = int64_t(run.rows.size());
            cpu::RunRow of;
            of.first = first[group];
            of.max_tokens = max_tokens[group];
            of.max_steps = max_steps[group];
            if (context) of.context = context->const_data_ptr<float>() + row * context->stride(0);
            of.x = hidden.mutable_data_ptr<float>() + row * dim;
            of.ids = ids.mutable_data_ptr<int64_t>() + row * most;
            if (pending) of.pending = next.const_data_ptr<int64_t>()[row];
            run.rows.push_back(of);
          }
        }

        const int64_t threads = at::get_num_threads();
        std::vector<float> scratch(model.scratch_size(bound, threads));
        with_team(threads, [&](const cpu::Worker& worker) {
          cpu::run_patch(worker, model, bound, run, scratch.data());
        });
        numbers.rethrow();
        std::vector<int64_t> tokens, steps;
        int64_t row = 0;
        for (const int64_t size : sizes) {
          tokens.push_back(size ? run.rows[row].num_tokens : 0);
          steps.push_back(size ? run.rows[row].num_steps : 0);
          row += size;
        }
        return std::make_tuple(ids.narrow(1, 0, largest(tokens)), hidden, tokens, steps);
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
