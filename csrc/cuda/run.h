// A run on a GPU: the kernels that sample bytes one after another, without the host.
//
// Rows are sequences of one length. All state is on the GPU, positions and lengths included, so
// that what a unit queues is the same whenever it is queued: a graph of it serves every patch. The
// order of the units is the caller's: see mblm/inference/device_run.py.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "cpu/run.h"
#include "cuda/decode_rows.h"
#include "cuda/stage_step.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// A stage model and the state of its first row.
template <class Model, class Row>
struct ModelOnDevice {
  const Model* model;
  Row row;
};
using AnyModel = std::variant<ModelOnDevice<cpu::TransformerStage, TransformerRow>,
                              ModelOnDevice<cpu::Mamba1Stage, MambaRow>,
                              ModelOnDevice<cpu::Mamba2Stage, MambaRow>>;

struct DeviceStage {
  cpu::RunStage part;  // without model and rows
  AnyModel model;
  int64_t limit = 0;                    // tokens that the sequence has room for
  int64_t* positions = nullptr;         // (rows), tokens taken in
  float* output = nullptr;              // (rows, dim), of the last position
  const float* start_output = nullptr;  // (rows, dim), of the start token
  float* context = nullptr;             // (rows, seq_len, dim), or null
  float* workspace = nullptr;           // workspace_size floats
};

class Run {
 public:
  int64_t rows = 0, num_tokens = 0;
  std::vector<DeviceStage> stages;  // the local one last
  cpu::Matrix to_logits;
  Halted halted;
  History history;
  const float* settings = nullptr;  // (3), see SampleRows
  const bool* ends = nullptr;       // (num_tokens)
  const float* uniform = nullptr;   // (slots, rows, num_tokens)
  int64_t* pending = nullptr;       // (rows), the bytes to take in next
  int64_t* ids = nullptr;           // (slots, rows), out
  float* logits = nullptr;          // (rows, num_tokens)
  float* ordered = nullptr;         // (rows, 2, num_tokens)

  // Floats of a stage's workspace.
  static int64_t workspace_size(const cpu::RunStage& part, const AnyModel& model, int64_t rows,
                                int64_t width);

  // Embeds the pending byte. What the stages above do beside it may begin after it.
  Error embed_byte(Stream stream) const;
  // The local stage takes it in; the next is sampled.
  Error step_and_sample(int64_t slot, Stream stream) const;
  Error sample(int64_t slot, Stream stream) const;
  // A stage above the local one takes in its last patch.
  Error take_patch(size_t stage, Stream stream) const;
  // A stage starts anew with the context that the stage above has for it.
  Error begin_anew(size_t stage, Stream stream) const;

 private:
  const DeviceStage& local() const { return stages.back(); }
  Error step(const DeviceStage& stage, Stream stream) const;
  Place place(const DeviceStage& stage) const;
};

}  // namespace mblm::cuda
