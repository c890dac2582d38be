// Products of packed weights by adders, and which products those are: see decode_product.h.
//
// A warp takes a column of up to kFewRows rows. Lane l holds the packs l, l + 32, ... of its
// weights. The first of them, and all else that no kernel writes, are loaded before the kernel
// waits for its inputs, so that memory works while kernels change. All threads of a block load
// inputs at once, a chunk at a time, and put them into shared memory as lanes read them: four
// floats next to each other, then those of the next lane. A norm's factor is known by then and
// applied to the sums.
#include "cuda/decode_product.cuh"

namespace mblm::cuda {
namespace {

using cpu::WeightType;

constexpr int kChunk = kThreads * kQuad;  // inputs

// 16 bytes of weights as they are in memory: they take fewer registers than their values.
struct Words {
  uint32_t words[4];
};

// Values [first, first + N) of a row of weights, zeros beyond its end.
template <bool kAligned, int N, class W>
MBLM_DEVICE Words read_weights(const W* row, int64_t inputs, int64_t first) {
  Words pack{};
  if constexpr (kAligned) {
    if (first < inputs) pack = load_once(reinterpret_cast<const Words*>(row + first));
  } else {
    W values[N] = {};
    for (int k = 0; k < N; ++k) {
      if (first + k < inputs) values[k] = row[first + k];
    }
    memcpy(&pack, values, sizeof(pack));
  }
  return pack;
}

// Four weights of a pack, from the quad-th on.
MBLM_DEVICE void unpack(const Words& pack, int, float* values, float) {
  for (int i = 0; i < kQuad; ++i) values[i] = __uint_as_float(pack.words[i]);
}
MBLM_DEVICE void unpack(const Words& pack, int quad, float* values, BFloat16) {
  for (int i = 0; i < kQuad; i += 2) {
    const uint32_t two = pack.words[2 * quad + i / 2];
    values[i] = __uint_as_float(two << 16);
    values[i + 1] = __uint_as_float(two & 0xffff0000u);
  }
}
// 2^23 + 128 + a weight, as bits: quicker than a conversion.
MBLM_DEVICE void unpack(const Words& pack, int quad, float* values, int8_t) {
  const uint32_t four = pack.words[quad] ^ 0x80808080u;
  for (int i = 0; i < kQuad; ++i) {
    values[i] = __uint_as_float(0x4b000000u | ((four >> (8 * i)) & 0xffu)) - 8388736.0f;
  }
}

// Inputs [k, k + 4) of some rows, zeros beyond their ends. Their last halves may come from
// elsewhere; four that are aligned lie on one side.
template <bool kAligned>
MBLM_DEVICE void read_inputs(const Product& in, int64_t first_row, int count, int64_t k,
                             Pack<float, kQuad> (&x)[kFewRows]) {
  constexpr int kAtOnce = kAligned ? kQuad : 1;
  const int64_t inputs = in.matrix.inputs, half = inputs / 2, kept = inputs - half;
  MBLM_UNROLL_ALL
  for (int i = 0; i < kQuad; i += kAtOnce) {
    const bool is_delayed = in.delayed && k + i >= kept;
    const int64_t stride = is_delayed ? half : in.x_stride;
    const float* from = is_delayed ? in.delayed + (k + i - kept) : in.x + k + i;
    from += first_row * stride;
    MBLM_UNROLL_ALL
    for (int r = 0; r < kFewRows; ++r, from += stride) {
      x[r].values[i] = 0;
      if constexpr (kAligned) x[r] = {};
      if (r >= count || k + i >= inputs) continue;
      if constexpr (kAligned) {
        x[r] = load_pack<kQuad>(from);
      } else {
        x[r].values[i] = *from;
      }
    }
  }
}

template <class W, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 2 : 1) product(Product in) {
  constexpr int N = kPackSize<W>, kPacks = kChunk / (kWarp * N);
  release_dependents();
  float* const staged = shared_memory<float>();       // (kFewRows, kChunk)
  float* const partial = staged + kFewRows * kChunk;  // (kFewRows, kWarps), sums of squares
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t inputs = in.matrix.inputs, outputs = in.matrix.outputs + in.second.outputs;
  const int64_t tiles = (in.rows + kFewRows - 1) / kFewRows;
  const int64_t groups = (outputs + kWarps - 1) / kWarps;
  // Where this thread's quad of a chunk lies in shared memory.
  const int pack = threadIdx.x * kQuad / N, quad_of_pack = threadIdx.x * kQuad % N / kQuad;
  const int place = pack / kWarp * (kWarp * N) + (quad_of_pack * kWarp + pack % kWarp) * kQuad;
  for (int64_t item = blockIdx.x; item < groups * tiles; item += gridDim.x) {
    const int64_t first_row = item % tiles * kFewRows, own = item / tiles * kWarps + warp;
    const int count = int(in.rows - first_row < kFewRows ? in.rows - first_row : kFewRows);
    const int64_t last = outputs - 1, of_warp = own < last ? own : last;
    const W* const weights = weights_of<W>(in, of_warp);
    const Column column(in, of_warp);
    const bool writes = lane < count && own < outputs;  // the result of a row
    bool is_left_out = false;
    float residual = 0;
    float sums[kFewRows] = {}, squares[kFewRows] = {};
    for (int64_t begin = 0; begin < inputs; begin += kChunk) {
      Words packs[kPacks];
      MBLM_UNROLL_ALL
      for (int p = 0; p < kPacks; ++p) {
        packs[p] = read_weights<kAligned, N>(weights, inputs, begin + (p * kWarp + lane) * N);
      }
      const int64_t k = begin + threadIdx.x * kQuad;
      float gains[kQuad];
      MBLM_UNROLL_ALL
      for (int i = 0; i < kQuad; ++i) {
        gains[i] = in.norm.weight && k + i < inputs ? in.norm.weight[k + i] : 1;
      }
      if (begin == 0) {
        ask_ahead(in);
        wait_for_inputs();
      }
      Pack<float, kQuad> x[kFewRows];
      read_inputs<kAligned>(in, first_row, count, k, x);
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
          x[r].values[i] *= gains[i];
        }
        store_pack(staged + r * kChunk + place, x[r]);
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
        if (begin + p * kWarp * N >= inputs) break;
        MBLM_UNROLL_ALL
        for (int j = 0; j < N / kQuad; ++j) {
          float w[kQuad];
          unpack(packs[p], j, w, W());
          MBLM_UNROLL_ALL
          for (int r = 0; r < kFewRows; ++r) {
            if (r >= count) break;
            const Pack<float, kQuad> of =
                load_pack<kQuad>(staged + r * kChunk + p * kWarp * N + (j * kWarp + lane) * kQuad);
            float part = 0;
            MBLM_UNROLL_ALL
            for (int i = 0; i < kQuad; ++i) part += of.values[i] * w[i];
            sums[r] += part;
          }
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

template <class W, bool kAligned>
Error launch_product(const Product& in, Stream stream) {
  const int64_t outputs = in.matrix.outputs + in.second.outputs;
  const int64_t blocks = divide_up(outputs, kWarps) * divide_up(in.rows, kFewRows);
  const size_t shared_bytes = size_t(kFewRows) * (kChunk + kWarps) * sizeof(float);
  return launch_clusters(product<W, kAligned>, blocks, 1, kThreads, shared_bytes, stream, in);
}

Error multiply_float(const Product& in, Stream stream) {
  const bool has_packs = in.matrix.inputs % (2 * kQuad) == 0 && in.x_stride % kQuad == 0 &&
                         is_aligned(in.x) && is_aligned(in.delayed) &&
                         is_aligned(in.matrix.weight) &&
                         (in.second.outputs == 0 || is_aligned(in.second.weight));
  return has_packs ? launch_product<float, true>(in, stream)
                   : launch_product<float, false>(in, stream);
}

}  // namespace

Error multiply(const Product& in, Stream stream) {
  if (in.matrix.inputs < 1) return "a product needs inputs";
  if (is_for_tensor_cores(in)) return multiply_on_tensor_cores(in, stream);
  switch (in.matrix.type) {
    case WeightType::kFloat32:
      return multiply_float(in, stream);
    case WeightType::kBFloat16:
      return launch_product<BFloat16, false>(in, stream);
    default:
      return launch_product<int8_t, false>(in, stream);
  }
}

}  // namespace mblm::cuda
