// Sums of a matrix's rows: see sum_rows.h.
#include "cpu/sum_rows.h"

#include <algorithm>

#include "cpu/kernel.h"

namespace mblm::cpu {

template <class T>
MBLM_INLINE void sum_tile(const T* __restrict matrix, int64_t rows, int64_t row_stride,
                          T* __restrict out, int64_t columns) {
  double sums[kTileColumns] = {};
  for (int64_t r = 0; r < rows; ++r) {
    MBLM_NO_JAM;
    const T* __restrict row = matrix + r * row_stride;
    if (r + 1 < rows) prefetch(row + row_stride, columns);
    for (int64_t c = 0; c < columns; ++c) sums[c] += row[c];
  }
  for (int64_t c = 0; c < columns; ++c) out[c] = T(sums[c]);
}

template <class T>
MBLM_CLONES void sum_rows(const T* matrix, int64_t rows, int64_t row_stride, T* out, int64_t begin,
                          int64_t end) {
  for (int64_t c = begin; c < end; c += kTileColumns) {
    sum_tile(matrix + c, rows, row_stride, out + c, std::min(kTileColumns, end - c));
  }
}

MBLM_INSTANTIATE(sum_rows)

}  // namespace mblm::cpu
