// The units of a run on a GPU: see run.h.
#include "cuda/run.h"

#include <algorithm>

#include "cuda/decode_product.h"
#include "cuda/decode_sample.h"
#include "cuda/launches.h"

namespace mblm::cuda {
namespace {

LayerNormOf norm_of(const cpu::LayerNorm& norm) {
  return {norm.weight, norm.bias, norm.eps};
}

// What changes of a stage's state, all rows and layers.
void add_parts(const ModelOnDevice<cpu::TransformerStage, TransformerRow>& of, Restart& restart) {
  const auto& row = of.row;
  const int64_t parts = 2 * int64_t(of.model->layers.size());
  restart.parts[1] = {row.start_delayed, row.delayed, parts * row.part_stride};
}

template <class Model>
void add_parts(const ModelOnDevice<Model, MambaRow>& of, Restart& restart) {
  const MambaRow& row = of.row;
  const int64_t layers = int64_t(of.model->layers.size());
  restart.parts[1] = {row.start_ssm, row.ssm, layers * row.ssm_stride};
  restart.parts[2] = {row.start_window, row.window, layers * row.window_stride};
}

}  // namespace

int64_t Run::workspace_size(const cpu::RunStage& part, const AnyModel& model, int64_t rows,
                            int64_t width) {
  const int64_t flat = part.patch_size > 1 ? rows * part.patch_size * width : 0;
  const int64_t of_step =
      std::visit([&](const auto& of) { return cuda::workspace_size(*of.model, rows); }, model);
  return std::max(flat, of_step);
}

Place Run::place(const DeviceStage& stage) const {
  Place place;
  place.rows = rows;
  place.dim = stage.part.dim;
  place.limit = stage.limit;
  place.positions = stage.positions;
  place.fixed = stage.part.positions.fixed;
  place.rotation = stage.part.positions.rotation;
  place.context = stage.context;
  place.x = stage.output;
  return place;
}

Error Run::step(const DeviceStage& stage, Stream stream) const {
  StageStep in;
  in.rows = rows;
  in.halted = halted.latched;
  in.positions = stage.positions;
  in.limit = 1 + stage.limit;  // with the start token
  in.x = stage.output;
  in.workspace = stage.workspace;
  return std::visit([&](const auto& of) { return cuda::step(*of.model, of.row, in, stream); },
                    stage.model);
}

Error Run::embed_byte(Stream stream) const {
  ByteEmbedding embedding;
  embedding.halted = halted;
  embedding.place = place(local());
  embedding.history = history;
  embedding.pending = pending;
  embedding.table = local().part.table;
  embedding.num_tokens = num_tokens;
  return cuda::embed_byte(embedding, stream);
}

Error Run::step_and_sample(int64_t slot, Stream stream) const {
  if (const Error error = step(local(), stream)) return error;
  return sample(slot, stream);
}

Error Run::sample(int64_t slot, Stream stream) const {
  Launches launches(stream);
  Product product;
  product.rows = rows;
  product.x = local().output;
  product.x_stride = local().part.dim;
  product.matrix = to_logits;
  product.out = logits;
  launches.add(multiply, product);
  SampleRows in;
  in.rows = rows;
  in.num_tokens = num_tokens;
  in.halted = halted;
  in.settings = settings;
  in.logits = logits;
  in.uniform = uniform + slot * rows * num_tokens;
  in.ends = ends;
  in.ordered = ordered;
  in.pending = pending;
  in.ids = ids + slot * rows;
  launches.add(cuda::sample, in);
  return launches.error();
}

Error Run::take_patch(size_t index, Stream stream) const {
  const DeviceStage& stage = stages[index];
  const int64_t width = local().part.dim, flat_size = stage.part.patch_size * width;
  float* flat = stage.workspace;  // which the layers use later
  Launches launches(stream);
  PatchGathering gathering;
  gathering.rows = rows;
  gathering.patch_size = stage.part.patch_size;
  gathering.width = width;
  gathering.num_tokens = num_tokens;
  gathering.history = history;
  gathering.table = stage.part.table;
  gathering.norm = norm_of(stage.part.flat_norm);
  gathering.out = flat;
  launches.add(gather_patches, gathering);
  Product project;
  project.rows = rows;
  project.halted = halted.latched;
  project.x = flat;
  project.x_stride = flat_size;
  project.matrix = stage.part.project;
  project.out = stage.output;
  launches.add(multiply, project);
  PatchPlacing placing;
  placing.halted = halted.latched;
  placing.place = place(stage);
  placing.norm = norm_of(stage.part.norm);
  launches.add(place_patches, placing);
  if (launches.error()) return launches.error();
  return step(stage, stream);
}

Error Run::begin_anew(size_t index, Stream stream) const {
  const DeviceStage &stage = stages[index], &above = stages[index - 1];
  // The local stage starts after a sampling, the others beside it.
  const int* ended = index + 1 == stages.size() ? halted.now : halted.latched;
  Launches launches(stream);
  Product context;
  context.rows = rows;
  context.halted = ended;
  context.is_dependent = false;  // work of two streams may come together here
  context.x = above.output;
  context.x_stride = above.part.dim;
  context.matrix = above.part.to_context;
  context.out = stage.context;
  launches.add(multiply, context);
  Restart anew;
  anew.halted = ended;
  anew.parts[0] = {stage.start_output, stage.output, rows * stage.part.dim};
  std::visit([&](const auto& of) { add_parts(of, anew); }, stage.model);
  anew.rows = rows;
  anew.positions = stage.positions;
  launches.add(restart, anew);
  return launches.error();
}

}  // namespace mblm::cuda
