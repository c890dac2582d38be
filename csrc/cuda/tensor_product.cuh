// Matrix products in tiles on tensor cores, whose operands are computed as they are read.
#pragma once

#include "cuda/mma.cuh"

namespace mblm::cuda {

// As Tile of product.cuh, 64 x 64 sums of a block, of 128 threads here: a warp has 16 rows of them,
// a thread two, which it shares with its three neighbors. An entry of an operand is the sum of two
// bfloat16, which are multiplied one after the other, or it is one to begin with, which is quicker:
// sums are as exact as if entries had 16 bits. While a slice is multiplied, the next one is read.
class TensorTile {
 public:
  static constexpr int kSize = 64, kThreads = 128, kOwnRows = 2, kNeighbors = 4;
  static constexpr int kBlocks = 2;  // of a multiprocessor at least
  static constexpr size_t kSharedBytes = 2 * 4 * 64 * 12 * sizeof(uint32_t);

  // The tile's row that is this thread's r-th.
  MBLM_DEVICE static int row(int r) { return row(r, threadIdx.x); }
  // Whether this thread is the first of those that share its rows.
  MBLM_DEVICE static bool is_first() { return threadIdx.x % kNeighbors == 0; }

  // See Tile.
  template <bool kNextRows, bool kNextColumns, bool kExactLeft, bool kExactRight, class A, class B>
  MBLM_DEVICE void add(int begin, int end, A a, B b) {
    if (begin >= end) return;
    uint32_t* buffer = shared_memory<uint32_t>();
    uint32_t* other = buffer + 4 * kPlane;
    Slice<kExactLeft> left;
    Slice<kExactRight> right;
    const auto read = [&](int first) {
      const int thread = this_thread();
      left.template read<kNextRows>(thread, first, end, a);
      right.template read<kNextColumns>(thread, first, end, [&](int j, int k) { return b(k, j); });
    };
    const auto write = [&](uint32_t* to) {
      const int thread = this_thread();
      left.template write<kNextRows>(thread, to);
      right.template write<kNextColumns>(thread, to + 2 * kPlane);
    };
    read(begin);
    write(buffer);
    for (int first = begin + kDepth;; first += kDepth) {
      __syncthreads();
      if (first < end) read(first);
      multiply<kExactLeft, kExactRight>(buffer);
      if (first >= end) break;
      write(other);  // which all have multiplied before the barrier
      uint32_t* const filled = other;
      other = buffer;
      buffer = filled;
    }
    __syncthreads();
  }

  // Each sum += factor(i, j) times another tile's.
  template <class Factor>
  MBLM_DEVICE void add(const TensorTile& tile, Factor factor) {
    const int thread = this_thread(), first = thread % kNeighbors * 2;
    MBLM_UNROLL_ALL
    for (int n = 0; n < kTiles; ++n) {
      MBLM_UNROLL_ALL
      for (int e = 0; e < 4; ++e) {
        const int j = n * kWidth + first + e % 2;
        sums_[n][e] += factor(row(e / 2, thread), j) * tile.sums_[n][e];
      }
    }
  }

  // function(i, j, sum, r) for this thread's entries of the tile, i being its r-th row; sum may be
  // changed.
  template <class Function>
  MBLM_DEVICE void for_each(Function function) {
    const int thread = this_thread(), first = thread % kNeighbors * 2;
    MBLM_UNROLL_ALL
    for (int n = 0; n < kTiles; ++n) {
      MBLM_UNROLL_ALL
      for (int e = 0; e < 4; ++e) {
        function(row(e / 2, thread), n * kWidth + first + e % 2, sums_[n][e], e / 2);
      }
    }
  }

 private:
  static constexpr int kHeight = 8, kWidth = 8, kTiles = kSize / kWidth;
  static constexpr int kDepth = 16;            // of a slice
  static constexpr int kPairs = kDepth / 2;    // of entries next to each other in k
  static constexpr int kRow = kPairs + 4;      // in shared memory: lanes read different banks
  static constexpr int kPlane = kSize * kRow;  // of an operand's upper or lower halves
  static constexpr int kOwn = kSize * kPairs / kThreads;
  static_assert(kSharedBytes == 2 * 4 * kPlane * sizeof(uint32_t));

  // The thread's number, of which the compiler does not know that it is always the same: what
  // follows from it would stay in registers from one tile to the next.
  MBLM_DEVICE static int this_thread() {
    int thread = threadIdx.x;
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(thread));
#endif
    return thread;
  }

  MBLM_DEVICE static int row(int r, int thread) {
    return thread / kWarp * (kOwnRows * kHeight) + thread % kWarp / kNeighbors + r * kHeight;
  }

  // This thread's pairs of a slice of an operand (64, kDepth): sums of upper and lower halves.
  template <bool kExact>
  struct Slice {
    uint32_t upper[kOwn], lower[kExact ? 1 : kOwn];

    // Neighbors in i are read by neighboring threads, or neighbors in k.
    template <bool kNext>
    MBLM_DEVICE static int index(int thread, int n) {
      const int entry = thread + n * kThreads;
      return kNext ? entry % kSize : entry / kPairs;
    }
    template <bool kNext>
    MBLM_DEVICE static int pair(int thread, int n) {
      const int entry = thread + n * kThreads;
      return kNext ? entry / kSize : entry % kPairs;
    }

    template <bool kNext, class Entry>
    MBLM_DEVICE void read(int thread, int first, int end, Entry entry) {
      MBLM_UNROLL_ALL
      for (int n = 0; n < kOwn; ++n) {
        const int i = index<kNext>(thread, n);
        const int k = first + 2 * pair<kNext>(thread, n);
        // Loaded in any case, so that one load does not wait for the other.
        const float even = entry(i, k < end ? k : end - 1);
        const float odd = entry(i, k + 1 < end ? k + 1 : end - 1);
        const float one = k < end ? even : 0, two = k + 1 < end ? odd : 0;
        upper[n] = pair_of(one, two);
        if constexpr (!kExact) lower[n] = rest_of(one, two, upper[n]);
      }
    }
    template <bool kNext>
    MBLM_DEVICE void write(int thread, uint32_t* to) const {
      MBLM_UNROLL_ALL
      for (int n = 0; n < kOwn; ++n) {
        const int at = index<kNext>(thread, n) * kRow + pair<kNext>(thread, n);
        to[at] = upper[n];
        if constexpr (!kExact) to[kPlane + at] = lower[n];
      }
    }
  };

  template <bool kExactLeft, bool kExactRight>
  MBLM_DEVICE void multiply(const uint32_t* slice) {
    const int lane = threadIdx.x % kWarp;
    const uint32_t* const left = slice + row(0) * kRow + lane % kNeighbors;
    const uint32_t* const right = slice + 2 * kPlane + lane / kNeighbors * kRow + lane % kNeighbors;
    uint32_t a[2][4];
    MBLM_UNROLL_ALL
    for (int half = 0; half < (kExactLeft ? 1 : 2); ++half) {
      MBLM_UNROLL_ALL
      for (int i = 0; i < 4; ++i) {
        a[half][i] = left[half * kPlane + i % 2 * kHeight * kRow + i / 2 * 4];
      }
    }
    MBLM_UNROLL_ALL
    for (int n = 0; n < kTiles; ++n) {
      uint32_t b[2][2];
      MBLM_UNROLL_ALL
      for (int half = 0; half < (kExactRight ? 1 : 2); ++half) {
        MBLM_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          b[half][i] = right[half * kPlane + n * kWidth * kRow + i * 4];
        }
      }
      multiply_add(sums_[n], a[0], b[0]);
      if constexpr (!kExactLeft) multiply_add(sums_[n], a[1], b[0]);
      if constexpr (!kExactRight) multiply_add(sums_[n], a[0], b[1]);
    }
  }

  float sums_[kTiles][4] = {};
};

}  // namespace mblm::cuda
