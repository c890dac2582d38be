// Norms of whole rows: see decode_rows.h. A block takes a row.
#include <atomic>

#include "cuda/decode_rows.h"
#include "cuda/row_math.cuh"

namespace mblm::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) normalize_rows(FinalNorm in) {
  release_dependents();
  float* const shared = shared_memory<float>();
  wait_for_inputs();
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    if (is_masked(in.positions, row)) continue;
    float* const x = in.x + row * in.dim;
    float squares = 0;
    for (int64_t i = threadIdx.x; i < in.dim; i += kThreads) squares += x[i] * x[i];
    const float factor = factor_of(in.norm, block_sum(squares, shared), in.dim);
    for (int64_t i = threadIdx.x; i < in.dim; i += kThreads) {
      x[i] = x[i] * factor * in.norm.weight[i];
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

Error normalize(const FinalNorm& in, Stream stream) {
  return launch_dependent(normalize_rows, in.rows, kThreads, kWarps * sizeof(float), stream, in);
}

}  // namespace mblm::cuda
