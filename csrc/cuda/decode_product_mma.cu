// Products of packed, rounded weights and many rows, on tensor cores: see decode_product.h.
//
// A block takes some columns, of up to 64 rows, so that a weight is read from memory once for all
// of them. Its warps share out the inputs in slices and add up their sums at the end. Sixteen
// columns are multiplied with eight rows at a time: as it does not matter in which order a product
// takes the inputs, a lane holds packs of two columns as they lie in memory, and the inputs of
// eight rows that belong to them, which no other lane of the block needs. An input is the sum of
// two bfloat16, which are multiplied one after the other. Weights that no kernel writes are loaded
// before the kernel waits for its inputs, and further ones as soon as there is room for them.
#include <cmath>

#include "cuda/decode_product.cuh"
#include "cuda/mma.cuh"

namespace mblm::cuda {
namespace {

using cpu::WeightType;

constexpr int kHeight = 16, kWidth = 8;  // columns and rows of a product of pieces
constexpr int kRowTiles = 8, kMostRows = kRowTiles * kWidth;
constexpr int kSharers = 4;  // lanes that share a column

// From a row of a block's sums to the next: lanes write them to different banks.
template <int kColumns>
constexpr int kStrideOf = kColumns + 4;

// The weights of a quad of two columns as the lane's piece of a product.
MBLM_DEVICE void piece_of(const Words (&packs)[2], int quad, uint32_t (&piece)[4], BFloat16) {
  MBLM_UNROLL_ALL
  for (int i = 0; i < 4; ++i) piece[i] = packs[i % 2].words[2 * quad + i / 2];
}
MBLM_DEVICE void piece_of(const Words (&packs)[2], int quad, uint32_t (&piece)[4], int8_t) {
  MBLM_UNROLL_ALL
  for (int i = 0; i < 4; ++i) {
    const uint32_t four = packs[i % 2].words[quad];
    piece[i] = pair_of_bytes(__byte_perm(four, 0, i < 2 ? 0x4140 : 0x4342));
  }
}

// What remains of two values. A number that is not finite is all in the upper half: it remains so
// if what is left of an infinity, NaN, becomes finite.
MBLM_DEVICE uint32_t rest_of(float first, float second, uint32_t upper) {
  constexpr float kMost = 0x1p120f;  // more than is left of any number
  return pair_of(fmaxf(first - first_of(upper), -kMost), fmaxf(second - second_of(upper), -kMost));
}

// Inputs [k, k + 4) of every eighth row from the given one on, zeros where there are none. The last
// half of a row may come from elsewhere; four that are aligned lie on one side.
template <bool kAligned>
MBLM_DEVICE void read_inputs(const Product& in, int64_t row, int64_t rows, int64_t k,
                             Pack<float, kQuad> (&x)[kRowTiles]) {
  const int64_t inputs = in.matrix.inputs, half = inputs / 2;
  const int64_t kept = in.delayed ? inputs - half : inputs;
  if constexpr (kAligned) {
    const bool is_delayed = in.delayed && k >= kept;
    const int64_t stride = is_delayed ? half : in.x_stride;
    const float* const from = is_delayed ? in.delayed : in.x;
    const int64_t at = row * stride + (is_delayed ? k - kept : k);
    if (k >= inputs) rows = 0;
    MBLM_UNROLL_ALL
    for (int r = 0; r < kRowTiles; ++r) {
      x[r] = {};
      if (row + r * kWidth < rows) x[r] = load_pack<kQuad>(from + at + r * kWidth * stride);
    }
  } else {
    MBLM_UNROLL_ALL
    for (int r = 0; r < kRowTiles; ++r, row += kWidth) {
      MBLM_UNROLL_ALL
      for (int i = 0; i < kQuad; ++i) {
        x[r].values[i] = row >= rows || k + i >= inputs ? 0
                         : k + i < kept                 ? in.x[row * in.x_stride + k + i]
                                                        : in.delayed[row * half + k + i - kept];
      }
    }
  }
}

// A norm's weights of inputs [k, k + 4), 1 where there are none.
template <bool kAligned>
MBLM_DEVICE Pack<float, kQuad> read_gains(const Product& in, int64_t k) {
  Pack<float, kQuad> gains = {{1, 1, 1, 1}};
  if (!in.norm.weight) return gains;
  if constexpr (kAligned) {
    if (k < in.matrix.inputs) gains = load_pack<kQuad>(in.norm.weight + k);
  } else {
    MBLM_UNROLL_ALL
    for (int i = 0; i < kQuad; ++i) {
      if (k + i < in.matrix.inputs) gains.values[i] = in.norm.weight[k + i];
    }
  }
  return gains;
}

template <class W, int kTiles, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) product_of_tiles(Product in, int shared_rows) {
  constexpr int N = kPackSize<W>, kSteps = N / kQuad, kSlice = kSharers * N;
  constexpr int kColumns = kTiles * kHeight, kStride = kStrideOf<kColumns>;
  constexpr int kDepth = kAligned ? 4 / kTiles : 1;  // slices that are loaded ahead
  constexpr int kRowsApart = kThreads / kColumns, kOwn = kMostRows / kRowsApart;
  release_dependents();
  float* const partial = shared_memory<float>();  // (kWarps, shared_rows, kStride)
  float* const partial_squares = partial + kWarps * shared_rows * kStride;  // (kWarps, shared_rows)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / kSharers, part = lane % kSharers;
  const int64_t inputs = in.matrix.inputs, outputs = in.matrix.outputs + in.second.outputs;
  const int64_t slices = (inputs + kSlice - 1) / kSlice;
  const int64_t passes = (in.rows + kMostRows - 1) / kMostRows;
  const int64_t groups = (outputs + kColumns - 1) / kColumns;
  for (int64_t item = blockIdx.x; item < groups * passes; item += gridDim.x) {
    const int64_t first_row = item % passes * kMostRows, first_column = item / passes * kColumns;
    const int count = int(in.rows - first_row < kMostRows ? in.rows - first_row : kMostRows);
    const W* weights[kTiles][2];
    MBLM_UNROLL_ALL
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int64_t next = first_column + i * (kHeight / 2) + group;
      const int64_t column = next < outputs ? next : outputs - 1;
      const bool is_second = column >= in.matrix.outputs;
      weights[i / 2][i % 2] = is_second ? static_cast<const W*>(in.second.weight) +
                                              (column - in.matrix.outputs) * inputs
                                        : static_cast<const W*>(in.matrix.weight) + column * inputs;
    }
    Words packs[kDepth][kTiles][2];
    const auto read = [&](Words(&slice)[kTiles][2], int64_t index) {
      MBLM_UNROLL_ALL
      for (int i = 0; i < 2 * kTiles; ++i) {
        slice[i / 2][i % 2] =
            read_weights<kAligned, N>(weights[i / 2][i % 2], inputs, index * kSlice + part * N);
      }
    };
    MBLM_UNROLL_ALL
    for (int d = 0; d < kDepth; ++d) read(packs[d], warp + d * kWarps);
    // The results that this thread writes are of one column, of rows that are kRowsApart.
    const int own_row = threadIdx.x / kColumns;
    const bool has_column = first_column + threadIdx.x % kColumns < outputs;
    const Column column(in, has_column ? first_column + threadIdx.x % kColumns : 0);
    wait_for_inputs();

    const auto input_of = [&](int64_t slice, int step) {
      return slice * kSlice + part * N + step * kQuad;
    };
    Pack<float, kQuad> next[kRowTiles];
    const auto read_next = [&](int64_t k) {
      read_inputs<kAligned>(in, first_row + group, first_row + count, k, next);
    };
    read_next(input_of(warp, 0));
    float sums[kTiles][kRowTiles][4] = {}, squares[kRowTiles] = {};
    for (int64_t first = warp; first < slices; first += kDepth * kWarps) {
      MBLM_UNROLL_ALL
      for (int d = 0; d < kDepth; ++d) {
        const int64_t slice = first + d * kWarps;
        if (slice >= slices) break;
        MBLM_UNROLL_ALL
        for (int step = 0; step < kSteps; ++step) {
          // The next inputs are on their way while these are multiplied.
          Pack<float, kQuad> x[kRowTiles];
          MBLM_UNROLL_ALL
          for (int r = 0; r < kRowTiles; ++r) x[r] = next[r];
          const Pack<float, kQuad> gains = read_gains<kAligned>(in, input_of(slice, step));
          const bool is_last = step + 1 == kSteps;
          read_next(is_last ? input_of(slice + kWarps, 0) : input_of(slice, step + 1));
          uint32_t pieces[kTiles][4];
          MBLM_UNROLL_ALL
          for (int i = 0; i < kTiles; ++i) piece_of(packs[d][i], step, pieces[i], W());
          MBLM_UNROLL_ALL
          for (int r = 0; r < kRowTiles; ++r) {
            if (r * kWidth >= count) break;
            float (&values)[kQuad] = x[r].values;
            MBLM_UNROLL_ALL
            for (int i = 0; i < kQuad; ++i) {
              squares[r] += values[i] * values[i];
              values[i] *= gains.values[i];
            }
            const uint32_t upper[] = {pair_of(values[0], values[1]), pair_of(values[2], values[3])};
            const uint32_t lower[] = {rest_of(values[0], values[1], upper[0]),
                                      rest_of(values[2], values[3], upper[1])};
            MBLM_UNROLL_ALL
            for (int i = 0; i < kTiles; ++i) {
              multiply_add(sums[i][r], pieces[i], upper);
              multiply_add(sums[i][r], pieces[i], lower);
            }
          }
        }
        read(packs[d], slice + kDepth * kWarps);
      }
    }

    float residuals[kOwn] = {};
    MBLM_UNROLL_ALL
    for (int i = 0; i < kOwn; ++i) {
      const int row = own_row + i * kRowsApart;
      if (in.residual && has_column && row < count) {
        residuals[i] = in.residual[(first_row + row) * column.outputs + column.index];
      }
    }
    MBLM_UNROLL_ALL
    for (int r = 0; r < kRowTiles; ++r) {
      if (r * kWidth >= count) break;
      float* const rows = partial + (warp * shared_rows + r * kWidth) * kStride;
      MBLM_UNROLL_ALL
      for (int i = 0; i < kTiles; ++i) {
        MBLM_UNROLL_ALL
        for (int e = 0; e < 4; ++e) {
          const int of_tile = i * kHeight + e / 2 * (kHeight / 2) + group;
          rows[(2 * part + e % 2) * kStride + of_tile] = sums[i][r][e];
        }
      }
      if (in.norm.weight) {
        float sum = squares[r];
        for (int offset = 1; offset < kSharers; offset *= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        if (part == 0) partial_squares[warp * shared_rows + r * kWidth + group] = sum;
      }
    }
    __syncthreads();
    MBLM_UNROLL_ALL
    for (int i = 0; i < kOwn; ++i) {
      const int row = own_row + i * kRowsApart;
      if (!has_column || row >= count) break;
      float sum = 0, all = 0;
      for (int w = 0; w < kWarps; ++w) {
        sum += partial[(w * shared_rows + row) * kStride + threadIdx.x % kColumns];
      }
      if (in.norm.weight) {
        for (int w = 0; w < kWarps; ++w) all += partial_squares[w * shared_rows + row];
        sum *= factor_of(in.norm, all, inputs);
      }
      finish(in, column, first_row + row, sum, residuals[i],
             is_masked(in.positions, first_row + row));
    }
    __syncthreads();
  }
}

template <class W, int kTiles, bool kAligned>
Error launch_tiles(const Product& in, Stream stream) {
  constexpr int kColumns = kTiles * kHeight;
  const int64_t outputs = in.matrix.outputs + in.second.outputs;
  const int64_t blocks = divide_up(outputs, kColumns) * divide_up(in.rows, kMostRows);
  const int64_t whole = divide_up(in.rows, kWidth) * kWidth;
  const int shared_rows = int(whole < kMostRows ? whole : kMostRows);
  const size_t shared_bytes =
      size_t(kWarps) * shared_rows * (kStrideOf<kColumns> + 1) * sizeof(float);
  const auto kernel = product_of_tiles<W, kTiles, kAligned>;
  return in.is_dependent
             ? launch_dependent(kernel, blocks, kThreads, shared_bytes, stream, in, shared_rows)
             : launch(kernel, blocks, kThreads, shared_bytes, stream, in, shared_rows);
}

// Each block reads all inputs of all rows, so that fewer, larger ones are better as soon as there
// are enough of them to read the weights quickly.
template <class W>
Error launch_columns(const Product& in, Stream stream) {
  constexpr int64_t kWide = 1024;  // 32 larger blocks
  const int64_t outputs = in.matrix.outputs + in.second.outputs;
  const bool has_aligned_weights = in.matrix.inputs % kPackSize<W> == 0 &&
                                   is_aligned(in.matrix.weight) &&
                                   (in.second.outputs == 0 || is_aligned(in.second.weight));
  const bool has_aligned_inputs = in.x_stride % kQuad == 0 && is_aligned(in.x) &&
                                  is_aligned(in.delayed) && is_aligned(in.norm.weight);
  if (!has_aligned_weights || !has_aligned_inputs) return launch_tiles<W, 1, false>(in, stream);
  return outputs < kWide ? launch_tiles<W, 1, true>(in, stream)
                         : launch_tiles<W, 2, true>(in, stream);
}

}  // namespace

Error multiply_on_tensor_cores(const Product& in, Stream stream) {
  return in.matrix.type == WeightType::kInt8 ? launch_columns<int8_t>(in, stream)
                                             : launch_columns<BFloat16>(in, stream);
}

}  // namespace mblm::cuda
