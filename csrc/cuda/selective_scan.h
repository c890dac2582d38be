// Mamba-1's selective scan on a GPU: the mathematics and the inputs are those of
// cpu/selective_scan.h, with up to 128 padded states, and B and C at multiples of 16 bytes.
#pragma once

#include "cpu/selective_scan.h"
#include "cuda/stream.h"

namespace mblm::cuda {

constexpr int64_t kScanMaxStates = 128;

// state (rows, D, N) is the state before and becomes the one after; chunk_states (rows, chunks, D,
// N) get the state before each chunk; delta_sums (rows, chunks, D) is scratch.
template <class T>
Error selective_scan(const cpu::SelectiveScanInput<T>& in, T* y, cpu::compute_t<T>* state,
                     cpu::compute_t<T>* chunk_states, cpu::compute_t<T>* delta_sums, Stream stream);

// In how many parts of the channels the gradients of B and C are given.
int64_t selective_scan_parts(int64_t channels, int64_t padded_states);

// How many values of scratch for states the gradients need.
template <class T>
int64_t selective_scan_kept(const cpu::SelectiveScanInput<T>& in);

template <class T>
struct SelectiveScanGradients {
  using C = cpu::compute_t<T>;
  const C* chunk_states;  // of the forward pass
  const T* y;             // (rows, L, D), given
  C* state;               // (rows, D, N): of the state after, becomes that of the one before
  T* x;                   // (rows, L, D), set
  C* delta;               // the same
  C* rates;               // (rows, chunks, D, padded N), set: the sum over rows and chunks counts
  C* direct;              // (rows, chunks, D), likewise
  C* weight_in;           // (parts, rows, L, padded N), set: the sum over the parts counts
  C* weight_out;          // the same
  C* carries;             // scratch, (rows, chunks, D, N)
  C* delta_sums;          // scratch, (rows, chunks, D)
  C* kept;                // scratch
};

template <class T>
Error selective_scan_backward(const cpu::SelectiveScanInput<T>& in,
                              const SelectiveScanGradients<T>& grad, Stream stream);

}  // namespace mblm::cuda
