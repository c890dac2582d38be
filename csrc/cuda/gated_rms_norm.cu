// RMSNorm of the activations, gated or not: see gated_rms_norm.h.
#include "cuda/gated_rms_norm.h"
#include "cuda/rms_norm.cuh"

namespace mblm::cuda {
namespace {

using cpu::GatedRmsNormInput;

// silu(gate) and its derivative; 1 and 0 without a gate.
template <class C>
struct Gate {
  C silu = 1, slope = 0;

  Gate() = default;
  MBLM_DEVICE explicit Gate(C gate) {
    const C open = C(1) / (C(1) + exp(-gate));
    silu = gate * open;
    slope = open * (C(1) + gate * (C(1) - open));
  }
};

// Rows for rms_norm.cuh.
template <class T, bool kAligned>
struct GatedRows {
  using C = compute_t<T>;
  static constexpr int N = kPackSize<T>;
  static constexpr bool kPacked = kAligned;
  GatedRmsNormInput<T> in;
  T *grad_x = nullptr, *grad_gate = nullptr;

  struct Channels {
    Pack<T, N> x, gate;
    bool has_gate;

    MBLM_DEVICE Gate<C> gate_of(int k) const {
      return has_gate ? Gate<C>(value_of(gate.values[k])) : Gate<C>();
    }
    MBLM_DEVICE C value(int k) const { return value_of(x.values[k]) * gate_of(k).silu; }
  };

  struct Position {
    const GatedRows& rows;
    int64_t i;

    MBLM_DEVICE Channels read(int64_t first) const {
      const GatedRmsNormInput<T>& in = rows.in;
      Channels here;
      here.x = read_row<kAligned, N>(in.x + i * in.x_stride, in.width, first);
      here.has_gate = in.gate != nullptr;
      if (in.gate) here.gate = read_row<kAligned, N>(in.gate + i * in.gate_stride, in.width, first);
      return here;
    }
    MBLM_DEVICE void write(int64_t first, const Channels& here, const Pack<C, N>& grad) const {
      const int64_t width = rows.in.width;
      Pack<T, N> to_x, to_gate;
      for (int k = 0; k < N; ++k) {
        const Gate<C> gate = here.gate_of(k);
        to_x.values[k] = rounded<T>(grad.values[k] * gate.silu);
        to_gate.values[k] = rounded<T>(grad.values[k] * value_of(here.x.values[k]) * gate.slope);
      }
      write_row<kAligned>(rows.grad_x + i * width, width, first, to_x);
      if (here.has_gate) write_row<kAligned>(rows.grad_gate + i * width, width, first, to_gate);
    }
    MBLM_DEVICE void finish(int64_t /* lane */) const {}
  };

  MBLM_DEVICE Position at(int64_t i) const { return {*this, i}; }
  MBLM_DEVICE C inverse(C mean) const { return C(1) / sqrt(mean + C(in.eps)); }
  MBLM_DEVICE bool is_bounded(C) const { return false; }
};

// Whether packs of channels can be loaded at once.
template <class T>
bool packs_fit(const GatedRmsNormInput<T>& in) {
  constexpr int64_t N = kPackSize<T>;
  return in.width % N == 0 && in.x_stride % N == 0 && in.gate_stride % N == 0 && is_aligned(in.x) &&
         is_aligned(in.gate) && is_aligned(in.weight);
}

}  // namespace

template <class T>
Error gated_rms_norm(const GatedRmsNormInput<T>& in, int64_t positions, T* out,
                     compute_t<T>* inverse_norm, Stream stream) {
  return packs_fit(in) && is_aligned(out)
             ? launch_forward(GatedRows<T, true>{in}, positions, out, inverse_norm, stream)
             : launch_forward(GatedRows<T, false>{in}, positions, out, inverse_norm, stream);
}

int64_t gated_rms_norm_parts(int64_t positions) {
  return parts_of_positions(positions);
}

template <class T>
Error gated_rms_norm_backward(const GatedRmsNormInput<T>& in, int64_t positions, const T* grad,
                              const compute_t<T>* inverse_norm, T* grad_x, T* grad_gate,
                              compute_t<T>* grad_weight, Stream stream) {
  const bool aligned = packs_fit(in) && is_aligned(grad) && is_aligned(grad_x) &&
                       is_aligned(grad_gate) && is_aligned(grad_weight);
  return aligned ? launch_backward(GatedRows<T, true>{in, grad_x, grad_gate}, positions, grad,
                                   inverse_norm, grad_weight, stream)
                 : launch_backward(GatedRows<T, false>{in, grad_x, grad_gate}, positions, grad,
                                   inverse_norm, grad_weight, stream);
}

#define MBLM_INSTANTIATE(T)                                                                 \
  template Error gated_rms_norm<T>(const GatedRmsNormInput<T>&, int64_t, T*, compute_t<T>*, \
                                   Stream);                                                 \
  template Error gated_rms_norm_backward<T>(const GatedRmsNormInput<T>&, int64_t, const T*, \
                                            const compute_t<T>*, T*, T*, compute_t<T>*, Stream)
MBLM_FOR_EACH_TYPE(MBLM_INSTANTIATE)
#undef MBLM_INSTANTIATE

}  // namespace mblm::cuda
