// RMSNorm of the activations, gated or not: see gated_rms_norm.h.
//
// A position is copied to buffers of whole lanes first, where types and the last channels make no
// difference: what is beyond them is zero.
#include "cpu/gated_rms_norm.h"

#include <algorithm>
#include <vector>

#include "cpu/lanes.h"

namespace mblm::cpu {

// Buffers (padded D) for one position.
template <class C>
struct PositionBuffers {
  int64_t width;                  // D rounded up to lanes
  std::vector<C> x, silu, slope;  // x; silu(gate) and its derivative
  std::vector<C> grad, weight;

  template <class T>
  explicit PositionBuffers(const GatedRmsNormInput<T>& in)
      : width(padded(in.width)),
        x(width),
        silu(width, C(1)),
        slope(width),
        grad(width),
        weight(width) {
    std::copy_n(in.weight, in.width, weight.data());
  }
};

// The buffers' x and silu(gate) at one position; without a gate silu stays 1.
template <class T, class C>
MBLM_INLINE void read_gated(const GatedRmsNormInput<T>& in, int64_t position,
                            PositionBuffers<C>& own) {
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
MBLM_CLONES void gated_rms_norm(const GatedRmsNormInput<T>& in, T* out, compute_t<T>* inverse_norm,
                                int64_t begin, int64_t end) {
  using C = compute_t<T>;
  PositionBuffers<C> own(in);
  C* const gated = own.x.data();
  for (int64_t i = begin; i < end; ++i) {
    read_gated(in, i, own);
    for (int64_t c = 0; c < own.width; c += kLaneCount<C>) {
      store(gated + c, load(gated + c) * load(own.silu.data() + c));
    }
    const double squares = sum_of_squares(gated, own.width);
    const C inverse = C(1 / std::sqrt(squares / double(in.width) + in.eps));
    inverse_norm[i] = inverse;
    for (int64_t c = 0; c < own.width; c += kLaneCount<C>) {
      store(gated + c, load(gated + c) * inverse * load(own.weight.data() + c));
    }
    convert(gated, in.width, out + i * in.width);
  }
}

template <class T>
MBLM_CLONES void gated_rms_norm_backward(const GatedRmsNormInput<T>& in, const T* grad,
                                         const compute_t<T>* inverse_norm, T* grad_x, T* grad_gate,
                                         compute_t<T>* grad_weight, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  PositionBuffers<C> own(in);
  const C *x = own.x.data(), *silu = own.silu.data(), *slope = own.slope.data();
  const C* weight = own.weight.data();
  C* const g = own.grad.data();
  std::vector<C> sums(own.width), to_x(own.width), to_gate(own.width);
  for (int64_t i = begin; i < end; ++i) {
    read_gated(in, i, own);
    convert(grad + i * in.width, in.width, g);
    const C inverse = inverse_norm[i];
    const double along = sum_in_lanes(own.width, [=](int64_t c) MBLM_INLINE_LAMBDA {
      return double(g[c] * weight[c]) * double(x[c] * silu[c]);
    });
    const C mean = C(along * double(inverse) / double(in.width));
    for (int64_t c = 0; c < own.width; c += kLaneCount<C>) {
      const Lanes<C> out = load(g + c), value = load(x + c), gate = load(silu + c);
      const Lanes<C> normalized = value * gate * inverse;
      store(sums.data() + c, load(sums.data() + c) + out * normalized);
      const Lanes<C> of_gated = inverse * (out * load(weight + c) - normalized * mean);
      store(to_x.data() + c, of_gated * gate);
      store(to_gate.data() + c, of_gated * value * load(slope + c));
    }
    convert(to_x.data(), in.width, grad_x + i * in.width);
    if (in.gate) convert(to_gate.data(), in.width, grad_gate + i * in.width);
  }
  std::copy_n(sums.data(), in.width, grad_weight);
}

MBLM_INSTANTIATE(gated_rms_norm)
MBLM_INSTANTIATE(gated_rms_norm_backward)

}  // namespace mblm::cpu
