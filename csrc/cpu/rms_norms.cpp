// RMSNorm of the activations, gated or with a causal shift: see rms_norms.h.
//
// A position is copied to buffers of whole lanes first, where types, shifts and the last channels
// make no difference: what is beyond them is zero.
#include "cpu/rms_norms.h"

#include <algorithm>
#include <vector>

#include "cpu/lanes.h"

namespace mblm::cpu {

// Buffers (padded D) for one position.
template <class C>
struct PositionBuffers {
  int64_t width;                  // D rounded up to lanes
  std::vector<C> x, silu, slope;  // x, shifted; silu(gate), 1 without a gate, and its derivative
  std::vector<C> grad, weight;

  template <class In>
  explicit PositionBuffers(const In& in)
      : width(padded(in.width)),
        x(width),
        silu(width, C(1)),
        slope(width),
        grad(width),
        weight(width) {
    std::copy_n(in.weight, in.width, weight.data());
  }
};

template <class T, class C>
MBLM_INLINE void read(const GatedRmsNormInput<T>& in, int64_t position, PositionBuffers<C>& own) {
  convert(in.x + position * in.x_stride, in.width, own.x.data());
  if (!in.gate) return;
  convert(in.gate + position * in.gate_stride, in.width, own.silu.data());
  for (int64_t c = 0; c < own.width; c += kLaneCount<C>) {
    const Lanes<C> gate = load(own.silu.data() + c);
    const Lanes<C> open = C(1) / (C(1) + exp(-gate));
    store(own.silu.data() + c, gate * open);
    store(own.slope.data() + c, open * (C(1) + gate * (C(1) - open)));
  }
}

template <class T>
MBLM_INLINE int64_t kept_width(const ShiftRmsNormInput<T>& in) {
  return in.shift ? in.width - in.width / 2 : in.width;
}

template <class T, class C>
MBLM_INLINE void read(const ShiftRmsNormInput<T>& in, int64_t position, PositionBuffers<C>& own) {
  const int64_t row = position / in.length, t = position % in.length, kept = kept_width(in);
  const T* x = in.x + row * in.x_row_stride + t * in.x_position_stride;
  C* const delayed = own.x.data() + kept;
  convert(x, kept, own.x.data());
  if (t > 0) {
    convert(x - in.x_position_stride + kept, in.width - kept, delayed);
  } else if (in.previous) {
    convert(in.previous + row * in.previous_row_stride, in.width - kept, delayed);
  } else {
    std::fill_n(delayed, in.width - kept, C(0));
  }
}

template <class T>
MBLM_INLINE compute_t<T> inverse_of(const GatedRmsNormInput<T>& in, double mean_square) {
  return compute_t<T>(1 / std::sqrt(mean_square + in.eps));
}

template <class T>
MBLM_INLINE compute_t<T> inverse_of(const ShiftRmsNormInput<T>& in, double mean_square) {
  using C = compute_t<T>;
  const C norm = C(std::sqrt(mean_square)), eps = C(in.eps);
  return C(1) / (norm < eps ? eps : norm);  // NaN stays NaN
}

// Where eps bounds the norm, nothing goes through it.
template <class T>
MBLM_INLINE bool is_bounded(const GatedRmsNormInput<T>&, compute_t<T>) {
  return false;
}

template <class T>
MBLM_INLINE bool is_bounded(const ShiftRmsNormInput<T>& in, compute_t<T> inverse) {
  using C = compute_t<T>;
  return inverse >= C(1) / C(in.eps);
}

template <class T, class C>
MBLM_INLINE void write(const GatedRmsNormInput<T>& in, int64_t position, const C* to_x,
                       const C* to_gate, T* grad_x, T* grad_gate) {
  convert(to_x, in.width, grad_x + position * in.width);
  if (in.gate) convert(to_gate, in.width, grad_gate + position * in.width);
}

template <class T, class C>
MBLM_INLINE void write(const ShiftRmsNormInput<T>& in, int64_t position, const C* to_x, const C*,
                       T* grad_x, T* grad_previous) {
  const int64_t row = position / in.length, t = position % in.length, kept = kept_width(in);
  const int64_t delayed = in.width - kept;
  T* const to = grad_x + position * in.width;
  convert(to_x, kept, to);
  // The delayed half came from the position before; the last position's went nowhere.
  if (t > 0) {
    convert(to_x + kept, delayed, to - delayed);
  } else if (grad_previous) {
    convert(to_x + kept, delayed, grad_previous + row * delayed);
  }
  if (t == in.length - 1) std::fill_n(to + kept, delayed, T(0.0f));
}

template <template <class> class Input, class T>
MBLM_CLONES void rms_norm(const Input<T>& in, T* out, compute_t<T>* inverse_norm, int64_t begin,
                          int64_t end) {
  using C = compute_t<T>;
  PositionBuffers<C> own(in);
  C* const x = own.x.data();
  for (int64_t i = begin; i < end; ++i) {
    read(in, i, own);
    for (int64_t c = 0; c < own.width; c += kLaneCount<C>) {
      store(x + c, load(x + c) * load(own.silu.data() + c));
    }
    const C inverse = inverse_of(in, sum_of_squares(x, own.width) / double(in.width));
    inverse_norm[i] = inverse;
    for (int64_t c = 0; c < own.width; c += kLaneCount<C>) {
      store(x + c, load(x + c) * inverse * load(own.weight.data() + c));
    }
    convert(x, in.width, out + i * in.width);
  }
}

template <template <class> class Input, class T>
MBLM_CLONES void rms_norm_backward(const Input<T>& in, const T* grad,
                                   const compute_t<T>* inverse_norm, T* grad_x, T* grad_other,
                                   compute_t<T>* grad_weight, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  PositionBuffers<C> own(in);
  const C *x = own.x.data(), *silu = own.silu.data(), *slope = own.slope.data();
  const C* weight = own.weight.data();
  C* const g = own.grad.data();
  std::vector<C> sums(own.width), to_x(own.width), to_gate(own.width);
  for (int64_t i = begin; i < end; ++i) {
    read(in, i, own);
    convert(grad + i * in.width, in.width, g);
    const C inverse = inverse_norm[i];
    const double along = sum_in_lanes(own.width, [=](int64_t c) MBLM_INLINE_LAMBDA {
      return double(g[c] * weight[c]) * double(x[c] * silu[c]);
    });
    const C mean = is_bounded(in, inverse) ? C(0) : C(along * double(inverse) / double(in.width));
    for (int64_t c = 0; c < own.width; c += kLaneCount<C>) {
      const Lanes<C> out = load(g + c), value = load(x + c), gate = load(silu + c);
      const Lanes<C> normalized = value * gate * inverse;
      store(sums.data() + c, load(sums.data() + c) + out * normalized);
      const Lanes<C> of_gated = inverse * (out * load(weight + c) - normalized * mean);
      store(to_x.data() + c, of_gated * gate);
      store(to_gate.data() + c, of_gated * value * load(slope + c));
    }
    write(in, i, to_x.data(), to_gate.data(), grad_x, grad_other);
  }
  std::copy_n(sums.data(), in.width, grad_weight);
}

#define MBLM_INSTANTIATE_NORM(INPUT, T)                     \
  template decltype(rms_norm<INPUT, T>) rms_norm<INPUT, T>; \
  template decltype(rms_norm_backward<INPUT, T>) rms_norm_backward<INPUT, T>;
MBLM_INSTANTIATE_NORM(GatedRmsNormInput, float)
MBLM_INSTANTIATE_NORM(GatedRmsNormInput, double)
MBLM_INSTANTIATE_NORM(GatedRmsNormInput, BFloat16)
MBLM_INSTANTIATE_NORM(ShiftRmsNormInput, float)
MBLM_INSTANTIATE_NORM(ShiftRmsNormInput, double)
MBLM_INSTANTIATE_NORM(ShiftRmsNormInput, BFloat16)

}  // namespace mblm::cpu
