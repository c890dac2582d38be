// Sums of a matrix's rows, in order and in double.
#pragma once

#include <cstdint>

namespace mblm::cpu {

// out[c] = the sum over r of matrix[r * row_stride + c], for columns [begin, end).
// T is float, double or BFloat16.
template <class T>
void sum_rows(const T* matrix, int64_t rows, int64_t row_stride, T* out, int64_t begin,
              int64_t end);

}  // namespace mblm::cpu
