// One position of every row of a stage model on a GPU: the kernels of its layers, queued.
//
// The stages are those of the CPU, whose pointers lead to the GPU's memory; the states are not.
#pragma once

#include <cstdint>

#include "cpu/mamba1_stage.h"
#include "cpu/mamba2_stage.h"
#include "cpu/transformer_stage.h"
#include "cuda/decode_product.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// State of the first row; the others' lie after it, in each layer.
struct TransformerRow {
  int64_t capacity = 0;
  float *keys = nullptr, *values = nullptr;  // (heads, capacity, head_dim), of the first layer
  int64_t layer_stride = 0;                  // from there to the next layer's
  float* delayed = nullptr;  // (dim / 2), what the shift before the first attention delays
  int64_t part_stride = 0;   // from there to the next shift's: there are two in a layer
  const float *cos = nullptr, *sin = nullptr;  // (angles, head_dim / 2), or null
  int64_t angles = 0;
  uint32_t* tickets = nullptr;  // see CachedAttention
};

struct MambaRow {
  float* ssm = nullptr;     // of the first layer, Mamba-1 (inner, states), Mamba-2 (.., P, states)
  float* window = nullptr;  // (taps - 1, channels of the convolution)
  int64_t ssm_stride = 0, window_stride = 0;  // from there to the next layer's
};

// The weights that a layer reads first.
template <class Layer>
Ahead beginning_of(const Layer& layer) {
  return Ahead(*layer.matrices()[0], *layer.matrices()[1]);
}

struct StageStep {
  int64_t rows = 0;
  const int64_t* positions = nullptr;  // (rows), in the cache; negative where nothing is written
  int64_t limit = 0;                   // positions that the cache has room for
  float* x = nullptr;                  // (rows, dim), replaced by the output
  float* workspace = nullptr;          // workspace_size floats
  Ahead ahead;                         // of what comes after it
};

int64_t workspace_size(const cpu::TransformerStage& stage, int64_t rows, int64_t limit);
int64_t workspace_size(const cpu::Mamba1Stage& stage, int64_t rows, int64_t limit);
int64_t workspace_size(const cpu::Mamba2Stage& stage, int64_t rows, int64_t limit);

Error step(const cpu::TransformerStage& stage, const TransformerRow& state, const StageStep& step,
           Stream stream);
Error step(const cpu::Mamba1Stage& stage, const MambaRow& state, const StageStep& step,
           Stream stream);
Error step(const cpu::Mamba2Stage& stage, const MambaRow& state, const StageStep& step,
           Stream stream);

}  // namespace mblm::cuda
