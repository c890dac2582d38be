// Small matrix products in lanes, for operands that fit a core's cache.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"

namespace mblm::cpu {

// Two lanes of floats at once: for registers that hold them. Elsewhere they are much slower.
using WideLanes = float __attribute__((vector_size(2 * sizeof(FloatLanes))));

// to (kRows, kVectors of V) = keep * from + a (kRows, depth) b (depth, kVectors of V), in
// registers. from has to's strides and may be to; null stands for zeros.
template <class V, int kRows, int kVectors, class C>
MBLM_INLINE void product_block(int64_t depth, const C* a, int64_t a_row, int64_t a_column,
                               const C* b, int64_t b_row, C keep, const C* from, C* to,
                               int64_t to_row) {
  constexpr int64_t kValues = int64_t(sizeof(V) / sizeof(C));
  V sums[kRows][kVectors] = {};
  for (int r = 0; from && r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = keep * load<V>(from + r * to_row + v * kValues);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    V row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load<V>(b + k * b_row + v * kValues);
    for (int r = 0; r < kRows; ++r) {
      const C factor = a[r * a_row + k * a_column];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += row[v] * factor;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store<V>(to + r * to_row + v * kValues, sums[r][v]);
  }
}

// As many blocks of rows from the first on as fit; returns the first row that is left.
template <class V, int kRows, int kVectors, class C>
MBLM_INLINE int64_t product_rows(int64_t first, int64_t rows, int64_t depth, const C* a,
                                 int64_t a_row, int64_t a_column, const C* b, int64_t b_row, C keep,
                                 const C* from, C* to, int64_t to_row) {
  for (; first + kRows <= rows; first += kRows) {
    product_block<V, kRows, kVectors>(depth, a + first * a_row, a_row, a_column, b, b_row, keep,
                                      from ? from + first * to_row : nullptr, to + first * to_row,
                                      to_row);
  }
  return first;
}

// All rows of kVectors lanes of columns; the columns of b stay in the nearest cache meanwhile.
template <int kVectors, class C>
MBLM_INLINE void product_columns(int64_t rows, int64_t depth, const C* a, int64_t a_row,
                                 int64_t a_column, const C* b, int64_t b_row, C keep, const C* from,
                                 C* to, int64_t to_row) {
  using V = Lanes<C>;
  int64_t r = 0;
  if constexpr (kVectors == 2 && std::is_same_v<C, float>) {
    constexpr int kWideRows = 12;  // more than a register's sums take to come out
    if (MBLM_HAS_WIDE_REGISTERS) {
      r = product_rows<WideLanes, kWideRows, 1>(r, rows, depth, a, a_row, a_column, b, b_row, keep,
                                                from, to, to_row);
    }
  }
  r = product_rows<V, 6, kVectors>(r, rows, depth, a, a_row, a_column, b, b_row, keep, from, to,
                                   to_row);
  r = product_rows<V, 4, kVectors>(r, rows, depth, a, a_row, a_column, b, b_row, keep, from, to,
                                   to_row);
  product_rows<V, 1, kVectors>(r, rows, depth, a, a_row, a_column, b, b_row, keep, from, to,
                               to_row);
}

// to (rows, columns) = keep * from + a (rows, depth) b (depth, columns). a may have any strides;
// the rows of b, from and to are contiguous and columns is a multiple of the lanes. from has to's
// strides and may be to; null stands for zeros.
template <class C>
MBLM_INLINE void inline_product(int64_t rows, int64_t columns, int64_t depth, const C* a,
                                int64_t a_row, int64_t a_column, const C* b, int64_t b_row, C keep,
                                const C* from, C* to, int64_t to_row) {
  const auto at = [from](int64_t c) { return from ? from + c : nullptr; };
  int64_t c = 0;
  for (; c + 2 * kLaneCount<C> <= columns; c += 2 * kLaneCount<C>) {
    product_columns<2>(rows, depth, a, a_row, a_column, b + c, b_row, keep, at(c), to + c, to_row);
  }
  for (; c < columns; c += kLaneCount<C>) {
    product_columns<1>(rows, depth, a, a_row, a_column, b + c, b_row, keep, at(c), to + c, to_row);
  }
}

// The same, compiled once: as an inline function it would take most of the compiler's time. One of
// a's strides is 1.
template <class C>
void product(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t a_row,
             int64_t a_column, const C* b, int64_t b_row, C keep, const C* from, C* to,
             int64_t to_row);

// Rows to take at a time where a triangle is cut into products.
constexpr int64_t kProductRows = 4;

// to += a b.
template <class C>
MBLM_INLINE void add_product(int64_t rows, int64_t columns, int64_t depth, const C* a,
                             int64_t a_row, int64_t a_column, const C* b, int64_t b_row, C* to,
                             int64_t to_row) {
  product(rows, columns, depth, a, a_row, a_column, b, b_row, C(1), static_cast<const C*>(to), to,
          to_row);
}

// to = a b.
template <class C>
MBLM_INLINE void set_product(int64_t rows, int64_t columns, int64_t depth, const C* a,
                             int64_t a_row, int64_t a_column, const C* b, int64_t b_row, C* to,
                             int64_t to_row) {
  product(rows, columns, depth, a, a_row, a_column, b, b_row, C(0), static_cast<const C*>(nullptr),
          to, to_row);
}

// to (8, 8) = from (8, 8), transposed.
template <class C>
MBLM_INLINE void transpose_block(const C* from, int64_t from_row, C* to, int64_t to_row) {
  for (int64_t c = 0; c < 8; ++c) {
    for (int64_t r = 0; r < 8; ++r) to[c * to_row + r] = from[r * from_row + c];
  }
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
// to (8, 8) = from (8, 8), transposed in registers, where the compiler can say so.
MBLM_INLINE void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row) {
  FloatLanes in[8], pairs[8], fours[8];
  for (int r = 0; r < 8; ++r) in[r] = load(from + r * from_row);
  // Of two rows, their values in turns; then pairs of values; then halves.
  for (int r = 0; r < 8; r += 2) {
    pairs[r] = __builtin_shufflevector(in[r], in[r + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[r + 1] = __builtin_shufflevector(in[r], in[r + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int r = 0; r < 8; r += 4) {
    for (int i = 0; i < 2; ++i) {
      const FloatLanes &a = pairs[r + i], &b = pairs[r + i + 2];
      fours[r + 2 * i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      fours[r + 2 * i + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int r = 0; r < 4; ++r) {
    const FloatLanes &a = fours[r], &b = fours[r + 4];
    store(to + r * to_row, FloatLanes(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)));
    store(to + (r + 4) * to_row,
          FloatLanes(__builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15)));
  }
}
#endif
#endif

// to (columns, rows) = from (rows, columns), transposed.
template <class C>
MBLM_INLINE void transpose(int64_t rows, int64_t columns, const C* from, int64_t from_row, C* to,
                           int64_t to_row) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t r = 0; r < whole_rows; r += 8) {
    for (int64_t c = 0; c < whole_columns; c += 8) {
      transpose_block(from + r * from_row + c, from_row, to + c * to_row + r, to_row);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      to[c * to_row + r] = from[r * from_row + c];
    }
  }
}

}  // namespace mblm::cpu
