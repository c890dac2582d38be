// What a block does of a product on tensor cores: see decode_product_mma.cu.
#pragma once

#include "cuda/attend_short.cuh"
#include "cuda/cluster.cuh"
#include "cuda/copy_async.cuh"
#include "cuda/decode_product_inputs.cuh"
#include "cuda/mma.cuh"

namespace mblm::cuda {

// How blocks share out a product, and what lies where in their memory.
struct Layout {
  int items = 0, passes = 0;  // of columns and rows; over the rows
  int splits = 1;             // of the inputs
  int split_inputs = 0;
  int chunk = 0;  // inputs that there is room for
  // Bytes ahead of what a block has in its shared memory. Packs come first.
  int inputs_at = 0, sums_at = 0, totals_at = 0, squares_at = 0, attended_at = 0;
};

template <class T>
MBLM_DEVICE T* shared_at(int bytes) {
  return reinterpret_cast<T*>(shared_memory<unsigned char>() + bytes);
}

// Four weights as a lane's piece of a product.
MBLM_DEVICE void piece_of(const uint32_t (&quad)[2], uint32_t (&piece)[2]) {
  MBLM_UNROLL_ALL
  for (int i = 0; i < 2; ++i) piece[i] = quad[i];
}
MBLM_DEVICE void piece_of(const uint32_t (&quad)[1], uint32_t (&piece)[2]) {
  piece[0] = pair_of_bytes(__byte_perm(quad[0], 0, 0x4140));
  piece[1] = pair_of_bytes(__byte_perm(quad[0], 0, 0x4342));
}

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
        count(int(in.rows) - first_row < kRows ? int(in.rows) - first_row : kRows),
        inputs(product, first_row, count) {
    MBLM_UNROLL_ALL
    for (int c = 0; c < kTiles; ++c) {
      const int column = first_column + first_of_warp() + c * kWidth + group();
      weights[c] = weights_of<W>(in, column < last_column ? column : last_column) + first_of_lane();
    }
  }

  // Asks for what no kernel writes of a split of the inputs.
  MBLM_DEVICE void begin_split(int split) {
    const int all = int(in.matrix.inputs);
    begin = split * layout.split_inputs;
    end = begin + layout.split_inputs < all ? begin + layout.split_inputs : all;
    MBLM_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) ask_for_packs(n);
    inputs.read_gains(begin, end);
  }

  // The sums of its columns, which then lie in shared memory, where no thread waits for them.
  MBLM_DEVICE void multiply_split() {
    MBLM_UNROLL_ALL
    for (float (&of_tile)[S::kSums][4] : sums) {
      for (float (&of_piece)[4] : of_tile) {
        for (float& sum : of_piece) sum = 0;
      }
    }
    inputs.begin_squares();
    int index = 0;  // of a group of packs
    for (int chunk = begin; chunk < end; chunk += S::kChunk) {
      if (chunk > begin) __syncthreads();  // all have multiplied the one before
      inputs.stage(pieces(), layout.chunk);
      __syncthreads();
      if (chunk + S::kChunk < end) {
        inputs.read_gains(chunk + S::kChunk, end);
        inputs.read(chunk + S::kChunk, end);
      }
      for (int g = 0; g < S::kChunk / S::kGroupInputs; ++g, ++index) {
        if (chunk + g * S::kGroupInputs >= end) break;
        wait_for_copies<kGroups - 1>();
        multiply_group(g, index);
        ask_for_packs(index + kGroups);
      }
    }
    if (S::kReusesMemory) __syncthreads();
    share_sums();
  }

  MBLM_DEVICE void share_squares(bool is_first) { inputs.share_squares(row_squares(), is_first); }
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
  MBLM_DEVICE void read_inputs() { inputs.read(begin, end); }
  // Has inputs be what attention gives; all blocks of the cluster have begun.
  MBLM_DEVICE void attend() {
    float* const attended = shared_at<float>(layout.attended_at);
    attend_in_cluster<int(kNarrowHead) / kWarp>(in.attention, attended);
    inputs.rows_at = attended;
  }

  const Product& in;
  const Layout& layout;
  const int first_row, first_column, last_column;
  const int count;  // of rows

 private:
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
  // (kGroups, kPacksOfGroup, kThreads)
  MBLM_DEVICE Words* packs(int index) const {
    return shared_at<Words>(0) + index % kGroups * (kPacksOfGroup * kThreads) + threadIdx.x;
  }
  // Of few rows (products, kRows, kSharers), else (products, sums, 2, kWarp).
  MBLM_DEVICE Piece* pieces() const { return shared_at<Piece>(layout.inputs_at); }
  // (kDeep, kRows, kStride)
  MBLM_DEVICE float* partial() const { return shared_at<float>(layout.sums_at); }
  // (kRows, kColumns), of many rows alone
  MBLM_DEVICE float* totals() const { return shared_at<float>(layout.totals_at); }
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

  Inputs<S, kRows> inputs;
  const W* weights[kTiles];  // of this lane
  int begin, end;            // of the inputs
  float sums[kTiles][S::kSums][4];
};

}  // namespace mblm::cuda
