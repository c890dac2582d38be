// Matrix products in tiles, whose operands are computed as they are read.
#pragma once

#include "cuda/kernel.cuh"

namespace mblm::cuda {

// 64 x 64 sums in the registers of a block of 256 threads, 4 x 4 of them in each. A thread's are
// four rows and four columns next to each other; sixteen neighbors share their rows.
template <class C>
class Tile {
 public:
  static constexpr int kSize = 64, kThreads = 256, kOwnRows = 4, kNeighbors = 16;
  static constexpr int kBlocks = 1;  // of a multiprocessor at least
  static constexpr size_t kSharedBytes = 2 * 16 * (64 + 4) * sizeof(C);

  // The tile's row that is this thread's r-th.
  MBLM_DEVICE static int row(int r) { return threadIdx.x / kNeighbors * kOwn + r; }
  // Whether this thread is the first of those that share its rows.
  MBLM_DEVICE static bool is_first() { return threadIdx.x % kNeighbors == 0; }

  // The sums += a b over k of [begin, end): a(i, k) and b(k, j) give entries of the tile, zeros
  // beyond the matrices. Neighbors in i, or in j, lie next to each other in memory if the
  // template's arguments say so, else neighbors in k do. Whether the entries of an operand are
  // bfloat16 makes no difference here. The whole block must take part.
  template <bool kNextRows, bool kNextColumns, bool, bool, class A, class B>
  MBLM_DEVICE void add(int begin, int end, A a, B b) {
    C* const left = shared_memory<C>();
    C* const right = left + kDepth * kRow;
    for (int first = begin; first < end; first += kDepth) {
      for (int entry = threadIdx.x; entry < kSize * kDepth; entry += kThreads) {
        const int i = kNextRows ? entry % kSize : entry / kDepth;
        const int k = kNextRows ? entry / kSize : entry % kDepth;
        left[k * kRow + i] = first + k < end ? a(i, first + k) : C(0);
      }
      for (int entry = threadIdx.x; entry < kSize * kDepth; entry += kThreads) {
        const int j = kNextColumns ? entry % kSize : entry / kDepth;
        const int k = kNextColumns ? entry / kSize : entry % kDepth;
        right[k * kRow + j] = first + k < end ? b(first + k, j) : C(0);
      }
      __syncthreads();
      for (int k = 0; k < kDepth; ++k) {
        const Pack<C, kOwn> x = load_pack<kOwn>(left + k * kRow + row(0));
        const Pack<C, kOwn> y = load_pack<kOwn>(right + k * kRow + column());
        for (int i = 0; i < kOwn; ++i) {
          for (int j = 0; j < kOwn; ++j) sums_[i][j] += x.values[i] * y.values[j];
        }
      }
      __syncthreads();
    }
  }

  // Each sum += factor(i, j) times another tile's.
  template <class Factor>
  MBLM_DEVICE void add(const Tile& tile, Factor factor) {
    for_each([&](int i, int j, C& sum, int r) { sum += factor(i, j) * tile.sums_[r][j % kOwn]; });
  }

  // function(i, j, sum, r) for this thread's entries of the tile, i being its r-th row; sum may be
  // changed.
  template <class Function>
  MBLM_DEVICE void for_each(Function function) {
    MBLM_UNROLL_ALL
    for (int i = 0; i < kOwn; ++i) {
      MBLM_UNROLL_ALL
      for (int j = 0; j < kOwn; ++j) function(row(i), column() + j, sums_[i][j], i);
    }
  }

 private:
  static constexpr int kOwn = 4;
  static constexpr int kDepth = 16;          // of a slice
  static constexpr int kRow = kSize + kOwn;  // of a slice in shared memory
  static_assert(kSharedBytes == 2 * kDepth * kRow * sizeof(C));

  MBLM_DEVICE static int column() { return threadIdx.x % kNeighbors * kOwn; }

  C sums_[kOwn][kOwn] = {};
};

}  // namespace mblm::cuda
