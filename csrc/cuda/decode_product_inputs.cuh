// Inputs of a product on tensor cores, as threads read them and lay them out for all: see
// decode_product_mma.cu.
#pragma once

#include "cuda/decode_product.cuh"
#include "cuda/mma.cuh"

namespace mblm::cuda {

constexpr int kWidth = 8, kHeight = 16;   // columns and rows of a product of pieces
constexpr int kSharers = 4;               // lanes that share a column
constexpr int kSlice = kSharers * kPack;  // inputs, of which a lane has a pack
constexpr int kSteps = kPack / kQuad;     // products of pieces in a slice
constexpr int kGroups = 4;                // of packs, that are on their way
constexpr int kPacksOfGroup = 4;          // of a lane
constexpr int kManyRows = 32;             // of a block, where there are more than a few

// What a block of so many rows does. With few of them, a piece of inputs holds their upper halves
// above the lower ones; else it holds either half of sixteen rows.
template <class W, int kRows, int kTiles>
struct Shape {
  static constexpr bool kIsFew = kRows <= kFewRows;
  static constexpr bool kReusesMemory = kRows > 1;  // sums lie where packs and inputs have been
  static constexpr int kWide = kIsFew ? 1 : 4, kDeep = kWarps / kWide;  // warps
  static constexpr int kColumns = kWide * kTiles * kWidth;
  static constexpr int kStride = kColumns + 4;                // lanes write to different banks
  static constexpr int kSums = kIsFew ? 2 : kRows / kHeight;  // of few rows, one for each step
  static constexpr int kSlicesOfGroup = kPacksOfGroup / kTiles;
  static constexpr int kGroupInputs = kSlicesOfGroup * kDeep * kSlice;
  // Quads of inputs that a thread loads at once, of so many rows, and the inputs that they are of.
  static constexpr int kLoads = kRows == 1 ? 2 : kIsFew ? kFewRows : kManyRows / kWarps;
  static constexpr int kLoadsOfRow = kIsFew ? kLoads / kRows : 1;
  static constexpr int kRowsOfThread = kLoads / kLoadsOfRow, kRowStep = kIsFew ? 1 : kWarps;
  static constexpr int kChunk = kLoads * kQuad * kThreads / kRows;
  static constexpr int kRowsApart = kThreads / kColumns;     // of a thread's results
  static constexpr int kSharersOfRow = kIsFew ? kWarps : 1;  // warps that load of a row
  static constexpr int kGroupBytes = kPacksOfGroup * kThreads * kPack * int(sizeof(W));
  static constexpr int kPartialBytes = kDeep * kRows * kStride * int(sizeof(float));
  static_assert(kChunk % kGroupInputs == 0);
};

struct alignas(16) Piece {
  uint32_t pairs[4];
};

// A quad of inputs: pairs of their upper halves, and of what then remains of them.
struct Halves {
  uint32_t upper[2], lower[2];

  MBLM_DEVICE explicit Halves(const Pack<float, kQuad>& quad) {
    MBLM_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      const float first = quad.values[2 * i], second = quad.values[2 * i + 1];
      upper[i] = pair_of(first, second);
      lower[i] = rest_of(first, second, upper[i]);
    }
  }
};

// What a thread reads of some rows, a chunk of inputs at a time.
template <class S, int kRows>
class Inputs {
 public:
  MBLM_DEVICE Inputs(const Product& product, int row, int count)
      : rows_at(product.x), in(product), first_row(row), count(count) {}

  MBLM_DEVICE void read_gains(int chunk, int end) {
    MBLM_UNROLL_ALL
    for (int i = 0; i < S::kLoadsOfRow; ++i) {
      const int k = chunk + quad_of(i) * kQuad;
      gains[i] = {{1, 1, 1, 1}};
      if (in.norm.weight && k < end) gains[i] = load_pack<kQuad>(in.norm.weight + k);
    }
  }

  MBLM_DEVICE void read(int chunk, int end) {
    const int half = int(in.matrix.inputs) / 2;
    MBLM_UNROLL_ALL
    for (int j = 0; j < S::kLoadsOfRow; ++j) {
      const int k = chunk + quad_of(j) * kQuad;
      const bool is_delayed = in.delayed && k >= half;
      const int64_t stride = is_delayed ? half : in.x_stride;
      const float* from = (is_delayed ? in.delayed : rows_at) + (is_delayed ? k - half : k);
      from += (first_row + row_of(0)) * stride;
      MBLM_UNROLL_ALL
      for (int r = 0; r < S::kRowsOfThread; ++r) {
        Pack<float, kQuad>& quad = x[r * S::kLoadsOfRow + j];
        quad = {};
        if (row_of(r * S::kLoadsOfRow) < count && k < end) quad = load_pack<kQuad>(from);
        from += S::kRowStep * stride;
      }
    }
  }

  // Puts what was read into shared memory, in pieces.
  MBLM_DEVICE void stage(Piece* pieces, int chunk_inputs) {
    float of_quads[kLoads] = {};
    MBLM_UNROLL_ALL
    for (int i = 0; i < kLoads; ++i) {
      MBLM_UNROLL_ALL
      for (int e = 0; e < kQuad; ++e) {
        float& value = x[i].values[e];
        of_quads[i] += value * value;
        value *= gains[i % S::kLoadsOfRow].values[e];
      }
    }
    if (in.norm.weight) add_squares(of_quads);
    MBLM_UNROLL_ALL
    for (int i = 0; i < kLoads; i += S::kIsFew ? 1 : 2) {
      const uint32_t quad = quad_of(i), slice = quad / (kSharers * kSteps);
      const uint32_t product = slice * kSteps + quad % kSteps, sharer = quad / kSteps % kSharers;
      const Halves first(x[i]);
      if constexpr (S::kIsFew) {
        if (row_of(i) < count && int(quad) * kQuad < chunk_inputs) {
          pieces[(product * kRows + row_of(i)) * kSharers + sharer] = {
              {first.upper[0], first.lower[0], first.upper[1], first.lower[1]}};
        }
      } else if (i * kWarps < count) {
        const Halves second(x[i + 1]);
        Piece* const to =
            pieces + (product * S::kSums + i / 2) * 2 * kWarp + warp() * kSharers + sharer;
        to[0] = {{first.upper[0], second.upper[0], first.upper[1], second.upper[1]}};
        to[kWarp] = {{first.lower[0], second.lower[0], first.lower[1], second.lower[1]}};
      }
    }
  }

  MBLM_DEVICE void begin_squares() { squares = 0; }

  // Adds the squares of the inputs of a split, of all its lanes, to those of the splits before.
  MBLM_DEVICE void share_squares(float* row_squares, bool is_first) {
    if (!in.norm.weight) return;
    float sum = squares;
    MBLM_UNROLL_ALL
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const bool is_added = offset >= kSharers && (S::kIsFew || offset < kSharers * kLoads);
      if (!is_added) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    const int row = row_of(group() % S::kRowsOfThread * S::kLoadsOfRow);
    if (row >= count || lane() != group() % S::kRowsOfThread * kSharers) return;
    float& total = row_squares[S::kIsFew ? row * kWarps + warp() : row];
    total = (is_first ? 0 : total) + sum;
  }

  const float* rows_at;  // where they are, but what is delayed

 private:
  static constexpr int kLoads = S::kLoads;

  MBLM_DEVICE static int lane() { return threadIdx.x % kWarp; }
  MBLM_DEVICE static int warp() { return threadIdx.x / kWarp; }
  MBLM_DEVICE static int group() { return threadIdx.x % kWarp / kSharers; }
  // The row and the place in it of this thread's i-th quad of a chunk.
  MBLM_DEVICE static int row_of(int i) {
    return i / S::kLoadsOfRow * S::kRowStep + (S::kIsFew ? 0 : warp());
  }
  MBLM_DEVICE static int quad_of(int i) {
    return S::kIsFew ? int(threadIdx.x) + i % S::kLoadsOfRow * kThreads : lane();
  }

  // Adds the squares of this thread's quads. Of one row, lanes that have the same part add up
  // theirs; of more, each lane keeps a row's, the (group % kRowsOfThread)-th, in the same order.
  MBLM_DEVICE void add_squares(float (&of_quads)[kLoads]) {
    if constexpr (kRows == 1) {
      MBLM_UNROLL_ALL
      for (float& sum : of_quads) {
        MBLM_UNROLL_ALL
        for (int offset = kWarp / 2; offset >= kSharers; offset /= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        squares += sum;
      }
    } else {
      MBLM_UNROLL_ALL
      for (int half = kLoads / 2; half > 0; half /= 2) {
        const bool is_upper = lane() & half * kSharers;
        MBLM_UNROLL_ALL
        for (int i = 0; i < half; ++i) {
          const float given = is_upper ? of_quads[i] : of_quads[i + half];
          const float kept = is_upper ? of_quads[i + half] : of_quads[i];
          of_quads[i] = kept + __shfl_xor_sync(0xffffffffu, given, half * kSharers);
        }
      }
      squares += of_quads[0];
    }
  }

  const Product& in;
  const int first_row, count;
  Pack<float, kQuad> x[kLoads], gains[S::kLoadsOfRow];
  float squares;
};

}  // namespace mblm::cuda
