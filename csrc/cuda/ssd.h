// Mamba-2's state-space product (SSD) on a GPU, all chunks at once: the mathematics is that of
// cpu/ssd.h.
#pragma once

#include "cpu/ssd.h"
#include "cuda/stream.h"

namespace mblm::cuda {

template <class T>
struct SsdInput {
  using C = cpu::compute_t<T>;
  int64_t rows, length, heads, head_dim;
  int64_t states, padded_states;  // N, and N rounded up
  int64_t chunk_size, chunks;
  const T* x;  // (rows, L, H, P), heads and channels contiguous
  int64_t x_row_stride, x_position_stride;
  const C* dt;             // (rows, L, H)
  const C* rates;          // A: (H)
  const C* weight_in;      // B: (rows, L, padded N), values of type T
  const C* weight_out;     // C: (rows, L, padded N), the same
  const C* direct;         // D: (H)
  double* sums;            // scratch, (rows, L, H): of dt A, from a chunk's beginning
  C* scores;               // scratch, (rows, chunks, chunk_size, chunk_size): C_i B_j
  bool may_round = false;  // float's operands to 16 bits, for tensor cores; bfloat16's are rounded
};

// y is (rows, L, H, P); state (rows, H, P, N) is the state before and becomes the one after;
// chunk_states (rows, chunks, H, P, N) get the states before the chunks.
template <class T>
Error ssd(const SsdInput<T>& in, T* y, cpu::compute_t<T>* state, cpu::compute_t<T>* chunk_states,
          Stream stream);

template <class T>
struct SsdGradients {
  using C = cpu::compute_t<T>;
  const C* chunk_states;  // of the forward pass
  const T* y;             // (rows, L, H, P), contiguous, given
  C* state;               // (rows, H, P, N): of the state after, becomes that of the one before
  T* x;                   // (rows, L, H, P), set
  C* dt;                  // (rows, L, H), set
  C* rates;               // (rows, chunks, H), set: the sum over rows and chunks counts
  C* direct;              // the same
  C* weight_in;           // (rows, L, N), set
  C* weight_out;          // the same
  C* carries;             // scratch, (rows, chunks, H, P, N)
  C* scores;              // scratch, (rows, chunks, chunk_size, chunk_size)
  double* terms;          // scratch, (4, rows, L, H), zeros
};

template <class T>
Error ssd_backward(const SsdInput<T>& in, const SsdGradients<T>& grad, Stream stream);

}  // namespace mblm::cuda
