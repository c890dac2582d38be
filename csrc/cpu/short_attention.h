// Rotary positions and causal attention of many short sequences, forward and backward.
//
// T is float, double or BFloat16; computed in compute_t<T>.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

// (B, positions, H, d), the d channels contiguous.
template <class T>
struct HeadsView {
  const T* data;
  int64_t row_stride, position_stride, head_stride;
};

template <class T>
struct ShortAttentionInput {
  int64_t heads, width;    // H and d
  int64_t queries, keys;   // S and T, S <= T: the queries are of the last positions of the keys
  HeadsView<T> q, k, v;    // (B, S, H, d), (B, T, H, d) twice
  const float *cos, *sin;  // (T, d / 2), or null
};

// Items [begin, end) of B * H. out is (B, S, H, d).
template <class T>
void short_attention(const ShortAttentionInput<T>& in, T* out, int64_t begin, int64_t end);

// The gradients for those items; grad_q is (B, S, H, d), grad_k and grad_v are (B, T, H, d).
template <class T>
void short_attention_backward(const ShortAttentionInput<T>& in, const HeadsView<T>& grad, T* grad_q,
                              T* grad_k, T* grad_v, int64_t begin, int64_t end);

}  // namespace mblm::cpu
