// A model's weights as a run reads them: raw pointers into what decode/torch/weights.h keeps alive.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "cpu/mamba1_stage.h"
#include "cpu/mamba2_stage.h"
#include "cpu/matrix.h"
#include "cpu/transformer_stage.h"
#include "decode/schedule.h"

namespace mblm::decode {

struct LayerNorm {
  const float* weight = nullptr;  // (n)
  const float* bias = nullptr;    // (n)
  float eps = 0;
};

// A stage that Python steps has no model here.
struct Hosted {};
using StageModel = std::variant<Hosted, cpu::TransformerStage, cpu::Mamba1Stage, cpu::Mamba2Stage>;

// A stage's state after its start token, the same for every sequence.
struct StartState {
  const float* output = nullptr;  // (dim)
  const float* state = nullptr;   // what a blob begins with, and a page of keys and values, as
  const float* page = nullptr;    // decode/memory.h lays them out; none of a stage that is hosted
  // Of the stage below, which this stage's start output gives: (seq_len, dim) of that stage.
  const float* context_below = nullptr;
};

// A stage, and what lies between it and the next.
struct StageParts {
  int64_t dim = 0;
  const float* start_token = nullptr;  // (dim)
  StageModel model;
  StartState start;
  const float* table = nullptr;     // (num_tokens, width of the local stage)
  const float* fixed = nullptr;     // (seq_len, dim), positions that are added, or null
  const float* rotation = nullptr;  // (positions, dim / 2, 2), cosines and sines, or null
  // Of the stages above the local one alone:
  LayerNorm flat_norm;  // (patch_size * width)
  cpu::Matrix project;
  LayerNorm norm;
  cpu::Matrix to_context;

  bool is_hosted() const { return std::holds_alternative<Hosted>(model); }
};

// Of rows with at most so many bytes: tables of rotations, also attention's, are made for those.
// What a call has been given stays as it is.
struct Parts {
  int64_t most_bytes = 0;
  int64_t start_id = 0;  // other weights, whose start tokens give other states, have another
  Schedule schedule;
  std::vector<StageParts> stages;  // the local one last, which is never hosted
  cpu::Matrix to_logits;
  const float* empty_logits = nullptr;  // (num_tokens), of a row without bytes
  int64_t max_length = 0;               // bytes that a row may have; 0 for no limit

  int64_t num_tokens() const { return to_logits.outputs; }
  const StageParts& local() const { return stages.back(); }
};

}  // namespace mblm::decode
