// RMSNorm of the activations on a GPU, gated or not, or with a causal shift: the mathematics and
// the inputs are those of cpu/rms_norms.h, sums are in compute_t<T>.
#pragma once

#include "cpu/rms_norms.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// Of cpu::GatedRmsNormInput or cpu::ShiftRmsNormInput. out is (positions, D), inverse_norm
// (positions); positions are rows * S of what is shifted.
template <template <class> class Input, class T>
Error rms_norm(const Input<T>& in, int64_t positions, T* out, cpu::compute_t<T>* inverse_norm,
               Stream stream);

// In how many parts the gradient of the weight is given for so many positions.
int64_t rms_norm_parts(int64_t positions);

// grad and grad_x are (positions, D), contiguous; so is grad_other, of the gate, or of what is
// shifted in, (rows, D / 2), or null without. The sum of grad_weight (parts, D) over its parts is
// the gradient of the weight.
template <template <class> class Input, class T>
Error rms_norm_backward(const Input<T>& in, int64_t positions, const T* grad,
                        const cpu::compute_t<T>* inverse_norm, T* grad_x, T* grad_other,
                        cpu::compute_t<T>* grad_weight, Stream stream);

}  // namespace mblm::cuda
