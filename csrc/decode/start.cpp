// One step of each stage, of its start token: see start.h.
#include "decode/start.h"

#include <algorithm>

#include "decode/memory.h"
#include "decode/stage_rows.h"

namespace mblm::decode {

StartMemory add_start_states(Parts& parts) {
  StartMemory memory;
  const auto allocate = [&](int64_t floats) {
    return memory.emplace_back(size_t(floats), 0.f).data();
  };
  cpu::Team team(1);
  const cpu::Worker worker{team, 0};
  for (int64_t n = 0; n < parts.schedule.stages(); ++n) {
    StageParts& stage = parts.stages[n];
    if (stage.is_hosted()) continue;
    const StageLayout layout(parts, n);
    float* const blob = allocate(layout.blob);
    float* const page = allocate(layout.page);
    float* const output = blob + layout.output;
    std::copy_n(stage.start_token, stage.dim, output);

    StageRows rows(stage, layout);
    float *const keys[] = {page}, *const values[] = {page + layout.values};
    rows.add_start(blob, keys, values);
    cpu::cache_lines::Vector<float> scratch(rows.scratch_size(1, 0, 1));
    rows.prefill(worker, output, scratch.data());
    rows.normalize(output, 1, output);

    stage.start = {.output = output, .state = blob, .page = page};
    if (n + 1 < parts.schedule.stages()) {
      float* const context = allocate(stage.to_context.outputs);
      cpu::multiply(worker, stage.to_context, output, 1, context);
      stage.start.context_below = context;
    }
  }
  return memory;
}

}  // namespace mblm::decode
