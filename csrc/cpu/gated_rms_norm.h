// RMSNorm of the activations, gated or not, forward and backward.
//
// g = x silu(gate), or x without a gate, and out = g / sqrt(mean(g^2) + eps) * weight, over the D
// channels of each position. T is float, double or BFloat16.
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

// Positions [begin, end). out is (positions, D), inverse_norm (positions).
template <class T>
void gated_rms_norm(const GatedRmsNormInput<T>& in, T* out, compute_t<T>* inverse_norm,
                    int64_t begin, int64_t end);

// Positions [begin, end), of which grad_weight (D) is set to the sum. grad, grad_x and grad_gate
// (null without a gate) are (positions, D), contiguous.
template <class T>
void gated_rms_norm_backward(const GatedRmsNormInput<T>& in, const T* grad,
                             const compute_t<T>* inverse_norm, T* grad_x, T* grad_gate,
                             compute_t<T>* grad_weight, int64_t begin, int64_t end);

}  // namespace mblm::cpu
