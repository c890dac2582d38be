// Products of packed, rounded weights on tensor cores: see decode_product.h.
//
// A block takes some columns of all its rows. Its warps share out the inputs in slices of 32 and
// add up their sums at the end; with many rows, two of them each take a quarter of the columns,
// and the blocks of a cluster share out the inputs in splits. As it does not matter in which order
// a product takes the inputs, a lane multiplies packs of weights as they lie in memory, of columns
// that no other lane has, by quads of inputs that belong to them. Packs are copied to a place of
// the lane's own in shared memory: the first of them before the kernel waits for its inputs, so
// that memory works while kernels change. Then all threads load inputs at once, a chunk at a time,
// and put them into shared memory as the sums of two bfloat16 each, which are multiplied one after
// the other. A norm's factor is known by then and applied to the sums.
#include <algorithm>
#include <utility>

#include "cuda/decode_product_tiles.cuh"

namespace mblm::cuda {
namespace {

using cpu::WeightType;

constexpr int64_t kMostAttending = 4;  // rows; each cluster reads the caches of all of them

// What a thread writes: a column of some rows.
template <class Work>
class Results {
  using S = typename Work::S;

 public:
  MBLM_DEVICE explicit Results(const Work& of)
      : work(of),
        has_column(work.first_column + Work::of_column() <= work.last_column),
        column(work.in, has_column ? work.first_column + Work::of_column() : 0) {}

  // Asks for what kernels ahead have written, of the first row.
  MBLM_DEVICE void read() { next = read(0); }

  MBLM_DEVICE void write() {
    const Product& in = work.in;
    for (int i = 0; is_there(i); ++i) {
      const Read now = next;
      if (!S::kIsFew) next = read(i + 1);
      float sum = work.total_of(row_of(i));
      if (in.norm.weight) {
        sum *= factor_of(in.norm, work.squares_of(row_of(i)), in.matrix.inputs);
      }
      finish(in, column, work.first_row + row_of(i), sum, now.residual, now.is_left_out);
      if (S::kIsFew) break;  // there is but one
    }
  }

 private:
  struct Read {
    float residual = 0;
    bool is_left_out = false;
  };

  MBLM_DEVICE Read read(int i) const {
    const Product& in = work.in;
    const int64_t row = work.first_row + row_of(i);
    Read result;
    result.is_left_out = is_masked(in.positions, row, is_there(i));
    if (in.residual && is_there(i)) {
      result.residual = in.residual[row * column.outputs + column.index];
    }
    return result;
  }
  MBLM_DEVICE static int row_of(int i) {
    const int n = S::kIsFew ? i : i * cluster_size() + cluster_rank();
    return int(threadIdx.x / S::kColumns) + n * S::kRowsApart;
  }
  MBLM_DEVICE bool is_there(int i) const { return has_column && row_of(i) < work.count; }

  const Work& work;
  const bool has_column;
  const Column column;
  Read next;
};

template <class W, int kRows, int kTiles, bool kAttends>
__global__ void __launch_bounds__(kThreads, kRows* kTiles == 1 && !kAttends ? 3 : 2)
    product_of_tiles(Product in, Layout layout) {
  using Own = Work<W, kRows, kTiles>;
  constexpr bool kIsFew = kRows <= kFewRows;
  release_dependents();
  const int rank = kIsFew ? 0 : cluster_rank(), ranks = kIsFew ? 1 : cluster_size();
  for (int item = blockIdx.x / ranks; item < layout.items; item += gridDim.x / ranks) {
    Own work(in, layout, item);
    work.begin_split(rank);
    ask_ahead(in);
    if constexpr (kIsFew) {
      Results<Own> results(work);
      if constexpr (kAttends) cluster_barrier();
      wait_for_inputs();
      if constexpr (kAttends) work.attend();
      work.read_inputs();
      results.read();
      work.multiply_split();
      work.share_squares(true);
      __syncthreads();
      results.write();
      if (Own::S::kReusesMemory) __syncthreads();
    } else {
      wait_for_inputs();
      for (int split = rank;;) {
        work.read_inputs();
        work.multiply_split();
        work.share_squares(split == rank);
        __syncthreads();
        work.add_to_totals(split == rank);
        split += ranks;
        if (split >= layout.splits) break;
        __syncthreads();  // packs and inputs will lie where sums of warps have been
        work.begin_split(split);
      }
      Results<Own> results(work);
      results.read();
      cluster_barrier();
      results.write();
      cluster_barrier();  // the other blocks have read what this one has
    }
  }
}

template <class W, int kRows, int kTiles, bool kAttends = false>
Error launch_tiles(const Product& in, int splits, Stream stream) {
  using S = Shape<W, kRows, kTiles>;
  const int64_t outputs = in.matrix.outputs + in.second.outputs, inputs = in.matrix.inputs;
  Layout layout;
  constexpr int kWhole = S::kIsFew ? S::kGroupInputs : S::kChunk;
  layout.split_inputs = int(divide_up(divide_up(inputs, splits), kWhole)) * kWhole;
  layout.splits = int(divide_up(inputs, layout.split_inputs));
  layout.chunk = std::min(layout.split_inputs, S::kChunk);
  int shared = 0;
  const auto take = [&](int floats) {
    return std::exchange(shared, shared + floats * int(sizeof(float)));
  };
  shared = std::min(layout.split_inputs / S::kGroupInputs, kGroups) * S::kGroupBytes;
  layout.inputs_at = take(layout.chunk * kRows);
  layout.sums_at = S::kReusesMemory ? 0 : shared;
  shared = std::max(shared, layout.sums_at + S::kPartialBytes);
  layout.totals_at = take(S::kIsFew ? 0 : kRows * S::kColumns);
  layout.squares_at = take(kRows * S::kSharersOfRow);
  layout.attended_at = take(kAttends ? int(in.rows * inputs) : 0);
  layout.passes = int(divide_up(in.rows, kRows));
  layout.items = int(divide_up(outputs, S::kColumns)) * layout.passes;
  const auto kernel = product_of_tiles<W, kRows, kTiles, kAttends>;
  const auto launch = [&](int64_t clusters, int size) {
    return launch_clusters(kernel, clusters, size, kThreads, shared, stream, in, layout);
  };
  if (!kAttends) return launch(layout.items, layout.splits);
  // The last cluster is whole: all of its blocks attend.
  layout.items = int(divide_up(layout.items, kMostInCluster)) * kMostInCluster;
  return launch(layout.items / kMostInCluster, kMostInCluster);
}

template <class W>
Error launch_rows(const Product& in, Stream stream) {
  constexpr int64_t kBlocks = 128;  // about one for each multiprocessor
  const int64_t outputs = in.matrix.outputs + in.second.outputs;
  if (in.attention.heads > 0) {
    return in.rows == 1 ? launch_tiles<W, 1, 1, true>(in, 1, stream)
                        : launch_tiles<W, kFewRows, 1, true>(in, 1, stream);
  }
  // All blocks read the inputs of all rows: fewer, wider ones are better if there are enough.
  const bool is_wide = divide_up(outputs, 2 * kWidth) >= kBlocks;
  if (in.rows == 1) {
    return is_wide ? launch_tiles<W, 1, 2>(in, 1, stream) : launch_tiles<W, 1, 1>(in, 1, stream);
  }
  if (in.rows <= kFewRows) {
    return is_wide ? launch_tiles<W, kFewRows, 2>(in, 1, stream)
                   : launch_tiles<W, kFewRows, 1>(in, 1, stream);
  }
  const int64_t groups = divide_up(outputs, Shape<W, kManyRows, 4>::kColumns);
  const int64_t splits = std::clamp<int64_t>((kBlocks + kBlocks / 8) / groups, 1, kMostInCluster);
  return launch_tiles<W, kManyRows, 4>(in, int(splits), stream);
}

}  // namespace

bool attends(const Product& in, const CachedAttention& attention) {
#ifdef __CUDACC__
  if (!has_compute_90()) return false;
#endif
  // Each warp of a cluster takes one head at most. Two blocks then still fit a multiprocessor.
  return in.rows <= kMostAttending && in.rows * attention.heads <= kMostInCluster * kWarps &&
         in.matrix.type != WeightType::kFloat32 && attention.limit <= kShortCache &&
         attention.head_dim <= kNarrowHead;
}

Error multiply_on_tensor_cores(const Product& in, Stream stream) {
  return in.matrix.type == WeightType::kInt8 ? launch_rows<int8_t>(in, stream)
                                             : launch_rows<BFloat16>(in, stream);
}

}  // namespace mblm::cuda
