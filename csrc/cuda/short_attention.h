// Rotary positions and causal attention of many short sequences on a GPU: the mathematics and the
// inputs are those of cpu/short_attention.h, for up to 64 keys.
#pragma once

#include "cpu/short_attention.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// Items are B * H. out is (B, S, H, d).
template <class T>
Error short_attention(const cpu::ShortAttentionInput<T>& in, int64_t items, T* out, Stream stream);

// grad_q is (B, S, H, d), grad_k and grad_v are (B, T, H, d).
template <class T>
Error short_attention_backward(const cpu::ShortAttentionInput<T>& in, int64_t items,
                               const cpu::HeadsView<T>& grad, T* grad_q, T* grad_k, T* grad_v,
                               Stream stream);

}  // namespace mblm::cuda
