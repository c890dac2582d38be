// A stage's input laid out with positions and context on a GPU: the mathematics and the inputs are
// those of cpu/assemble_stage.h.
#pragma once

#include "cpu/assemble_stage.h"
#include "cuda/groups.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// out is (rows, 1 + P, D), contiguous. An id outside [0, num_embeddings) gives NaNs: to refuse it,
// someone would have to wait for the GPU.
template <class T>
Error assemble_stage(const cpu::AssembleStageInput<T>& in, int64_t rows, int64_t num_embeddings,
                     T* out, Stream stream);

// grad_embeddings is (rows, P, D), contiguous.
template <class T>
Error assemble_stage_unrotate(const cpu::AssembleStageGrad<T>& in, int64_t rows, T* grad_embeddings,
                              Stream stream);

// The gradient of a table (V, D), contiguous. groups are of the ids (rows, P); sums is scratch,
// (groups.max_pieces(), D).
template <class T>
Error assemble_stage_table(const cpu::AssembleStageGrad<T>& in, const Groups& groups,
                           int64_t padding_idx, cpu::compute_t<T>* sums, T* grad_table,
                           Stream stream);

}  // namespace mblm::cuda
