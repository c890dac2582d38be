// The stages of a model in compiled code and what lies between them, as Python holds them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/run.h"
#include "stage.h"

namespace mblm {

// Of a run: ids, outputs, contexts, positions, numbers of bytes.
using RunResults = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>,
                              std::vector<int64_t>, std::vector<int64_t>>;

struct Hierarchy : torch::CustomClassHolder {
  std::vector<c10::intrusive_ptr<Stage>> stages;  // the local one last
  std::vector<at::Tensor> weights;                // kept alive
  std::vector<cpu::RunStage> parts;               // of the stages, without models and rows
  cpu::Matrix to_logits;

  // Runs several caches side by side: see cpu/run.h. What is per stage and cache goes through the
  // caches of the first stage, then those of the second, and so on. B rows are those of all caches.
  //
  // state: tensors of each stage and cache, see stage_state.h. cached, positions: per stage and
  // cache, positions in the cache and tokens taken in. outputs, start_outputs: per stage (B, D_n).
  // contexts: per stage (B, P_n, D_n), or empty. tables: per stage fixed positions and rotation, or
  // empty. history: per cache, the last bytes (rows, ..). lengths, max_tokens, room: per cache.
  // pending (B), or none. uniform (B, most tokens, V), or none for the generator's.
  //
  // Returns the sampled ids (B, most tokens), outputs, contexts and positions as given, and per
  // cache how many bytes were sampled.
  RunResults run(const std::vector<at::Tensor>& state, const std::vector<int64_t>& cached,
                 const std::vector<int64_t>& positions, const std::vector<at::Tensor>& outputs,
                 const std::vector<at::Tensor>& start_outputs,
                 const std::vector<at::Tensor>& contexts, const std::vector<at::Tensor>& tables,
                 const std::vector<at::Tensor>& history, const std::vector<int64_t>& lengths,
                 const std::optional<at::Tensor>& pending, const std::vector<int64_t>& max_tokens,
                 const std::vector<int64_t>& room, double temperature, int64_t top_k, double top_p,
                 const std::optional<at::Generator>& generator,
                 const std::optional<at::Tensor>& uniform,
                 const std::optional<at::Tensor>& ends) const;
};

// weights: the local table (V, D_N) and the logits' packed linear layer; then for each stage above,
// its table, the flat norm's weight and bias, the packed projection, the norm's weight and bias,
// the packed context. eps: of both norms, for each stage above.
c10::intrusive_ptr<Hierarchy> hierarchy(const std::vector<c10::intrusive_ptr<Stage>>& stages,
                                        const std::vector<int64_t>& seq_lens,
                                        const std::vector<at::Tensor>& weights,
                                        const std::vector<double>& eps);

}  // namespace mblm
