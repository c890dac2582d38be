// Mamba-1's selective scan, forward and backward.
//
// h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t, y_t = C_t h_t + D x_t, per row and channel.
// T is float, double or BFloat16; all but x, y and their gradients is in compute_t<T>.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

// Channels are worked on in tiles of this many.
constexpr int64_t kScanTile = 16;

// x, delta, y and their gradients are (rows, L, D), contiguous.
template <class T>
struct SelectiveScanInput {
  using C = compute_t<T>;
  int64_t rows, length, channels;
  int64_t states, padded_states;  // N, and N padded with zeros
  int64_t chunk_size;
  const T* x;
  const C* delta;
  const C* rates;       // A: (D, padded N)
  const C* weight_in;   // B: (rows, L, padded N)
  const C* weight_out;  // C: (rows, L, padded N)
  const C* direct;      // D: (D)
};

// Items [begin, end) of rows * tiles of channels. state (rows, D, N) is the state before and
// becomes the one after; chunk_states (rows, chunks, D, N) get the state before each chunk.
template <class T>
void selective_scan(const SelectiveScanInput<T>& in, T* y, compute_t<T>* state,
                    compute_t<T>* chunk_states, int64_t begin, int64_t end);

template <class T>
struct SelectiveScanGradients {
  using C = compute_t<T>;
  const T* y;     // given
  C* state;       // (rows, D, N): of the state after the chunk, becomes that of the one before
  T* x;           // set
  C* delta;       // set
  C* rates;       // (D, padded N), added to
  C* direct;      // (D), added to
  C* weight_in;   // (rows, positions of the chunk, padded N), added to
  C* weight_out;  // the same
};

// The gradients of one chunk for a range of rows and of channels; chunks are to be taken from the
// last to the first. The range of channels begins at a multiple of kScanTile.
template <class T>
void selective_scan_backward(const SelectiveScanInput<T>& in, const compute_t<T>* chunk_states,
                             int64_t chunk, const SelectiveScanGradients<T>& grad,
                             int64_t row_begin, int64_t row_end, int64_t channel_begin,
                             int64_t channel_end);

}  // namespace mblm::cpu
