// Products of packed weights and a few rows: see decode_product.h.
//
// A warp takes some columns, of up to kRows rows. Lane l holds the packs l, l + 32, ... of the
// weights. The first of them, and all else that no kernel writes, are loaded before the kernel
// waits for its inputs, so that memory works while kernels change. All threads of a block put the
// inputs into shared memory, a chunk at a time, as lanes read them: four floats next to each other,
// then those of the next lane. A norm's factor is known by then and applied to the sums.
#include "cuda/decode_product.cuh"
#include "cuda/kernel.cuh"

namespace mblm::cuda {
namespace {

using cpu::WeightType;

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

// Where an input of a chunk lies in shared memory.
template <int N>
MBLM_DEVICE int place_of(int index) {
  const int pack = index / N, part = index % N;
  return pack / kWarp * (kWarp * N) + part / kQuad * (kWarp * kQuad) + pack % kWarp * kQuad +
         part % kQuad;
}

// A norm's weight of an input, 1 where there is none.
MBLM_DEVICE float gain(const Product& in, int64_t k) {
  return in.norm.weight && k < in.matrix.inputs ? in.norm.weight[k] : 1;
}

template <class W, int kRows, int kColumns, int kPacks, bool kAligned>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 2 : 1)
    product(Product in, int shared_row) {
  constexpr int N = kPackSize<W>, kChunk = kPacks * kWarp * N, kOwn = kChunk / kThreads;
  static_assert(kRows * kColumns <= kWarp && kChunk % kThreads == 0);
  release_dependents();
  float* const staged = shared_memory<float>();        // (kRows, shared_row)
  float* const partial = staged + kRows * shared_row;  // (kRows, kWarps), sums of squares
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t inputs = in.matrix.inputs, outputs = in.matrix.outputs + in.second.outputs;
  const int64_t kept = in.delayed ? inputs - inputs / 2 : inputs;
  const int64_t tiles = (in.rows + kRows - 1) / kRows;
  const int64_t groups = (outputs + kWarps * kColumns - 1) / (kWarps * kColumns);
  for (int64_t item = blockIdx.x; item < groups * tiles; item += gridDim.x) {
    const int64_t first_row = item % tiles * kRows;
    const int count = int(in.rows - first_row < kRows ? in.rows - first_row : kRows);
    const int64_t first_column = (item / tiles * kWarps + warp) * kColumns;
    const W* weights[kColumns];
    MBLM_UNROLL_ALL
    for (int c = 0; c < kColumns; ++c) {
      const int64_t column = first_column + c < outputs ? first_column + c : outputs - 1;
      const bool is_second = column >= in.matrix.outputs;
      weights[c] = is_second ? static_cast<const W*>(in.second.weight) +
                                   (column - in.matrix.outputs) * inputs
                             : static_cast<const W*>(in.matrix.weight) + column * inputs;
    }
    // The result that this lane writes.
    const int own_row = lane / kColumns;
    const int64_t own_column = first_column + lane % kColumns;
    const bool writes = own_row < count && lane < kRows * kColumns && own_column < outputs;
    const Column column(in, writes ? own_column : 0);
    bool is_left_out = false;
    float residual = 0;
    float sums[kRows][kColumns] = {}, squares[kRows] = {};
    for (int64_t begin = 0; begin < inputs; begin += kChunk) {
      Words packs[kColumns][kPacks];
      MBLM_UNROLL_ALL
      for (int c = 0; c < kColumns; ++c) {
        MBLM_UNROLL_ALL
        for (int p = 0; p < kPacks; ++p) {
          packs[c][p] =
              read_weights<kAligned, N>(weights[c], inputs, begin + (p * kWarp + lane) * N);
        }
      }
      // Of one row, so that its latency is not added to that of x; of more, registers are scarce.
      float gains[kRows == 1 ? kOwn : 1];
      if constexpr (kRows == 1) {
        MBLM_UNROLL_ALL
        for (int i = 0; i < kOwn; ++i) gains[i] = gain(in, begin + threadIdx.x + i * kThreads);
      }
      if (begin == 0) {
        wait_for_inputs();
        is_left_out = is_masked(in.positions, first_row + own_row, writes);
        if (in.residual && writes) {
          residual = in.residual[(first_row + own_row) * column.outputs + column.index];
        }
      }
      const auto stage = [&](int index, float gain) {
        const int64_t k = begin + index;
        MBLM_UNROLL_ALL
        for (int r = 0; r < kRows; ++r) {
          float value = 0;
          if (r < count && k < inputs) {
            const int64_t row = first_row + r;
            value = k < kept ? in.x[row * in.x_stride + k]
                             : in.delayed[row * (inputs - kept) + k - kept];
          }
          squares[r] += value * value;
          staged[r * shared_row + place_of<N>(index)] = value * gain;
        }
      };
      if constexpr (kRows == 1) {
        MBLM_UNROLL_ALL
        for (int i = 0; i < kOwn; ++i) {
          const int index = threadIdx.x + i * kThreads;
          if (index < shared_row) stage(index, gains[i]);
        }
      } else {
        MBLM_UNROLL_TWICE
        for (int index = threadIdx.x; index < shared_row; index += kThreads) {
          stage(index, gain(in, begin + index));
        }
      }
      const bool is_last = begin + kChunk >= inputs;
      if (in.norm.weight && is_last) {
        MBLM_UNROLL_ALL
        for (int r = 0; r < kRows; ++r) {
          if (r >= count) break;
          const float sum = warp_sum(squares[r]);
          if (lane == 0) partial[r * kWarps + warp] = sum;
        }
      }
      __syncthreads();
      MBLM_UNROLL_ALL
      for (int p = 0; p < kPacks; ++p) {
        if (begin + p * kWarp * N >= inputs) break;
        float parts[kRows][kColumns] = {};
        MBLM_UNROLL_ALL
        for (int j = 0; j < N / kQuad; ++j) {
          float w[kColumns][kQuad];
          MBLM_UNROLL_ALL
          for (int c = 0; c < kColumns; ++c) {
            unpack(packs[c][p], j, w[c], W());
          }
          MBLM_UNROLL_ALL
          for (int r = 0; r < kRows; ++r) {
            if (r >= count) break;
            const Pack<float, kQuad> x = load_pack<kQuad>(staged + r * shared_row + p * kWarp * N +
                                                          (j * kWarp + lane) * kQuad);
            MBLM_UNROLL_ALL
            for (int c = 0; c < kColumns; ++c) {
              MBLM_UNROLL_ALL
              for (int i = 0; i < kQuad; ++i) parts[r][c] += x.values[i] * w[c][i];
            }
          }
        }
        MBLM_UNROLL_ALL
        for (int r = 0; r < kRows; ++r) {
          MBLM_UNROLL_ALL
          for (int c = 0; c < kColumns; ++c) sums[r][c] += parts[r][c];
        }
      }
      if (is_last) {
        float total = 0;
        MBLM_UNROLL_ALL
        for (int r = 0; r < kRows; ++r) {
          if (r >= count) break;
          MBLM_UNROLL_ALL
          for (int c = 0; c < kColumns; ++c) {
            const float sum = warp_sum(sums[r][c]);
            if (lane == r * kColumns + c) total = sum;
          }
        }
        if (writes) {
          if (in.norm.weight) {
            float all = 0;
            for (int w = 0; w < kWarps; ++w) all += partial[own_row * kWarps + w];
            total *= factor_of(in.norm, all, inputs);
          }
          finish(in, column, first_row + own_row, total, residual, is_left_out);
        }
      }
      __syncthreads();
    }
  }
}

template <class W, int kRows, int kColumns, int kPacks>
Error launch_product(const Product& in, Stream stream) {
  constexpr int N = kPackSize<W>, kChunk = kPacks * kWarp * N;
  const int64_t outputs = in.matrix.outputs + in.second.outputs, inputs = in.matrix.inputs;
  const int64_t blocks = divide_up(outputs, kWarps * kColumns) * divide_up(in.rows, kRows);
  const int64_t whole = divide_up(inputs, kWarp * N) * kWarp * N;
  const int shared_row = int(whole < kChunk ? whole : kChunk);
  const size_t shared_bytes = size_t(kRows) * (shared_row + kWarps) * sizeof(float);
  const bool is_aligned_matrix = inputs % N == 0 && is_aligned(in.matrix.weight) &&
                                 (in.second.outputs == 0 || is_aligned(in.second.weight));
  const auto kernel = is_aligned_matrix ? product<W, kRows, kColumns, kPacks, true>
                                        : product<W, kRows, kColumns, kPacks, false>;
  return in.is_dependent
             ? launch_dependent(kernel, blocks, kThreads, shared_bytes, stream, in, shared_row)
             : launch(kernel, blocks, kThreads, shared_bytes, stream, in, shared_row);
}

// kPacks is what a lane holds of a column, so that a chunk is at most 2,048 inputs.
template <class W, int kPacks>
Error launch_rows(const Product& in, Stream stream) {
  constexpr int kRows = kFewRows, kColumns = 4;
  constexpr int64_t kFewestBlocks = 128;  // about one for each multiprocessor
  if (in.rows == 1) return launch_product<W, 1, 1, kPacks>(in, stream);
  const int64_t blocks = divide_up(in.matrix.outputs + in.second.outputs, kWarps * kColumns) *
                         divide_up(in.rows, kRows);
  if (blocks < kFewestBlocks) return launch_product<W, kRows, 1, kPacks>(in, stream);
  return launch_product<W, kRows, kColumns, kPacks / 4>(in, stream);
}

}  // namespace

Error multiply(const Product& in, Stream stream) {
  if (in.matrix.inputs < 1) return "a product needs inputs";
  const bool is_rounded = in.matrix.type != WeightType::kFloat32;
  if (in.rows > kFewRows && is_rounded) return multiply_on_tensor_cores(in, stream);
  switch (in.matrix.type) {
    case WeightType::kFloat32:
      return launch_rows<float, 8>(in, stream);
    case WeightType::kBFloat16:
      return launch_rows<BFloat16, 8>(in, stream);
    default:
      return launch_rows<int8_t, 4>(in, stream);
  }
}

}  // namespace mblm::cuda
