// Small matrix products in lanes, for operands that fit a core's cache.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace mblm::cpu {

// to (kRows, kVectors lanes) += a (kRows, depth) b (depth, kVectors lanes), in registers.
template <int kRows, int kVectors, class C>
MBLM_INLINE void add_product_block(int64_t depth, const C* a, int64_t a_row, int64_t a_column,
                                   const C* b, int64_t b_row, C* to, int64_t to_row) {
  Lanes<C> sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(to + r * to_row + v * kLaneCount<C>);
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int r = 0; r < kRows; ++r) {
      const C factor = a[r * a_row + k * a_column];
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] += load(b + k * b_row + v * kLaneCount<C>) * factor;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(to + r * to_row + v * kLaneCount<C>, sums[r][v]);
  }
}

template <int kRows, class C>
MBLM_INLINE void add_product_rows(int64_t columns, int64_t depth, const C* a, int64_t a_row,
                                  int64_t a_column, const C* b, int64_t b_row, C* to,
                                  int64_t to_row) {
  int64_t c = 0;
  for (; c + 2 * kLaneCount<C> <= columns; c += 2 * kLaneCount<C>) {
    add_product_block<kRows, 2>(depth, a, a_row, a_column, b + c, b_row, to + c, to_row);
  }
  for (; c < columns; c += kLaneCount<C>) {
    add_product_block<kRows, 1>(depth, a, a_row, a_column, b + c, b_row, to + c, to_row);
  }
}

constexpr int64_t kProductRows = 4;

// to (rows, columns) += a (rows, depth) b (depth, columns). a may have any strides; the rows of b
// and of to are contiguous and columns is a multiple of the lanes.
template <class C>
MBLM_INLINE void add_product(int64_t rows, int64_t columns, int64_t depth, const C* a,
                             int64_t a_row, int64_t a_column, const C* b, int64_t b_row, C* to,
                             int64_t to_row) {
  int64_t r = 0;
  for (; r + kProductRows <= rows; r += kProductRows) {
    add_product_rows<kProductRows>(columns, depth, a + r * a_row, a_row, a_column, b, b_row,
                                   to + r * to_row, to_row);
  }
  for (; r < rows; ++r) {
    add_product_rows<1>(columns, depth, a + r * a_row, a_row, a_column, b, b_row, to + r * to_row,
                        to_row);
  }
}

// to (columns, rows) = from (rows, columns), transposed.
template <class C>
MBLM_INLINE void transpose(int64_t rows, int64_t columns, const C* __restrict from,
                           int64_t from_row, C* __restrict to, int64_t to_row) {
  constexpr int64_t kBlock = 8;  // rows that are read together, one cache line of each
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t last = first + kBlock < rows ? first + kBlock : rows;
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = first; r < last; ++r) to[c * to_row + r] = from[r * from_row + c];
    }
  }
}

}  // namespace mblm::cpu
