// Mamba-2's state-space product (SSD), one chunk of positions, forward and backward.
//
// Per head h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t', y_t = h_t C_t + D x_t. T is float, double or
// BFloat16; all but x, y and their gradients is in compute_t<T>.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

template <class T>
struct SsdInput {
  using C = compute_t<T>;
  int64_t rows, length, heads, head_dim, states;  // N padded with zeros
  int64_t start, positions;                       // the chunk
  const T* x;                                     // (rows, L, H, P), heads and channels contiguous
  int64_t x_row_stride, x_position_stride;
  const C* dt;          // (rows, L, H)
  const C* rates;       // A: (H)
  const C* weight_in;   // B: (rows, L, N)
  const C* weight_out;  // C: (rows, L, N)
  const C* direct;      // D: (H)
  const C* scores;      // (rows, positions, padded positions): C_i B_j of the chunk

  // The number of positions rounded up to whole lanes.
  int64_t padded_positions() const { return padded(positions); }
};

// The scores of rows [begin, end); in.scores is not looked at.
template <class T>
void ssd_scores(const SsdInput<T>& in, compute_t<T>* scores, int64_t begin, int64_t end);

// States (rows, H, P, N), each row's contiguous.
template <class C>
struct SsdStates {
  C* data;
  int64_t row_stride;
};

// Items [begin, end) of rows * heads. y is (rows, L, H, P), set for the chunk's positions; before
// and after are the states at its ends.
template <class T>
void ssd(const SsdInput<T>& in, T* y, SsdStates<const compute_t<T>> before,
         SsdStates<compute_t<T>> after, int64_t begin, int64_t end);

template <class T>
struct SsdGradients {
  using C = compute_t<T>;
  const T* y;                 // (rows, L, H, P), contiguous, given
  SsdStates<const C> before;  // the states before the chunk, given
  C* state;   // (rows, H, P, N): of the state after the chunk, becomes that of the one before
  T* x;       // (rows, L, H, P), set
  C* dt;      // (rows, L, H), set
  C* rates;   // (rows, H), added to
  C* direct;  // (rows, H), added to
  // Set to the sum over the heads of one call, all of one row:
  C* scores;      // (positions, padded positions)
  C* weight_in;   // (positions, N), the part not through the scores
  C* weight_out;  // the same
};

// The gradients of one chunk, for heads [begin, end) of a row, at least one; chunks are to be taken
// from the last to the first.
template <class T>
void ssd_backward(const SsdInput<T>& in, const SsdGradients<T>& grad, int64_t row, int64_t begin,
                  int64_t end);

// The gradients of B and C at the chunk's positions of a row, (rows, L, N), from what groups of
// heads gave, (groups, positions, padded positions or N); the first group's is overwritten.
template <class T>
void ssd_backward_weights(const SsdInput<T>& in, int64_t groups, compute_t<T>* scores,
                          compute_t<T>* weight_in, compute_t<T>* weight_out, T* grad_in,
                          T* grad_out, int64_t row);

}  // namespace mblm::cpu
