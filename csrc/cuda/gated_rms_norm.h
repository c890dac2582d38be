// RMSNorm of the activations, gated or not, on a GPU: the mathematics and the inputs are those of
// cpu/gated_rms_norm.h, sums are in compute_t<T>.
#pragma once

#include "cpu/gated_rms_norm.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// out is (positions, D), inverse_norm (positions).
template <class T>
Error gated_rms_norm(const cpu::GatedRmsNormInput<T>& in, int64_t positions, T* out,
                     cpu::compute_t<T>* inverse_norm, Stream stream);

// In how many parts the gradient of the weight is given for so many positions.
int64_t gated_rms_norm_parts(int64_t positions);

// grad, grad_x and grad_gate (null without a gate) are (positions, D), contiguous. The sum of
// grad_weight (parts, D) over its parts is the gradient of the weight.
template <class T>
Error gated_rms_norm_backward(const cpu::GatedRmsNormInput<T>& in, int64_t positions, const T* grad,
                              const cpu::compute_t<T>* inverse_norm, T* grad_x, T* grad_gate,
                              cpu::compute_t<T>* grad_weight, Stream stream);

}  // namespace mblm::cuda
