// Causal shift fused with RMSNorm, forward and backward.
//
// s[t] = concat(x[t, :h], x[t - 1, h:]), h = D - D / 2, out = s / max(norm(s) / sqrt(D), eps) * w.
// T is float, double or BFloat16.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

template <class T>
struct ShiftRmsNormInput {
  int64_t length;  // S
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

// Positions [begin, end) of rows * S. out is (rows, S, D), inverse_norm (rows, S).
template <class T>
void shift_rms_norm(const ShiftRmsNormInput<T>& in, T* out, compute_t<T>* inverse_norm,
                    int64_t begin, int64_t end);

// Positions [begin, end) of rows * S, of which grad_weight (D) is set to the sum. grad and grad_x
// are (rows, S, D), contiguous; grad_previous is (rows, D / 2), contiguous, or null.
template <class T>
void shift_rms_norm_backward(const ShiftRmsNormInput<T>& in, const T* grad,
                             const compute_t<T>* inverse_norm, T* grad_x, T* grad_previous,
                             compute_t<T>* grad_weight, int64_t begin, int64_t end);

}  // namespace mblm::cpu
