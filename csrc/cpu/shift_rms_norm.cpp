// Causal shift fused with RMSNorm: see shift_rms_norm.h.
#include "cpu/shift_rms_norm.h"

#include <algorithm>

namespace mblm::cpu {

// Where the two halves of one shifted position lie.
template <class T>
struct Halves {
  const T* kept;     // kept_width channels
  const T* delayed;  // the others; null for zeros
};

template <class T>
MBLM_INLINE int64_t kept_width(const ShiftRmsNormInput<T>& in) {
  return in.shift ? in.width - in.width / 2 : in.width;
}

template <class T>
MBLM_INLINE Halves<T> halves_of(const ShiftRmsNormInput<T>& in, int64_t row, int64_t t) {
  const T* x = in.x + row * in.x_row_stride + t * in.x_position_stride;
  if (!in.shift) return {x, nullptr};
  if (t > 0) return {x, x - in.x_position_stride + kept_width(in)};
  return {x, in.previous ? in.previous + row * in.previous_row_stride : nullptr};
}

template <class T, class C>
MBLM_INLINE void scale(const T* __restrict s, const C* __restrict weight, C inverse,
                       T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = T(C(s[i]) * inverse * weight[i]);
}

template <class T>
MBLM_CLONES void shift_rms_norm(const ShiftRmsNormInput<T>& in, T* out, compute_t<T>* inverse_norm,
                                int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t kept = kept_width(in), delayed = in.width - kept;
  const C eps = C(in.eps);
  for (int64_t i = begin; i < end; ++i) {
    const Halves<T> s = halves_of(in, i / in.length, i % in.length);
    double squares = sum_of_squares(s.kept, kept);
    if (s.delayed) squares += sum_of_squares(s.delayed, delayed);
    const C norm = C(std::sqrt(squares / double(in.width)));
    const C inverse = C(1) / (norm < eps ? eps : norm);  // NaN stays NaN
    inverse_norm[i] = inverse;

    T* position = out + i * in.width;
    scale(s.kept, in.weight, inverse, position, kept);
    if (s.delayed) {
      scale(s.delayed, in.weight + kept, inverse, position + kept, delayed);
    } else {
      for (int64_t c = kept; c < in.width; ++c) position[c] = T(C(0) * inverse * in.weight[c]);
    }
  }
}

// Sum of grad * weight * s.
template <class T, class C>
MBLM_INLINE double dot(const T* __restrict grad, const C* __restrict weight, const T* __restrict s,
                       int64_t n) {
  return sum_in_lanes(n, [=](int64_t i) MBLM_INLINE_LAMBDA {
    return double(C(grad[i]) * weight[i]) * double(s[i]);
  });
}

// grad_s = inverse * (grad * weight - normalized * along); grad_weight += grad * normalized.
template <class T, class C>
MBLM_INLINE void backward_half(const T* __restrict grad, const C* __restrict weight,
                               const T* __restrict s, C inverse, C along, T* __restrict grad_s,
                               C* __restrict grad_weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const C g = C(grad[i]), normalized = C(s[i]) * inverse;
    grad_weight[i] += g * normalized;
    grad_s[i] = T(inverse * (g * weight[i] - normalized * along));
  }
}

template <class T>
MBLM_CLONES void shift_rms_norm_backward(const ShiftRmsNormInput<T>& in, const T* grad,
                                         const compute_t<T>* inverse_norm, T* grad_x,
                                         T* grad_previous, compute_t<T>* grad_weight, int64_t begin,
                                         int64_t end) {
  using C = compute_t<T>;
  const int64_t kept = kept_width(in), delayed = in.width - kept;
  const C bound = C(1) / C(in.eps);
  std::fill(grad_weight, grad_weight + in.width, C(0));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / in.length, t = i % in.length;
    const Halves<T> s = halves_of(in, row, t);
    const T* g = grad + i * in.width;
    const C inverse = inverse_norm[i];
    double along = dot(g, in.weight, s.kept, kept);
    if (s.delayed) along += dot(g + kept, in.weight + kept, s.delayed, delayed);
    // Where eps bounds the norm, nothing goes through it.
    const C mean = inverse >= bound ? C(0) : C(along * inverse / double(in.width));

    T* grad_position = grad_x + i * in.width;
    backward_half(g, in.weight, s.kept, inverse, mean, grad_position, grad_weight, kept);
    if (s.delayed) {
      // The delayed half came from the position before.
      T* source = t > 0 ? grad_position - in.width + kept : grad_previous + row * delayed;
      backward_half(g + kept, in.weight + kept, s.delayed, inverse, mean, source,
                    grad_weight + kept, delayed);
    }
    // The last position's went nowhere.
    if (t == in.length - 1) std::fill(grad_position + kept, grad_position + in.width, T(0.0f));
  }
}

MBLM_INSTANTIATE(shift_rms_norm)
MBLM_INSTANTIATE(shift_rms_norm_backward)

}  // namespace mblm::cpu
