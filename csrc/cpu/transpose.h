// The transpose of a large matrix of floats.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

// Columns of `from` that are taken together: whole cache lines are read and written.
constexpr int64_t kTransposeColumns = 16;

struct TransposeInput {
  int64_t rows, columns;
  const float* from;  // (rows, columns), rows contiguous
  int64_t row_stride;

  int64_t blocks() const { return (columns + kTransposeColumns - 1) / kTransposeColumns; }
};

// Blocks of columns [begin, end) of `from` to rows of `to`, (columns, rows), contiguous.
void transpose_matrix(const TransposeInput& in, float* to, int64_t begin, int64_t end);

}  // namespace mblm::cpu
