// Sums over the positions of each token id: the gradients of embedding tables.
//
// First over the positions of each piece, then over the pieces of each id, both in order.
#pragma once

#include "cuda/groups.h"
#include "cuda/kernel.cuh"

namespace mblm::cuda {

// The id of a piece: the last whose pieces begin at or before it. There is one.
MBLM_DEVICE int64_t id_of_piece(const Groups& groups, int64_t piece) {
  int64_t low = 0, high = groups.num_ids;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (groups.pieces[middle] <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// sums (max_pieces, width): terms.add<N>(id, position, column, sum) adds the terms of one position
// to N columns. A warp takes N * 32 columns of a piece.
template <int N, class C, class Terms>
__global__ void __launch_bounds__(kThreads)
    sum_pieces(Groups groups, int64_t width, Terms terms, C* sums) {
  constexpr int64_t kColumns = N * kWarp;
  const int64_t tiles = (width + kColumns - 1) / kColumns;
  const int64_t items = groups.pieces[groups.num_ids] * tiles;
  for (int64_t item = first_item_of_warp(); item < items; item += warp_stride()) {
    const int64_t piece = quotient(item, tiles);
    const int64_t column = (item - piece * tiles) * kColumns + threadIdx.x % kWarp * N;
    if (column >= width) continue;
    const int64_t id = id_of_piece(groups, piece);
    const int64_t begin = groups.offsets[id] + (piece - groups.pieces[id]) * kPiecePositions;
    const int64_t stop = groups.offsets[id + 1];
    const int64_t end = begin + kPiecePositions < stop ? begin + kPiecePositions : stop;
    Pack<C, N> sum = {};
    MBLM_UNROLL
    for (int64_t k = begin; k < end; ++k) {
      terms.template add<N>(id, groups.order[k], column, sum.values);
    }
    store_pack(sums + piece * width + column, sum);
  }
}

// table (num_ids, width): the sums over each id's pieces, zeros for one id. A block takes 32
// columns of an id, its warps every eighth piece.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_ids(Groups groups, int64_t width, int64_t zero_id, const compute_t<T>* sums, T* table) {
  __shared__ double parts[kWarps][kWarp];
  const int64_t tiles = (width + kWarp - 1) / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t item = blockIdx.x; item < groups.num_ids * tiles; item += gridDim.x) {
    const int64_t id = quotient(item, tiles), column = (item - id * tiles) * kWarp + lane;
    const int64_t end = id == zero_id || column >= width ? 0 : groups.pieces[id + 1];
    double sum = 0;
    MBLM_UNROLL
    for (int64_t piece = groups.pieces[id] + warp; piece < end; piece += kWarps) {
      sum += sums[piece * width + column];
    }
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < width) {
      for (int w = 1; w < kWarps; ++w) sum += parts[w][lane];
      table[id * width + column] = rounded<T>(compute_t<T>(sum));
    }
    __syncthreads();
  }
}

// Both in turn. `packed`: whether terms and widths allow for packs.
template <class T, class Terms>
Error sum_groups(const Groups& groups, int64_t width, int64_t zero_id, bool packed,
                 const Terms& terms, compute_t<T>* sums, T* table, Stream stream) {
  constexpr int N = kPackSize<T>;
  const int64_t items = groups.max_pieces() * divide_up(width, (packed ? N : 1) * kWarp);
  const auto kernel =
      packed ? sum_pieces<N, compute_t<T>, Terms> : sum_pieces<1, compute_t<T>, Terms>;
  return first_error(
      {launch(kernel, divide_up(items, kWarps), kThreads, 0, stream, groups, width, terms, sums),
       launch(sum_ids<T>, groups.num_ids * divide_up(width, kWarp), kThreads, 0, stream, groups,
              width, zero_id, sums, table)});
}

}  // namespace mblm::cuda
