// RMSNorm of the activations, gated or with a causal shift, forward and backward.
//
// Over the D channels of each position, with w the weight and T float, double or BFloat16:
//   gated    g = x silu(gate), or x without a gate; out = g / sqrt(mean(g^2) + eps) * w
//   shifted  s[t] = concat(x[t, :h], x[t - 1, h:]), h = D - D / 2, or x without a shift;
//            out = s / max(norm(s) / sqrt(D), eps) * w
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

template <class T>
struct GatedRmsNormInput {
  int64_t width;  // D, at least 1
  const T* x;     // (positions, D), channels contiguous
  int64_t x_stride;
  const T* gate;  // the same; null for none
  int64_t gate_stride;
  const compute_t<T>* weight;  // (D)
  double eps;
};

template <class T>
struct ShiftRmsNormInput {
  int64_t length;  // S; positions are rows * S
  int64_t width;   // D, at least 1
  const T* x;      // (rows, S, D), channels contiguous
  int64_t x_row_stride;
  int64_t x_position_stride;
  const compute_t<T>* weight;  // (D)
  const T* previous;           // (rows, D / 2), channels contiguous; null for zeros
  int64_t previous_row_stride;
  bool shift;
  double eps;
};

// Positions [begin, end) of either input. out is (positions, D), inverse_norm (positions).
template <template <class> class Input, class T>
void rms_norm(const Input<T>& in, T* out, compute_t<T>* inverse_norm, int64_t begin, int64_t end);

// Positions [begin, end), of which grad_weight (D) is set to the sum. grad and grad_x are
// (positions, D), contiguous; so is grad_other, of the gate, or of what is shifted in, (rows,
// D / 2), or null without.
template <template <class> class Input, class T>
void rms_norm_backward(const Input<T>& in, const T* grad, const compute_t<T>* inverse_norm,
                       T* grad_x, T* grad_other, compute_t<T>* grad_weight, int64_t begin,
                       int64_t end);

}  // namespace mblm::cpu
