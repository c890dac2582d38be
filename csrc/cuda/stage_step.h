// One position of every row of a stage model on a GPU: the kernels of its layers, queued.
//
// The stages are those of the CPU, whose pointers lead to the GPU's memory.
#pragma once

#include <cstdint>

#include "cpu/mamba1_stage.h"
#include "cpu/mamba2_stage.h"
#include "cpu/transformer_stage.h"
#include "cuda/stream.h"

namespace mblm::cuda {

struct StageStep {
  int64_t rows = 0;
  bool is_dependent = true;            // of the first kernel: see Product
  const int* halted = nullptr;         // where it is not 0, nothing is written; or null
  const int64_t* positions = nullptr;  // (rows), in the cache; of Transformers alone
  int64_t limit = 0;                   // positions that the cache has room for
  float* x = nullptr;                  // (rows, dim), replaced by the output
  float* workspace = nullptr;          // workspace_size floats
};

int64_t workspace_size(const cpu::TransformerStage& stage, int64_t rows);
int64_t workspace_size(const cpu::Mamba1Stage& stage, int64_t rows);
int64_t workspace_size(const cpu::Mamba2Stage& stage, int64_t rows);

// `state` is that of the first row; the others' lie after it, in each layer.
Error step(const cpu::TransformerStage& stage, const cpu::TransformerRow& state,
           const StageStep& step, Stream stream);
Error step(const cpu::Mamba1Stage& stage, const cpu::MambaRow& state, const StageStep& step,
           Stream stream);
Error step(const cpu::Mamba2Stage& stage, const cpu::MambaRow& state, const StageStep& step,
           Stream stream);

}  // namespace mblm::cuda
