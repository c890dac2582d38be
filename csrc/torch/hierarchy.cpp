// Glue of runs: checks, binding, random numbers.
#include "hierarchy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/uniform.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <memory>
#include <type_traits>

#include "common.h"
#include "decoding_team.h"
#include "stage_state.h"

namespace mblm {
namespace {

using at::Tensor;

int64_t dim_of(const Stage& stage) {
  return std::visit([](const auto& model) { return model.dim; }, stage.stage);
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

int64_t largest(at::IntArrayRef values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

void check_count(const char* name, size_t got, size_t expected) {
  TORCH_CHECK_VALUE(got == expected, name, " must have ", expected, " items, got ", got);
}

// A contiguous copy that the run may write to.
Tensor copy_of(const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  check_shape(name, tensor, shape);
  check_type(name, tensor, at::kFloat);
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU");
  Tensor copy = at::empty(shape, tensor.options());
  return copy.copy_(tensor);
}

bool is_given(const Tensor& tensor) {
  return tensor.numel() > 0;
}

// Fixed positions or rotations, with a row for each of `count` positions.
cpu::Positions bind_positions(const Tensor& fixed, const Tensor& rotation, int64_t dim,
                              int64_t count) {
  cpu::Positions positions;
  if (is_given(fixed)) {
    TORCH_CHECK_VALUE(fixed.size(0) >= count, "positions must have a row for each of ", count,
                      ", got ", fixed.sizes());
    positions.fixed = check_state("positions", fixed, {fixed.size(0), dim}).const_data_ptr<float>();
  }
  if (is_given(rotation)) {
    TORCH_CHECK_VALUE(rotation.size(0) >= count, "rotation must have a row for each of ", count,
                      " positions, got ", rotation.sizes());
    TORCH_CHECK_VALUE(dim % 2 == 0, "rotation needs an even width, got ", dim);
    positions.rotation =
        check_state("rotation", rotation, {rotation.size(0), dim / 2, 2}).const_data_ptr<float>();
  }
  return positions;
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
    TORCH_CHECK_VALUE(!weights.empty() && stage->weights.front().device() == weights[0].device(),
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

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<int64_t>,
           std::vector<int64_t>>
Hierarchy::run(const std::vector<Tensor>& state, const std::vector<int64_t>& cached,
               const std::vector<int64_t>& positions, const std::vector<Tensor>& outputs,
               const std::vector<Tensor>& start_outputs, const std::vector<Tensor>& contexts,
               const std::vector<Tensor>& tables, const std::vector<Tensor>& history,
               const std::vector<int64_t>& lengths, const std::optional<Tensor>& pending,
               const std::vector<int64_t>& max_tokens, const std::vector<int64_t>& room,
               double temperature, int64_t top_k, double top_p,
               const std::optional<at::Generator>& generator, const std::optional<Tensor>& uniform,
               const std::optional<Tensor>& ends) const {
  TORCH_CHECK_VALUE(weights.front().device().is_cpu(), "weights must be on the CPU");
  const size_t caches = lengths.size(), count = stages.size();
  TORCH_CHECK_VALUE(caches > 0, "lengths must not be empty");
  check_count("max_tokens", max_tokens.size(), caches);
  check_count("room", room.size(), caches);
  check_count("history", history.size(), caches);
  check_count("cached", cached.size(), count * caches);
  check_count("positions", positions.size(), count * caches);
  check_count("outputs", outputs.size(), count);
  check_count("start_outputs", start_outputs.size(), count);
  check_count("contexts", contexts.size(), count);
  check_count("tables", tables.size(), 2 * count);
  TORCH_CHECK_VALUE(temperature > 0 && top_k > 0, "temperature and top_k must be positive");
  const bool has_stages_above = count > 1;
  constexpr int64_t kMost = int64_t(1) << 40;  // so that sums do not overflow
  const auto check_range = [&](const char* name, int64_t value, int64_t least) {
    TORCH_CHECK_VALUE(value >= least && value <= kMost, name, " must be at least ", least, ", got ",
                      value);
  };
  for (size_t cache = 0; cache < caches; ++cache) {
    check_range("max_tokens", max_tokens[cache], 1);
    check_range("room", room[cache], pending && !has_stages_above ? 1 : 0);
    check_range("lengths", lengths[cache], pending ? 0 : 1);
  }

  cpu::Run run;
  run.stages = parts;
  run.to_logits = to_logits;
  const int64_t vocabulary = to_logits.outputs;
  // Too small a number for a float keeps the likeliest, as 0 would not.
  const float least = std::numeric_limits<float>::min();
  run.sampling = {float(temperature), std::min(top_k, vocabulary),
                  top_p > 0 ? std::max(float(top_p), least) : 0.f};
  run.has_pending = pending.has_value();
  TORCH_CHECK_VALUE(outputs[0].dim() == 2, "outputs[0] must have shape [B, D], got ",
                    outputs[0].sizes());
  const int64_t rows = outputs[0].size(0);

  std::vector<std::unique_ptr<cpu::BoundStage>> models;
  std::vector<Tensor> new_outputs, new_contexts, kept;
  std::vector<int64_t> sizes;
  size_t next_tensor = 0;
  for (size_t n = 0; n < count; ++n) {
    cpu::RunStage& stage = run.stages[n];
    // How many positions each cache may come to take in.
    std::vector<int64_t> more(caches);
    int64_t last = 0;
    for (size_t cache = 0; cache < caches; ++cache) {
      const int64_t position = positions[n * caches + cache];
      check_range("positions", position, 0);
      int64_t limit = stage.seq_len;
      if (!has_stages_above) {
        limit = position + room[cache];
      } else if (n == 0) {
        limit = std::max(position, (lengths[cache] + max_tokens[cache]) / stage.patch_size);
      } else {
        TORCH_CHECK_VALUE(position <= stage.seq_len, "positions must be at most ", stage.seq_len,
                          ", got ", position);
      }
      if (has_stages_above && n + 1 == count) {
        TORCH_CHECK_VALUE(room[cache] <= stage.seq_len - position || room[cache] == 0,
                          "room must be what the patch has left");
      }
      more[cache] = limit - position;
      last = std::max(last, limit);
    }
    stage.positions = bind_positions(tables[2 * n], tables[2 * n + 1], stage.dim, last);

    std::visit(
        [&](const auto& model) {
          using Model = std::decay_t<decltype(model)>;
          typename Model::State bound;
          // Where a stage may start anew, its state has one part more of what changes.
          constexpr bool kIsTransformer = std::is_same_v<Model, cpu::TransformerStage>;
          const bool may_restart = has_stages_above && n > 0;
          const size_t begin = next_tensor;
          size_t each = 0;
          TORCH_CHECK_VALUE(begin < state.size(), "state must hold more than ", state.size(),
                            " tensors");
          if constexpr (kIsTransformer) {
            const bool has_rotary = begin + 3 < state.size() && state[begin + 3].dim() == 2;
            each = 3 + (has_rotary ? 2 : 0) + (may_restart ? 1 : 0);
          } else {
            each = may_restart ? 4 : 2;
          }
          next_tensor += each * caches;
          TORCH_CHECK_VALUE(next_tensor <= state.size(), "state must hold more than ", state.size(),
                            " tensors");
          const std::vector<int64_t> firsts(cached.begin() + n * caches,
                                            cached.begin() + (n + 1) * caches);
          std::vector<int64_t> counts = more;
          if (may_restart) {
            for (size_t cache = 0; cache < caches; ++cache) {
              // From the position after the start token, a whole sequence.
              counts[cache] = std::max(more[cache], 1 + stage.seq_len - firsts[cache]);
            }
          }
          sizes = bind_groups(model, Group(state).slice(begin, each * caches), firsts, counts, rows,
                              bound);
          models.push_back(std::make_unique<cpu::BoundStageOf<Model>>(model, std::move(bound)));
        },
        stages[n]->stage);
    stage.model = models.back().get();

    new_outputs.push_back(copy_of("outputs", outputs[n], {rows, stage.dim}));
    kept.push_back(copy_of("start_outputs", start_outputs[n], {rows, stage.dim}));
    Tensor context;
    if (is_given(contexts[n])) {
      TORCH_CHECK_VALUE(contexts[n].dim() == 3 && contexts[n].size(1) >= last,
                        "contexts must have a row for each of ", last, " positions, got ",
                        contexts[n].sizes());
      context = copy_of("contexts", contexts[n], {rows, contexts[n].size(1), stage.dim});
    } else if (has_stages_above && n > 0) {
      context = at::zeros({rows, stage.seq_len, stage.dim}, new_outputs.back().options());
    }
    if (has_stages_above && n > 0)
      check_shape("contexts", context, {rows, stage.seq_len, stage.dim});
    new_contexts.push_back(context.defined() ? context : contexts[n]);
    int64_t row = 0;
    for (size_t cache = 0; cache < caches; ++cache) {
      for (int64_t i = 0; i < sizes[cache]; ++i, ++row) {
        cpu::StageRow of;
        of.position = positions[n * caches + cache];
        of.output = new_outputs.back().mutable_data_ptr<float>() + row * stage.dim;
        of.start_output = kept.back().const_data_ptr<float>() + row * stage.dim;
        if (context.defined()) {
          of.context = context.mutable_data_ptr<float>() + row * context.stride(0);
        }
        stage.rows.push_back(of);
      }
    }
  }
  TORCH_CHECK_VALUE(next_tensor == state.size(), "state must hold ", next_tensor, " tensors, got ",
                    state.size());

  Tensor ending, next;  // kept alive while the run looks at them
  if (ends) {
    check_type("ends", *ends, at::kBool);
    check_shape("ends", *ends, {vocabulary});
    TORCH_CHECK_VALUE(ends->device().is_cpu(), "ends must be on the CPU");
    ending = ends->contiguous();
    run.ends = static_cast<const uint8_t*>(ending.const_data_ptr());
  }
  if (pending) {
    check_type("pending", *pending, at::kLong);
    check_shape("pending", *pending, {rows});
    TORCH_CHECK_VALUE(pending->device().is_cpu(), "pending must be on the CPU");
    next = pending->contiguous();
    check_ids_range(next, vocabulary);
  }
  const int64_t most = largest(max_tokens);
  Tensor ids = at::zeros({rows, most}, at::kLong);
  UniformNumbers numbers(uniform, generator, rows, most, vocabulary, new_outputs[0].options());
  run.uniform = [&](int64_t row, int64_t n) { return numbers.of(row, n); };
  for (size_t cache = 0; cache < caches; ++cache) {
    const Tensor& bytes = history[cache];
    check_ids_type(bytes);
    TORCH_CHECK_VALUE(bytes.size(0) == sizes[cache] && bytes.size(1) <= lengths[cache],
                      "history must be of [", sizes[cache], ", <= ", lengths[cache], "], got ",
                      bytes.sizes());
    // What the largest patch before the next byte needs.
    TORCH_CHECK_VALUE(!has_stages_above ||
                          bytes.size(1) >= std::min(lengths[cache],
                                                    (lengths[cache] - 1) % parts[0].patch_size + 1),
                      "history must go back to the beginning of a patch of the first stage");
    const Tensor contiguous = bytes.contiguous();
    check_ids_range(contiguous, vocabulary);
    for (int64_t i = 0; i < sizes[cache]; ++i) {
      cpu::RunRow row;
      row.max_tokens = max_tokens[cache];
      row.room = room[cache];
      row.length = lengths[cache];
      const int64_t* from = contiguous.const_data_ptr<int64_t>() + i * bytes.size(1);
      row.history.assign(from, from + bytes.size(1));
      const int64_t index = int64_t(run.rows.size());
      row.ids = ids.mutable_data_ptr<int64_t>() + index * most;
      if (pending) row.pending = next.const_data_ptr<int64_t>()[index];
      run.rows.push_back(std::move(row));
    }
  }

  const int64_t threads = at::get_num_threads();
  std::vector<float> scratch(run.scratch_size(threads));
  with_team(threads, [&](const cpu::Worker& worker) { run.work(worker, scratch.data()); });
  numbers.rethrow();

  std::vector<int64_t> new_positions, num_tokens;
  for (const cpu::RunStage& stage : run.stages) {
    for (int64_t row = 0, cache = 0; cache < int64_t(caches); row += sizes[cache++]) {
      new_positions.push_back(stage.rows.at(row).position);
    }
  }
  for (int64_t row = 0, cache = 0; cache < int64_t(caches); row += sizes[cache++]) {
    num_tokens.push_back(run.rows.at(row).num_tokens);
  }
  return {ids.narrow(1, 0, largest(num_tokens)), new_outputs, new_contexts, new_positions,
          num_tokens};
}

}  // namespace mblm
