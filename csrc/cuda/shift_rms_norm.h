// Causal shift fused with RMSNorm on a GPU: the mathematics and the inputs are those of
// cpu/shift_rms_norm.h, sums are in compute_t<T>.
#pragma once

#include "cpu/shift_rms_norm.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// Positions [0, positions), rows * S. out is (rows, S, D), inverse_norm (rows, S).
template <class T>
Error shift_rms_norm(const cpu::ShiftRmsNormInput<T>& in, int64_t positions, T* out,
                     cpu::compute_t<T>* inverse_norm, Stream stream);

// In how many parts the gradient of the weight is given for so many positions.
int64_t shift_rms_norm_parts(int64_t positions);

// grad and grad_x are (rows, S, D), contiguous; grad_previous is (rows, D / 2), contiguous, or
// null. The sum of grad_weight (parts, D) over its parts is the gradient of the weight.
template <class T>
Error shift_rms_norm_backward(const cpu::ShiftRmsNormInput<T>& in, int64_t positions, const T* grad,
                              const cpu::compute_t<T>* inverse_norm, T* grad_x, T* grad_previous,
                              cpu::compute_t<T>* grad_weight, Stream stream);

}  // namespace mblm::cuda
