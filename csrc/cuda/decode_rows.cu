// What a run does with whole rows: see decode_rows.h. A block takes a row.
#include "cuda/decode_rows.h"
#include "cuda/row_math.cuh"

namespace mblm::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) embed(ByteEmbedding in) {
  release_dependents();
  wait_for_inputs();
  const Place& place = in.place;
  const int now = *in.halted.now;
  if (blockIdx.x == 0 && threadIdx.x == 0) *in.halted.latched = now;
  if (now) return;
  for (int64_t row = blockIdx.x; row < place.rows; row += gridDim.x) {
    const int64_t position = place.positions[row], id = in.pending[row];
    __syncthreads();
    if (position < 0 || position >= place.limit) continue;  // there is no room
    if (threadIdx.x == 0) {
      const int64_t next = in.history.next[row], size = in.history.size;
      if (next >= 0 && next < size) in.history.ids[row * size + next] = id;
      in.history.next[row] = next + 1 < size ? next + 1 : 0;
      place.positions[row] = position + 1;
    }
    const float* const embedding = is_id(id, in.num_tokens) ? in.table + id * place.dim : nullptr;
    MBLM_UNROLL_TWICE
    for (int64_t i = threadIdx.x; i < place.dim; i += kThreads) {
      const auto value = [&](int64_t i) { return embedding ? embedding[i] : 0; };
      place.x[row * place.dim + i] = placed(place, row, position, i, value);
    }
  }
}

__global__ void __launch_bounds__(kThreads) gather(PatchGathering in) {
  release_dependents();
  float* const shared = shared_memory<float>();
  wait_for_inputs();
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    const int64_t size = in.history.size, next = in.history.next[row];
    const int64_t first = (next == 0 ? size : next) - in.patch_size;
    if (first < 0 || first + in.patch_size > size) continue;  // no patch is complete
    const int64_t* ids = in.history.ids + row * size + first;
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

__global__ void __launch_bounds__(kThreads) place_rows(PatchPlacing in) {
  release_dependents();
  float* const shared = shared_memory<float>();  // (kWarps), then the row (dim)
  float* const values = shared + kWarps;
  wait_for_inputs();
  if (in.halted && *in.halted) return;
  const Place& place = in.place;
  for (int64_t row = blockIdx.x; row < place.rows; row += gridDim.x) {
    const int64_t position = place.positions[row];
    float* const x = place.x + row * place.dim;
    const Moments of =
        moments(place.dim, in.norm.eps, shared, [&](int64_t i) { return x[i]; });  // a barrier
    if (position < 0 || position >= place.limit) continue;  // there is no room
    if (threadIdx.x == 0) place.positions[row] = position + 1;
    for (int64_t i = threadIdx.x; i < place.dim; i += kThreads) {
      values[i] = normalized(in.norm, of, i, x[i]);
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < place.dim; i += kThreads) {
      x[i] = placed(place, row, position, i, [&](int64_t i) { return values[i]; });
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) normalize_rows(FinalNorm in) {
  release_dependents();
  float* const shared = shared_memory<float>();
  wait_for_inputs();
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    if (is_masked(in.halted, in.positions, row)) continue;
    float* const x = in.x + row * in.dim;
    float squares = 0;
    for (int64_t i = threadIdx.x; i < in.dim; i += kThreads) squares += x[i] * x[i];
    const float factor = factor_of(in.norm, block_sum(squares, shared), in.dim);
    for (int64_t i = threadIdx.x; i < in.dim; i += kThreads) {
      x[i] = x[i] * factor * in.norm.weight[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) restart_rows(Restart in) {
  release_dependents();
  wait_for_inputs();
  if (in.halted && *in.halted) return;
  for (const Restart::Part& part : in.parts) {
    for (int64_t i = first_item(); i < part.size; i += item_stride()) part.to[i] = part.from[i];
  }
  for (int64_t row = first_item(); row < in.rows; row += item_stride()) in.positions[row] = 0;
}

}  // namespace

#ifdef __CUDACC__
// A kernel that was compiled for an older device does not wait.
bool can_launch_dependents() {
  constexpr int kDevices = 64;
  static signed char known[kDevices] = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (known[device] == 0) {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, restart_rows);
    known[device] = error == cudaSuccess && attributes.ptxVersion >= 90 ? 1 : -1;
  }
  return known[device] > 0;
}
#endif

Error embed_byte(const ByteEmbedding& in, Stream stream) {
  return launch_dependent(embed, in.place.rows, kThreads, 0, stream, in);
}

Error gather_patches(const PatchGathering& in, Stream stream) {
  return launch(gather, in.rows, kThreads, kWarps * sizeof(float), stream, in);
}

Error place_patches(const PatchPlacing& in, Stream stream) {
  const size_t shared_bytes = size_t(kWarps + in.place.dim) * sizeof(float);
  return launch_dependent(place_rows, in.place.rows, kThreads, shared_bytes, stream, in);
}

Error normalize(const FinalNorm& in, Stream stream) {
  return launch_dependent(normalize_rows, in.rows, kThreads, kWarps * sizeof(float), stream, in);
}

Error restart(const Restart& in, Stream stream) {
  int64_t most = in.rows;
  for (const Restart::Part& part : in.parts) most = part.size > most ? part.size : most;
  return launch_dependent(restart_rows, divide_up(most, kThreads), kThreads, 0, stream, in);
}

}  // namespace mblm::cuda
