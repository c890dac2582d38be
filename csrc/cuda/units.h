// Units of decoding on a GPU: rows in slots, of any lengths, side by side and without the host.
//
// A unit is a turn, if one is due for a row, and some bytes. In a turn the stages above the local
// one take in what is complete, for all rows at once. Rows whose patch ends within a unit wait for
// the next. What a unit queues depends on nothing but its shape, so that it can be a graph.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "cuda/decode_slots.h"
#include "cuda/launches.h"
#include "cuda/stage_step.h"

namespace mblm::cuda {

// A stage model and the state of its first slot.
template <class Model, class Row>
struct ModelInSlots {
  const Model* model;
  Row row;
};

using AnyModelInSlots = std::variant<ModelInSlots<cpu::TransformerStage, TransformerRow>,
                                     ModelInSlots<cpu::Mamba1Stage, MambaRow>,
                                     ModelInSlots<cpu::Mamba2Stage, MambaRow>>;

struct UnitStage : StageSlots {
  AnyModelInSlots model;
  cpu::Matrix project, to_context;  // of patches, above the local stage
};

struct Units {
  Slots slots;
  std::vector<UnitStage> stages;  // the local one last
  cpu::Matrix to_logits;

  // Floats of a stage's workspace.
  int64_t workspace_size(const UnitStage& stage) const;

  // Rows grow by so many bytes, or by what is left to them.
  Error queue(bool has_turn, int64_t count, Stream stream) const;
  // Logits of all rows that have a byte.
  Error compute_logits(Stream stream) const;

 private:
  const UnitStage& local() const { return stages.back(); }
  void turn(Launches& launches) const;
  void step(Launches& launches, const UnitStage& stage, const int64_t* positions) const;
  // out = matrix applied to x (slots, inputs).
  Product product(const int64_t* positions, const float* x, const cpu::Matrix& matrix,
                  float* out) const;
};

}  // namespace mblm::cuda
