// Rows of channels that a warp shares: lane l holds the packs l, l + 32, ... of a row, whether they
// can be loaded at once or not, so that the order of a sum does not depend on how a row lies in
// memory.
#pragma once

#include "cuda/kernel.cuh"

namespace mblm::cuda {

// Channels [first, first + N) of a row, zeros beyond its end.
template <bool kAligned, int N, class T>
MBLM_DEVICE Pack<T, N> read_row(const T* row, int64_t width, int64_t first) {
  if constexpr (kAligned) {
    return load_pack<N>(row + first);
  } else {
    Pack<T, N> pack;
    for (int k = 0; k < N; ++k) {
      pack.values[k] = first + k < width ? row[first + k] : rounded<T>(0);
    }
    return pack;
  }
}

template <bool kAligned, int N, class T>
MBLM_DEVICE void write_row(T* row, int64_t width, int64_t first, const Pack<T, N>& pack) {
  if constexpr (kAligned) {
    store_pack(row + first, pack);
  } else {
    for (int k = 0; k < N && first + k < width; ++k) row[first + k] = pack.values[k];
  }
}

}  // namespace mblm::cuda
