// What a block does of a product on tensor cores: see decode_product_mma.cu.
#pragma once

#include "cuda/attend_short.cuh"
#include "cuda/cluster.cuh"
#include "cuda/copy_async.cuh"
#include "cuda/decode_product.cuh"
#include "cuda/mma.cuh"

namespace mblm::cuda {

constexpr int kWidth = 8, kHeight = 16;   // columns and rows of a product of pieces
constexpr int kSharers = 4;               // lanes that share a column
constexpr int kPack = 8;                  // weights of a lane next to each other
constexpr int kSlice = kSharers * kPack;  // inputs
constexpr int kSteps = kPack / kQuad;     // products of pieces in a slice
constexpr int kGroups = 4;                // of packs, that are on their way
constexpr int kPacksOfGroup = 4;          // of a lane
constexpr int kManyRows = 32;             // of a block, where there are more than a few

// What a block of so many rows does. With few of them, a piece of inputs holds their upper halves
// above the lower ones; else it holds either half of sixteen rows.
template <class W, int kRows, int kTiles>
struct Shape {
  static constexpr bool kIsFew = kRows <= kFewRows;
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

// How blocks share out a product, and what lies where in their memory.
struct Layout {
  int items = 0, passes = 0;  // of columns and rows; over the rows
  int splits = 1;             // of the inputs
  int split_inputs = 0;
  int chunk = 0;  // inputs that there is room for
  // Bytes ahead of inputs, sums and squares. Packs come first.
  int inputs_at = 0, sums_at = 0, squares_at = 0, attended_at = 0;
};

template <class T>
MBLM_DEVICE T* shared_at(int bytes) {
  return reinterpret_cast<T*>(shared_memory<unsigned char>() + bytes);
}

struct alignas(16) Piece {
  uint32_t pairs[4];
};

// Four weights as a lane's piece of a product.
MBLM_DEVICE void piece_of(const uint32_t (&quad)[2], uint32_t (&piece)[2]) {
  MBLM_UNROLL_ALL
  for (int i = 0; i < 2; ++i) piece[i] = quad[i];
}
MBLM_DEVICE void piece_of(const uint32_t (&quad)[1], uint32_t (&piece)[2]) {
  piece[0] = pair_of_bytes(__byte_perm(quad[0], 0, 0x4140));
  piece[1] = pair_of_bytes(__byte_perm(quad[0], 0, 0x4342));
}

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

// What a thread does for one item: some columns of some rows.
template <class W, int kRows, int kTiles>
class Work {
 public:
  using S = Shape<W, kRows, kTiles>;

  MBLM_DEVICE Work(const Product& product, const Layout& of, int item)
      : in(product),
        layout(of),
        first_row(item % of.passes * kRows),
        first_column(item / of.passes * S::kColumns),
        last_column(int(in.matrix.outputs + in.second.outputs) - 1),
        count(int(in.rows) - first_row < kRows ? int(in.rows) - first_row : kRows) {
    MBLM_UNROLL_ALL
    for (int c = 0; c < kTiles; ++c) {
      const int column = first_column + first_of_warp() + c * kWidth + group();
      weights[c] = weights_of<W>(in, column < last_column ? column : last_column) + first_of_lane();
    }
  }

  // Asks for what no kernel writes of a split of the inputs.
  MBLM_DEVICE void begin_split(int split) {
    const int inputs = int(in.matrix.inputs);
    begin = split * layout.split_inputs;
    end = begin + layout.split_inputs < inputs ? begin + layout.split_inputs : inputs;
    MBLM_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) ask_for_packs(n);
    read_gains(begin);
  }

  // The sums of its columns, which then lie in shared memory, where no thread waits for them.
  MBLM_DEVICE void multiply_split() {
    MBLM_UNROLL_ALL
    for (float (&of_tile)[S::kSums][4] : sums) {
      for (float (&of_piece)[4] : of_tile) {
        for (float& sum : of_piece) sum = 0;
      }
    }
    squares = 0;
    int index = 0;  // of a group of packs
    for (int chunk = begin; chunk < end; chunk += S::kChunk) {
      if (chunk > begin) __syncthreads();  // all have multiplied the one before
      stage_inputs();
      __syncthreads();
      if (chunk + S::kChunk < end) {
        read_gains(chunk + S::kChunk);
        read_inputs(chunk + S::kChunk);
      }
      for (int g = 0; g < S::kChunk / S::kGroupInputs; ++g, ++index) {
        if (chunk + g * S::kGroupInputs >= end) break;
        wait_for_copies<kGroups - 1>();
        multiply_group(g, index);
        ask_for_packs(index + kGroups);
      }
    }
    if (!S::kIsFew) __syncthreads();  // sums of warps lie where packs and inputs have been
    share_sums();
  }

  // Adds the squares of the inputs of a split, of all its lanes, to those of the splits before.
  MBLM_DEVICE void share_squares(bool is_first) {
    if (!in.norm.weight) return;
    float sum = squares;
    MBLM_UNROLL_ALL
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const bool is_added = offset >= kSharers && (S::kIsFew || offset < kSharers * kLoads);
      if (!is_added) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    const int row = row_of(group() % S::kRowsOfThread * S::kLoadsOfRow);
    if (row >= count || lane() != group() % S::kRowsOfThread * kSharers) return;
    float& total = row_squares()[S::kIsFew ? row * kWarps + warp() : row];
    total = (is_first ? 0 : total) + sum;
  }

  MBLM_DEVICE void add_to_totals(bool is_first) {
    for (int row = threadIdx.x / S::kColumns; row < count; row += S::kRowsApart) {
      float& total = totals()[row * S::kColumns + of_column()];
      total = (is_first ? 0 : total) + sum_of_warps(row);
    }
  }

  // The sum of this thread's column, and of the squares of all inputs.
  MBLM_DEVICE float total_of(int row) const {
    if constexpr (S::kIsFew) {
      return sum_of_warps(row);
    } else {
      float sum = 0;
      for (int r = 0; r < cluster_size(); ++r) {
        sum += load_of_rank(totals() + row * S::kColumns + of_column(), r);
      }
      return sum;
    }
  }
  MBLM_DEVICE float squares_of(int row) const {
    float sum = 0;
    if constexpr (S::kIsFew) {
      MBLM_UNROLL_ALL
      for (int w = 0; w < kWarps; ++w) sum += row_squares()[row * kWarps + w];
    } else {
      for (int r = 0; r < cluster_size(); ++r) sum += load_of_rank(row_squares() + row, r);
    }
    return sum;
  }

  MBLM_DEVICE static int of_column() { return threadIdx.x % S::kColumns; }
  MBLM_DEVICE void read_inputs() { read_inputs(begin); }
  // Has inputs be what attention gives; all blocks of the cluster have begun.
  MBLM_DEVICE void attend() {
    float* const attended = shared_at<float>(layout.attended_at);
    attend_in_cluster<int(kNarrowHead) / kWarp>(in.attention, attended);
    rows_at = attended;
  }

  const Product& in;
  const Layout& layout;
  const int first_row, first_column, last_column;
  const int count;  // of rows
  const float* rows_at = in.x;

 private:
  static constexpr int kLoads = S::kLoads;
  struct alignas(kQuad * sizeof(W)) Quad {
    uint32_t words[kQuad * sizeof(W) / 4];
  };
  struct alignas(kPack * sizeof(W)) Words {
    Quad quads[kSteps];
  };

  MBLM_DEVICE static int lane() { return threadIdx.x % kWarp; }
  MBLM_DEVICE static int warp() { return threadIdx.x / kWarp; }
  MBLM_DEVICE static int group() { return threadIdx.x % kWarp / kSharers; }
  MBLM_DEVICE static int part() { return threadIdx.x % kSharers; }
  MBLM_DEVICE static int deep() { return warp() % S::kDeep; }
  MBLM_DEVICE static int first_of_warp() { return warp() / S::kDeep * kTiles * kWidth; }
  // Of a group's inputs.
  MBLM_DEVICE static int first_of_lane() { return deep() * kSlice + part() * kPack; }
  // The row and the place in it of this thread's i-th quad of a chunk.
  MBLM_DEVICE static int row_of(int i) {
    return i / S::kLoadsOfRow * S::kRowStep + (S::kIsFew ? 0 : warp());
  }
  MBLM_DEVICE static int quad_of(int i) {
    return S::kIsFew ? int(threadIdx.x) + i % S::kLoadsOfRow * kThreads : lane();
  }

  // (kGroups, kPacksOfGroup, kThreads)
  MBLM_DEVICE Words* packs(int index) const {
    return shared_at<Words>(0) + index % kGroups * (kPacksOfGroup * kThreads) + threadIdx.x;
  }
  // Of few rows (products, kRows, kSharers), else (products, sums, 2, kWarp).
  MBLM_DEVICE Piece* pieces() const { return shared_at<Piece>(layout.inputs_at); }
  // (kDeep, kRows, kStride)
  MBLM_DEVICE float* partial() const { return shared_at<float>(S::kIsFew ? layout.sums_at : 0); }
  // (kRows, kColumns), of many rows alone
  MBLM_DEVICE float* totals() const { return shared_at<float>(layout.sums_at); }
  // (kRows, kSharersOfRow)
  MBLM_DEVICE float* row_squares() const { return shared_at<float>(layout.squares_at); }

  MBLM_DEVICE void ask_for_packs(int index) {
    const int first = begin + index * S::kGroupInputs;
    MBLM_UNROLL_ALL
    for (int s = 0; s < S::kSlicesOfGroup; ++s) {
      if (first >= end) break;
      const int k = first + s * S::kDeep * kSlice;
      MBLM_UNROLL_ALL
      for (int c = 0; c < kTiles; ++c) {
        copy_async<sizeof(Words)>(packs(index) + (s * kTiles + c) * kThreads, weights[c] + k,
                                  k + first_of_lane() < end);
      }
    }
    end_of_copies();
  }

  MBLM_DEVICE void read_gains(int chunk) {
    MBLM_UNROLL_ALL
    for (int i = 0; i < S::kLoadsOfRow; ++i) {
      const int k = chunk + quad_of(i) * kQuad;
      gains[i] = {{1, 1, 1, 1}};
      if (in.norm.weight && k < end) gains[i] = load_pack<kQuad>(in.norm.weight + k);
    }
  }

  MBLM_DEVICE void read_inputs(int chunk) {
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
  MBLM_DEVICE void stage_inputs() {
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
        if (row_of(i) < count && int(quad) * kQuad < layout.chunk) {
          pieces()[(product * kRows + row_of(i)) * kSharers + sharer] = {
              {first.upper[0], first.lower[0], first.upper[1], first.lower[1]}};
        }
      } else if (i * kWarps < count) {
        const Halves second(x[i + 1]);
        Piece* const to =
            pieces() + (product * S::kSums + i / 2) * 2 * kWarp + warp() * kSharers + sharer;
        to[0] = {{first.upper[0], second.upper[0], first.upper[1], second.upper[1]}};
        to[kWarp] = {{first.lower[0], second.lower[0], first.lower[1], second.lower[1]}};
      }
    }
  }

  // The g-th group of a chunk.
  MBLM_DEVICE void multiply_group(int g, int index) {
    MBLM_UNROLL_ALL
    for (int s = 0; s < S::kSlicesOfGroup; ++s) {
      const int slice = (g * S::kSlicesOfGroup + s) * S::kDeep + deep();
      MBLM_UNROLL_ALL
      for (int step = 0; step < kSteps; ++step) {
        uint32_t right[kTiles][2];
        MBLM_UNROLL_ALL
        for (int c = 0; c < kTiles; ++c) {
          const Quad quad = packs(index)[(s * kTiles + c) * kThreads].quads[step];
          piece_of(quad.words, right[c]);
        }
        multiply_step(slice * kSteps + step, step, right);
      }
    }
  }

  MBLM_DEVICE void multiply_step(int product, int step, const uint32_t (&right)[kTiles][2]) {
    if constexpr (S::kIsFew) {
      Piece left = {};
      if (group() < count) left = pieces()[(product * kRows + group()) * kSharers + part()];
      MBLM_UNROLL_ALL
      for (int c = 0; c < kTiles; ++c) multiply_add(sums[c][step], left.pairs, right[c]);
    } else {
      MBLM_UNROLL_ALL
      for (int r = 0; r < S::kSums; ++r) {
        if (r * kHeight >= count) break;
        MBLM_UNROLL_ALL
        for (int half = 0; half < 2; ++half) {
          const Piece left = pieces()[((product * S::kSums + r) * 2 + half) * kWarp + lane()];
          MBLM_UNROLL_ALL
          for (int c = 0; c < kTiles; ++c) multiply_add(sums[c][r], left.pairs, right[c]);
        }
      }
    }
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

  MBLM_DEVICE void share_sums() {
    MBLM_UNROLL_ALL
    for (int c = 0; c < kTiles; ++c) {
      float* const to = partial() + deep() * kRows * S::kStride + first_of_warp() + c * kWidth;
      MBLM_UNROLL_ALL
      for (int e = 0; e < 2; ++e) {
        float* const of = to + group() * S::kStride + 2 * part() + e;
        if constexpr (S::kIsFew) {
          const float (&steps)[2][4] = sums[c];
          if (group() < kRows)
            of[0] = steps[0][e] + steps[0][2 + e] + steps[1][e] + steps[1][2 + e];
        } else {
          MBLM_UNROLL_ALL
          for (int r = 0; r < S::kSums; ++r) {
            if (r * kHeight >= count) break;
            of[r * kHeight * S::kStride] = sums[c][r][e];
            of[(r * kHeight + kHeight / 2) * S::kStride] = sums[c][r][2 + e];
          }
        }
      }
    }
  }

  MBLM_DEVICE float sum_of_warps(int row) const {
    float sum = 0;
    MBLM_UNROLL_ALL
    for (int d = 0; d < S::kDeep; ++d)
      sum += partial()[(d * kRows + row) * S::kStride + of_column()];
    return sum;
  }

  const W* weights[kTiles];  // of this lane
  int begin, end;            // of the inputs
  Pack<float, kQuad> x[kLoads], gains[S::kLoadsOfRow];
  float sums[kTiles][S::kSums][4], squares;
};

}  // namespace mblm::cuda
