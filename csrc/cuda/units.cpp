// Units of decoding on a GPU: see units.h.
#include "cuda/units.h"

#include <algorithm>

#include "cuda/decode_product.h"
#include "cuda/launches.h"

namespace mblm::cuda {

int64_t Units::workspace_size(const UnitStage& stage) const {
  const int64_t flat = stage.patch_size > 1 ? slots * stage.patch_size * local().dim : 0;
  const int64_t of_step = std::visit(
      [&](const auto& of) { return cuda::workspace_size(*of.model, slots, 1 + stage.limit); },
      stage.model);
  return std::max(flat, of_step);
}

Tokens Units::tokens(const UnitStage& stage) const {
  Tokens tokens;
  tokens.slots = slots;
  tokens.dim = stage.dim;
  tokens.limit = stage.limit;
  tokens.fixed = stage.fixed;
  tokens.rotation = stage.rotation;
  tokens.context = stage.context;
  tokens.x = stage.output;
  return tokens;
}

Error Units::step(const UnitStage& stage, const int64_t* positions, Stream stream) const {
  StageStep in;
  in.rows = slots;
  in.positions = positions;
  in.limit = 1 + stage.limit;  // with the start token
  in.x = stage.output;
  in.workspace = stage.workspace;
  in.ahead = Ahead(&stage == &local() ? to_logits : stage.to_context);
  return std::visit([&](const auto& of) { return cuda::step(*of.model, of.row, in, stream); },
                    stage.model);
}

Error Units::queue(bool has_turn, int64_t count, Stream stream) const {
  if (has_turn) {
    if (const Error error = turn(stream)) return error;
  }
  if (const Error error = embed_pending(pending(has_turn), stream)) return error;
  for (int64_t n = 0; n < count; ++n) {
    if (const Error error = take_byte(n + 1 < count, stream)) return error;
  }
  return nullptr;
}

Error Units::turn(Stream stream) const {
  Turn turn;
  turn.slots = slots;
  turn.rows = rows;
  turn.schedule = schedule;
  turn.begins = begins;
  turn.takes = takes;
  if (const Error error = schedule_turn(turn, stream)) return error;
  for (size_t n = 0; n < stages.size(); ++n) {
    if (const Error error = begin(n, stream)) return error;
    if (n + 1 == stages.size()) break;
    if (const Error error = take_patch(n, stream)) return error;
  }
  return nullptr;
}

// A stage begins anew with the context that the stage above has for it.
Error Units::begin(size_t index, Stream stream) const {
  const UnitStage& stage = stages[index];
  Launches launches(stream);
  if (index > 0) {
    const UnitStage& above = stages[index - 1];
    Product context;
    context.rows = slots;
    context.positions = begins + int64_t(index) * slots;
    context.x = above.output;
    context.x_stride = above.dim;
    context.matrix = above.to_context;
    context.out = stage.context;
    launches.add(multiply, context);
  }
  Beginning beginning;
  beginning.slots = slots;
  beginning.begins = begins + int64_t(index) * slots;
  beginning.parts[0] = {stage.start_output, stage.output, 1, stage.dim};
  std::visit([&](const auto& of) { std::copy_n(of.start, 2, beginning.parts + 1); }, stage.model);
  launches.add(begin_anew, beginning);
  return launches.error();
}

Error Units::take_patch(size_t index, Stream stream) const {
  const UnitStage& stage = stages[index];
  const int64_t* const positions = takes + int64_t(index) * slots;
  float* flat = stage.workspace;  // which the layers use later
  Launches launches(stream);
  LastPatches patches;
  patches.slots = slots;
  patches.patch_size = stage.patch_size;
  patches.width = local().dim;
  patches.num_tokens = num_tokens;
  patches.positions = positions;
  patches.rows = rows;
  patches.bytes = last_bytes;
  patches.table = stage.table;
  patches.norm = stage.flat_norm;
  patches.out = flat;
  launches.add(embed_last_patches, patches);
  Product project;
  project.rows = slots;
  project.positions = positions;
  project.x = flat;
  project.x_stride = stage.patch_size * local().dim;
  project.matrix = stage.project;
  project.out = stage.output;
  launches.add(multiply, project);
  PatchTokens placing;
  placing.tokens = tokens(stage);
  placing.positions = positions;
  placing.norm = stage.norm;
  launches.add(place_tokens, placing);
  if (launches.error()) return launches.error();
  return step(stage, positions, stream);
}

PendingBytes Units::pending(bool is_after_turn) const {
  PendingBytes pending;
  pending.tokens = tokens(local());
  pending.rows = rows;
  pending.schedule = schedule;
  pending.is_after_turn = is_after_turn;
  pending.bytes = last_bytes;
  pending.table = local().table;
  pending.num_tokens = num_tokens;
  pending.positions = positions;
  return pending;
}

Error Units::take_byte(bool has_next, Stream stream) const {
  if (const Error error = step(local(), positions, stream)) return error;
  if (const Error error = compute_logits(stream)) return error;
  Choice in = choice;
  in.slots = slots;
  in.num_tokens = num_tokens;
  in.bytes = bytes;
  in.rows = rows;
  in.positions = positions;
  in.logits = logits;
  in.has_next = has_next;
  in.next = pending(false);
  return choose(in, stream);
}

Error Units::compute_logits(Stream stream) const {
  Product product;
  product.rows = slots;
  product.x = local().output;
  product.x_stride = local().dim;
  product.matrix = to_logits;
  product.out = logits;
  product.ahead = std::visit(  // the next byte's
      [](const auto& of) {
        return of.model->layers.empty() ? Ahead() : beginning_of(of.model->layers[0]);
      },
      local().model);
  return multiply(product, stream);
}

}  // namespace mblm::cuda
