// What is done with rows in slots: see decode_slots.h. A block takes a row.
#include <atomic>

#include "cuda/decode_slots.h"
#include "cuda/row_math.cuh"

namespace mblm::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) turn_of_rows(Slots in) {
  release_dependents();
  wait_for_inputs();
  const int64_t stages = in.schedule.stages;
  for (int64_t row = first_item(); row < in.count; row += item_stride()) {
    const Slot& of = in.rows[row];
    const int64_t taken = of.taken;
    const bool is_due = of.left > 0 && of.pending >= 0 && is_at_turn(in.schedule, taken);
    bool is_below = taken == 0;
    int64_t bytes = taken;  // of the stage's sequence
    for (int64_t n = 0; n < stages; ++n) {
      const int64_t size = in.schedule.patch_sizes[n], patches = quotient(bytes, size);
      const bool takes = is_due && !is_below && n + 1 < stages && patches * size == bytes;
      in.begins[n * in.count + row] = is_due && is_below ? 0 : -1;
      in.takes[n * in.count + row] = takes ? patches : -1;
      is_below = is_below || takes;
      bytes -= patches * size;
    }
  }
}

// By one thread. Whoever feeds a row has told the byte after them, too.
MBLM_DEVICE void skip_bytes(const Slots& in, int64_t row) {
  Slot& of = in.rows[row];
  const int64_t* const ids = in.ids + row * in.bytes;
  for (int64_t k = 0; k < of.skipped; ++k) {
    const int64_t at = remainder(of.taken + k, in.last_size);
    in.last_bytes[row * in.last_size + at] = k > 0 ? ids[k - 1] : of.pending;
  }
  of.taken += of.skipped;
  of.pending = ids[of.skipped - 1];
  of.left = 0;
  of.done = of.skipped;
  in.positions[row] = -1;
}

__global__ void __launch_bounds__(kThreads)
    embed_bytes(Slots in, StageSlots local, bool is_after_turn) {
  release_dependents();
  wait_for_inputs();
  for (int64_t row = blockIdx.x; row < in.count; row += gridDim.x) {
    if (in.rows[row].skipped == 0) {
      embed_byte(in, local, is_after_turn, row);
    } else if (threadIdx.x == 0) {
      skip_bytes(in, row);
    }
  }
}

__global__ void __launch_bounds__(kThreads) embed_patches_of_rows(Slots in, StageSlots stage) {
  release_dependents();
  float* const shared = shared_memory<float>();
  wait_for_inputs();
  for (int64_t row = blockIdx.x; row < in.count; row += gridDim.x) {
    if (in.takes[stage.index * in.count + row] < 0) continue;
    const int64_t first = (in.rows[row].taken - stage.patch_size) % in.last_size;
    const int64_t* ids = in.last_bytes + row * in.last_size + first;
    const uint32_t width = uint32_t(in.width);
    const auto value = [&](int64_t i) {
      const uint32_t byte = uint32_t(i) / width;
      const int64_t id = ids[byte];
      return is_id(id, in.num_tokens) ? stage.table[id * width + i - byte * width] : 0;
    };
    const int64_t count = stage.patch_size * in.width;
    const LayerNormOf& norm = stage.flat_norm;
    const Moments of = moments(count, norm.eps, shared, value);
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      stage.workspace[row * count + i] = normalized(norm, of, i, value(i));
    }
  }
}

__global__ void __launch_bounds__(kThreads) place_patches_of_rows(Slots in, StageSlots stage) {
  release_dependents();
  float* const shared = shared_memory<float>();  // (kWarps), then the row (dim)
  float* const values = shared + kWarps;
  wait_for_inputs();
  for (int64_t row = blockIdx.x; row < in.count; row += gridDim.x) {
    // The start token is none of the positions.
    const int64_t position = in.takes[stage.index * in.count + row] - 1;
    if (position < 0 || position >= stage.limit) continue;
    float* const x = stage.output + row * stage.dim;
    const Moments of = moments(stage.dim, stage.norm.eps, shared, [&](int64_t i) { return x[i]; });
    for (int64_t i = threadIdx.x; i < stage.dim; i += kThreads) {
      values[i] = normalized(stage.norm, of, i, x[i]);
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < stage.dim; i += kThreads) {
      x[i] = placed(stage, row, position, i, [&](int64_t i) { return values[i]; });
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) begin_rows(Slots in, StageSlots stage) {
  release_dependents();
  wait_for_inputs();
  const int64_t* const begins = in.begins + stage.index * in.count;
  for (const StageSlots::Part& part : stage.start) {
    const int64_t of_layer = in.count * part.size;
    for (int64_t i = first_item(); i < part.layers * of_layer; i += item_stride()) {
      const int64_t layer = quotient(i, of_layer), row = quotient(i - layer * of_layer, part.size);
      if (begins[row] >= 0) part.to[i] = part.from[i - (layer * (in.count - 1) + row) * part.size];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    normalize_rows(RowNorm norm, int64_t rows, int64_t dim, const int64_t* positions, float* x) {
  release_dependents();
  float* const shared = shared_memory<float>();
  wait_for_inputs();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    if (is_masked(positions, row)) continue;
    float* const own = x + row * dim;
    float squares = 0;
    for (int64_t i = threadIdx.x; i < dim; i += kThreads) squares += own[i] * own[i];
    const float factor = factor_of(norm, block_sum(squares, shared), dim);
    for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
      own[i] = own[i] * factor * norm.weight[i];
    }
  }
}

}  // namespace

#ifdef __CUDACC__
// A kernel that was compiled for an older device neither waits nor knows of its cluster.
bool has_compute_90() {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices] = {};  // of all threads
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (known[device] == 0) {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, normalize_rows);
    known[device] = error == cudaSuccess && attributes.ptxVersion >= 90 ? 1 : -1;
  }
  return known[device] > 0;
}
#endif

Error normalize(const RowNorm& norm, int64_t rows, int64_t dim, const int64_t* positions, float* x,
                Stream stream) {
  return launch_dependent(normalize_rows, rows, kThreads, kWarps * sizeof(float), stream, norm,
                          rows, dim, positions, x);
}

Error schedule_turn(const Slots& in, Stream stream) {
  return launch(turn_of_rows, divide_up(in.count, kThreads), kThreads, 0, stream, in);
}

Error begin_anew(const Slots& in, const StageSlots& stage, Stream stream) {
  int64_t most = 0;
  for (const StageSlots::Part& part : stage.start) {
    const int64_t size = part.layers * in.count * part.size;
    most = size > most ? size : most;
  }
  return launch_dependent(begin_rows, divide_up(most, kThreads), kThreads, 0, stream, in, stage);
}

Error embed_pending(const Slots& in, const StageSlots& local, bool is_after_turn, Stream stream) {
  return launch_dependent(embed_bytes, in.count, kThreads, 0, stream, in, local, is_after_turn);
}

Error embed_last_patches(const Slots& in, const StageSlots& stage, Stream stream) {
  return launch_dependent(embed_patches_of_rows, in.count, kThreads, kWarps * sizeof(float), stream,
                          in, stage);
}

Error place_tokens(const Slots& in, const StageSlots& stage, Stream stream) {
  const size_t shared_bytes = size_t(kWarps + stage.dim) * sizeof(float);
  return launch_dependent(place_patches_of_rows, in.count, kThreads, shared_bytes, stream, in,
                          stage);
}

}  // namespace mblm::cuda
