// The transpose of a large matrix of floats: see transpose.h.
#include "cpu/transpose.h"

#include <algorithm>

#include "cpu/products.h"

namespace mblm::cpu {

MBLM_CLONES void transpose_matrix(const TransposeInput& in, float* to, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 16;  // written to a cache line of each row of `to`
  for (int64_t block = begin; block < end; ++block) {
    const int64_t column = block * kTransposeColumns;
    const int64_t columns = std::min(kTransposeColumns, in.columns - column);
    for (int64_t row = 0; row < in.rows; row += kRows) {
      transpose(std::min(kRows, in.rows - row), columns, in.from + row * in.row_stride + column,
                in.row_stride, to + column * in.rows + row, in.rows);
    }
  }
}

}  // namespace mblm::cpu
