// Products of float32 weights by adders: see decode_product.h.
//
// A warp takes a column of up to kFewRows rows. Lane l holds the packs l, l + 32, ... of its
// weights. The first of them, and all else that no kernel writes, are loaded before the kernel
// waits for its inputs, so that memory works while kernels change. All threads of a block load
// inputs at once, a chunk at a time, and put them into shared memory as lanes read them: four
// floats next to each other, then those of the next lane. A norm's factor is known by then and
// applied to the sums.
#include <algorithm>

#include "cuda/decode_product.cuh"

namespace mblm::cuda {
namespace {

using cpu::WeightType;

constexpr int kChunk = kThreads * kQuad;  // inputs

// Inputs [k, k + 4) of some rows, zeros beyond their ends; their last halves may come from
// elsewhere.
MBLM_DEVICE void read_inputs(const Product& in, int64_t first_row, int count, int64_t k,
                             Pack<float, kQuad> (&x)[kFewRows]) {
  const int64_t inputs = in.matrix.inputs, half = inputs / 2;
  const bool is_delayed = in.delayed && k >= half;
  const int64_t stride = is_delayed ? half : in.x_stride;
  const float* from = is_delayed ? in.delayed + (k - half) : in.x + k;
  from += first_row * stride;
  MBLM_UNROLL_ALL
  for (int r = 0; r < kFewRows; ++r, from += stride) {
    x[r] = {};
    if (r < count && k < inputs) x[r] = load_pack<kQuad>(from);
  }
}

__global__ void __launch_bounds__(kThreads, 2) product(Product in) {
  constexpr int kPacks = kChunk / (kWarp * kQuad);
  release_dependents();
  float* const staged = shared_memory<float>();       // (kFewRows, kChunk)
  float* const partial = staged + kFewRows * kChunk;  // (kFewRows, kWarps), sums of squares
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t inputs = in.matrix.inputs, outputs = in.matrix.outputs + in.second.outputs;
  const int64_t tiles = (in.rows + kFewRows - 1) / kFewRows;
  const int64_t groups = (outputs + kWarps - 1) / kWarps;
  for (int64_t item = blockIdx.x; item < groups * tiles; item += gridDim.x) {
    const int64_t first_row = item % tiles * kFewRows, own = item / tiles * kWarps + warp;
    const int count = int(in.rows - first_row < kFewRows ? in.rows - first_row : kFewRows);
    const int64_t last = outputs - 1, of_warp = own < last ? own : last;
    const float* const weights = weights_of<float>(in, of_warp);
    const Column column(in, of_warp);
    const bool writes = lane < count && own < outputs;  // the result of a row
    bool is_left_out = false;
    float residual = 0;
    float sums[kFewRows] = {}, squares[kFewRows] = {};
    for (int64_t begin = 0; begin < inputs; begin += kChunk) {
      Pack<float, kQuad> packs[kPacks] = {};
      MBLM_UNROLL_ALL
      for (int p = 0; p < kPacks; ++p) {
        const int64_t first = begin + (p * kWarp + lane) * kQuad;
        if (first < inputs) {
          packs[p] = load_once(reinterpret_cast<const Pack<float, kQuad>*>(weights + first));
        }
      }
      const int64_t k = begin + threadIdx.x * kQuad;
      Pack<float, kQuad> gains = {{1, 1, 1, 1}};
      if (in.norm.weight && k < inputs) gains = load_pack<kQuad>(in.norm.weight + k);
      if (begin == 0) {
        ask_ahead(in);
        wait_for_inputs();
      }
      Pack<float, kQuad> x[kFewRows];
      read_inputs(in, first_row, count, k, x);
      if (begin == 0) {
        is_left_out = is_masked(in.positions, first_row + lane, writes);
        if (in.residual && writes) {
          residual = in.residual[(first_row + lane) * column.outputs + column.index];
        }
      }
      MBLM_UNROLL_ALL
      for (int r = 0; r < kFewRows; ++r) {
        if (r >= count) break;
        MBLM_UNROLL_ALL
        for (int i = 0; i < kQuad; ++i) {
          squares[r] += x[r].values[i] * x[r].values[i];
          x[r].values[i] *= gains.values[i];
        }
        store_pack(staged + r * kChunk + threadIdx.x * kQuad, x[r]);
      }
      const bool is_last = begin + kChunk >= inputs;
      if (in.norm.weight && is_last) {
        MBLM_UNROLL_ALL
        for (int r = 0; r < kFewRows; ++r) {
          if (r >= count) break;
          const float sum = warp_sum(squares[r]);
          if (lane == 0) partial[r * kWarps + warp] = sum;
        }
      }
      __syncthreads();
      MBLM_UNROLL_ALL
      for (int p = 0; p < kPacks; ++p) {
        if (begin + p * kWarp * kQuad >= inputs) break;
        MBLM_UNROLL_ALL
        for (int r = 0; r < kFewRows; ++r) {
          if (r >= count) break;
          const Pack<float, kQuad> of =
              load_pack<kQuad>(staged + r * kChunk + (p * kWarp + lane) * kQuad);
          float part = 0;
          MBLM_UNROLL_ALL
          for (int i = 0; i < kQuad; ++i) part += of.values[i] * packs[p].values[i];
          sums[r] += part;
        }
      }
      __syncthreads();
    }
    float total = 0;
    MBLM_UNROLL_ALL
    for (int r = 0; r < kFewRows; ++r) {
      if (r >= count) break;
      const float sum = warp_sum(sums[r]);
      if (lane == r) total = sum;
    }
    if (writes) {
      if (in.norm.weight) {
        float all = 0;
        for (int w = 0; w < kWarps; ++w) all += partial[lane * kWarps + w];
        total *= factor_of(in.norm, all, inputs);
      }
      finish(in, column, first_row + lane, total, residual, is_left_out);
    }
  }
}

bool has_packs(const cpu::Matrix& matrix) {
  const size_t pack = std::min<size_t>(16, kPack * cpu::size_of(matrix.type));
  return matrix.outputs == 0 || reinterpret_cast<uintptr_t>(matrix.weight) % pack == 0;
}

}  // namespace

Error multiply(const Product& in, Stream stream) {
  const int64_t outputs = in.matrix.outputs + in.second.outputs;
  const bool is_whole = in.matrix.inputs > 0 && in.matrix.inputs % kPack == 0 &&
                        in.x_stride % kQuad == 0 && has_packs(in.matrix) && has_packs(in.second) &&
                        is_aligned(in.x) && is_aligned(in.delayed) && is_aligned(in.norm.weight);
  if (!is_whole) return "a product's inputs and weights must be whole packs of 16 bytes";
  constexpr int64_t kMost = 1 << 30;  // is counted in 32 bits
  if (in.matrix.inputs > kMost || in.rows * outputs > kMost) return "a product is too large";
  if (in.matrix.type != WeightType::kFloat32) return multiply_on_tensor_cores(in, stream);
  const int64_t blocks = divide_up(outputs, kWarps) * divide_up(in.rows, kFewRows);
  const size_t shared_bytes = size_t(kFewRows) * (kChunk + kWarps) * sizeof(float);
  return launch_dependent(product, blocks, kThreads, shared_bytes, stream, in);
}

}  // namespace mblm::cuda
