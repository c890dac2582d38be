// Short depthwise causal convolution and SiLU on a GPU: the mathematics and the inputs are those of
// cpu/causal_conv.h.
#pragma once

#include "cpu/causal_conv.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// More taps K of float64 do not fit shared memory on the way back.
constexpr int64_t kConvMaxTaps = 24;

// y is (rows, L, D).
template <class T>
Error causal_conv(const cpu::CausalConvInput<T>& in, T* y, Stream stream);

// In how many parts the gradients of weight and bias are given.
template <class T>
int64_t causal_conv_parts(const cpu::CausalConvInput<T>& in);

// grad.weight_bias is (parts, K + 1, D): its sum over the parts is the gradient.
template <class T>
Error causal_conv_backward(const cpu::CausalConvInput<T>& in,
                           const cpu::CausalConvGradients<T>& grad, Stream stream);

}  // namespace mblm::cuda
