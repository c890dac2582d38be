// Units of decoding on a GPU: rows in slots, of any lengths, side by side and without the host.
//
// A unit is a turn, if one is due for a row, and some bytes. In a turn the stages above the local
// one take in what is complete, for all rows at once. Rows whose patch ends within a unit wait for
// the next. What a unit queues depends on nothing but its shape, so that it can be a graph.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "cuda/decode_choose.h"
#include "cuda/decode_slots.h"
#include "cuda/stage_step.h"

namespace mblm::cuda {

// A stage model, the state of its first slot, and what of that there is after the start token.
template <class Model, class Row>
struct StageInSlots {
  const Model* model;
  Row row;
  Beginning::Part start[2];
};
using AnyStageInSlots = std::variant<StageInSlots<cpu::TransformerStage, TransformerRow>,
                                     StageInSlots<cpu::Mamba1Stage, MambaRow>,
                                     StageInSlots<cpu::Mamba2Stage, MambaRow>>;

struct UnitStage {
  AnyStageInSlots model;
  int64_t dim = 0, patch_size = 1;
  int64_t limit = 0;                                  // tokens that the sequence has room for
  const float* table = nullptr;                       // (num_tokens, width of the local stage)
  const float *fixed = nullptr, *rotation = nullptr;  // see Tokens
  const float* start_output = nullptr;                // (dim)
  float *output = nullptr, *context = nullptr;        // (slots, dim), (slots, limit, dim) or null
  float* workspace = nullptr;                         // workspace_size floats
  // Of the stages above the local one alone:
  LayerNormOf flat_norm, norm;
  cpu::Matrix project, to_context;
};

struct Units {
  int64_t slots = 0, num_tokens = 0;
  int64_t bytes = 0;              // of a unit, at most
  std::vector<UnitStage> stages;  // the local one last
  cpu::Matrix to_logits;
  Schedule schedule;
  Slot* rows = nullptr;  // (slots)
  Bytes last_bytes;
  Choice choice;                                // without what is told here
  int64_t *begins = nullptr, *takes = nullptr;  // (stages, slots)
  int64_t* positions = nullptr;                 // (slots), of the local stage
  float* logits = nullptr;                      // (slots, num_tokens)

  // Floats of a stage's workspace.
  int64_t workspace_size(const UnitStage& stage) const;

  // Rows grow by so many bytes, or by what is left to them.
  Error queue(bool has_turn, int64_t count, Stream stream) const;
  // Logits of all rows that have a byte.
  Error compute_logits(Stream stream) const;

 private:
  const UnitStage& local() const { return stages.back(); }
  Error turn(Stream stream) const;
  Error begin(size_t stage, Stream stream) const;
  Error take_patch(size_t stage, Stream stream) const;
  // The byte that is embedded; then embeds the next one.
  Error take_byte(bool has_next, Stream stream) const;
  Error step(const UnitStage& stage, const int64_t* positions, Stream stream) const;
  Tokens tokens(const UnitStage& stage) const;
  PendingBytes pending(bool is_after_turn) const;
};

}  // namespace mblm::cuda
