// Units of decoding on a GPU: see units.h.
#include "cuda/units.h"

#include <algorithm>

#include "cuda/decode_product.h"

namespace mblm::cuda {

int64_t Units::workspace_size(const UnitStage& stage) const {
  const int64_t flat = stage.patch_size > 1 ? slots.count * stage.patch_size * slots.width : 0;
  const int64_t of_step = std::visit(
      [&](const auto& of) { return cuda::workspace_size(*of.model, slots.count, 1 + stage.limit); },
      stage.model);
  return std::max(flat, of_step);
}

Product Units::product(const int64_t* positions, const float* x, const cpu::Matrix& matrix,
                       float* out) const {
  Product product;
  product.rows = slots.count;
  product.positions = positions;
  product.x = x;
  product.x_stride = matrix.inputs;
  product.matrix = matrix;
  product.out = out;
  return product;
}

void Units::step(Launches& launches, const UnitStage& stage, const int64_t* positions) const {
  StageStep in;
  in.rows = slots.count;
  in.positions = positions;
  in.limit = 1 + stage.limit;  // with the start token
  in.x = stage.output;
  in.workspace = stage.workspace;
  in.ahead = Ahead(&stage == &local() ? to_logits : stage.to_context);
  launches.add([&](Stream stream) {
    return std::visit([&](const auto& of) { return cuda::step(*of.model, of.row, in, stream); },
                      stage.model);
  });
}

Error Units::queue(bool has_turn, int64_t count, Stream stream) const {
  Launches launches(stream);
  if (has_turn) turn(launches);
  launches.add(embed_pending, slots, local(), has_turn);
  for (int64_t n = 0; n < count; ++n) {
    step(launches, local(), slots.positions);
    launches.add([&](Stream stream) { return compute_logits(stream); });
    launches.add(choose, slots, local(), n + 1 < count);
  }
  return launches.error();
}

// Stages take in their patches, and the one below begins anew with the context that it then has.
void Units::turn(Launches& launches) const {
  launches.add(schedule_turn, slots);
  for (const UnitStage& stage : stages) {
    const int64_t at = stage.index * slots.count;
    const int64_t* const takes = slots.takes + at;
    if (stage.index > 0) {
      const UnitStage& above = stages[size_t(stage.index) - 1];
      launches.add(multiply,
                   product(slots.begins + at, above.output, above.to_context, stage.context));
    }
    launches.add(begin_anew, slots, stage);
    if (&stage == &local()) break;
    launches.add(embed_last_patches, slots, stage);  // into the workspace, which layers use later
    launches.add(multiply, product(takes, stage.workspace, stage.project, stage.output));
    launches.add(place_tokens, slots, stage);
    step(launches, stage, takes);
  }
}

Error Units::compute_logits(Stream stream) const {
  Product logits = product(nullptr, local().output, to_logits, slots.logits);
  logits.ahead = std::visit(  // the next byte's
      [](const auto& of) {
        return of.model->layers.empty() ? Ahead() : beginning_of(of.model->layers[0]);
      },
      local().model);
  return multiply(logits, stream);
}

}  // namespace mblm::cuda
