// What is done with rows in slots: see decode_slots.h. A block takes a row.
#include "cuda/decode_slots.h"
#include "cuda/row_math.cuh"

namespace mblm::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) turn_of_rows(Turn in) {
  release_dependents();
  wait_for_inputs();
  const int64_t stages = in.schedule.stages;
  for (int64_t row = first_item(); row < in.slots; row += item_stride()) {
    const Slot& of = in.rows[row];
    const int64_t taken = of.taken;
    const bool is_due = of.left > 0 && of.pending >= 0 && is_at_turn(in.schedule, taken);
    bool is_below = taken == 0;
    int64_t bytes = taken;  // of the stage's sequence
    for (int64_t n = 0; n < stages; ++n) {
      const int64_t size = in.schedule.patch_sizes[n], patches = quotient(bytes, size);
      const bool takes = is_due && !is_below && n + 1 < stages && patches * size == bytes;
      in.begins[n * in.slots + row] = is_due && is_below ? 0 : -1;
      in.takes[n * in.slots + row] = takes ? patches : -1;
      is_below = is_below || takes;
      bytes -= patches * size;
    }
  }
}

__global__ void __launch_bounds__(kThreads) embed_bytes(PendingBytes in) {
  release_dependents();
  wait_for_inputs();
  for (int64_t row = blockIdx.x; row < in.tokens.slots; row += gridDim.x) embed_byte(in, row);
}

__global__ void __launch_bounds__(kThreads) embed_patches_of_rows(LastPatches in) {
  release_dependents();
  float* const shared = shared_memory<float>();
  wait_for_inputs();
  for (int64_t row = blockIdx.x; row < in.slots; row += gridDim.x) {
    if (in.positions[row] < 0) continue;
    const int64_t first = (in.rows[row].taken - in.patch_size) % in.bytes.size;
    const int64_t* ids = in.bytes.ids + row * in.bytes.size + first;
    const uint32_t width = uint32_t(in.width);
    const auto value = [&](int64_t i) {
      const uint32_t byte = uint32_t(i) / width;
      const int64_t id = ids[byte];
      return is_id(id, in.num_tokens) ? in.table[id * width + i - byte * width] : 0;
    };
    const int64_t count = in.patch_size * in.width;
    const Moments of = moments(count, in.norm.eps, shared, value);
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      in.out[row * count + i] = normalized(in.norm, of, i, value(i));
    }
  }
}

__global__ void __launch_bounds__(kThreads) place_patches_of_rows(PatchTokens in) {
  release_dependents();
  float* const shared = shared_memory<float>();  // (kWarps), then the row (dim)
  float* const values = shared + kWarps;
  wait_for_inputs();
  const Tokens& tokens = in.tokens;
  for (int64_t row = blockIdx.x; row < tokens.slots; row += gridDim.x) {
    const int64_t position = in.positions[row] - 1;  // the start token is none of them
    if (position < 0 || position >= tokens.limit) continue;
    float* const x = tokens.x + row * tokens.dim;
    const Moments of = moments(tokens.dim, in.norm.eps, shared, [&](int64_t i) { return x[i]; });
    for (int64_t i = threadIdx.x; i < tokens.dim; i += kThreads) {
      values[i] = normalized(in.norm, of, i, x[i]);
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < tokens.dim; i += kThreads) {
      x[i] = placed(tokens, row, position, i, [&](int64_t i) { return values[i]; });
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) begin_rows(Beginning in) {
  release_dependents();
  wait_for_inputs();
  for (const Beginning::Part& part : in.parts) {
    const int64_t of_layer = in.slots * part.size;
    for (int64_t i = first_item(); i < part.layers * of_layer; i += item_stride()) {
      const int64_t layer = quotient(i, of_layer), row = quotient(i - layer * of_layer, part.size);
      if (in.begins[row] >= 0)
        part.to[i] = part.from[i - (layer * (in.slots - 1) + row) * part.size];
    }
  }
}

}  // namespace

Error schedule_turn(const Turn& in, Stream stream) {
  return launch(turn_of_rows, divide_up(in.slots, kThreads), kThreads, 0, stream, in);
}

Error embed_pending(const PendingBytes& in, Stream stream) {
  return launch_dependent(embed_bytes, in.tokens.slots, kThreads, 0, stream, in);
}

Error embed_last_patches(const LastPatches& in, Stream stream) {
  return launch_dependent(embed_patches_of_rows, in.slots, kThreads, kWarps * sizeof(float), stream,
                          in);
}

Error place_tokens(const PatchTokens& in, Stream stream) {
  const size_t shared_bytes = size_t(kWarps + in.tokens.dim) * sizeof(float);
  return launch_dependent(place_patches_of_rows, in.tokens.slots, kThreads, shared_bytes, stream,
                          in);
}

Error begin_anew(const Beginning& in, Stream stream) {
  int64_t most = 0;
  for (const Beginning::Part& part : in.parts) {
    const int64_t size = part.layers * in.slots * part.size;
    most = size > most ? size : most;
  }
  return launch_dependent(begin_rows, divide_up(most, kThreads), kThreads, 0, stream, in);
}

}  // namespace mblm::cuda
