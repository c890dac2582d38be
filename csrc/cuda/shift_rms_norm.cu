// Causal shift fused with RMSNorm: see shift_rms_norm.h.
#include "cuda/rms_norm.cuh"
#include "cuda/shift_rms_norm.h"

namespace mblm::cuda {
namespace {

using cpu::ShiftRmsNormInput;

// Rows for rms_norm.cuh. Aligned packs do not reach across the halves of a position.
template <class T, bool kAligned>
struct ShiftedRows {
  using C = compute_t<T>;
  static constexpr int N = kPackSize<T>;
  static constexpr bool kPacked = kAligned;
  ShiftRmsNormInput<T> in;
  T *grad_x = nullptr, *grad_previous = nullptr;

  struct Channels {
    Pack<T, N> x;

    MBLM_DEVICE C value(int k) const { return value_of(x.values[k]); }
  };

  // Where its two halves lie, and their gradients; null for zeros, and what goes nowhere.
  struct Position {
    int64_t width, kept_width;
    const T *kept, *delayed;
    T *grad_kept, *grad_delayed;
    bool is_last;

    MBLM_DEVICE Channels read(int64_t first) const {
      Channels here{};
      if constexpr (kAligned) {
        const T* const from = first < kept_width ? kept + first
                              : delayed          ? delayed + first - kept_width
                                                 : nullptr;
        if (from) here.x = load_pack<N>(from);
      } else {
        for (int k = 0; k < N; ++k) {
          const int64_t c = first + k;
          const bool zero = c >= width || (c >= kept_width && !delayed);
          if (!zero) here.x.values[k] = c < kept_width ? kept[c] : delayed[c - kept_width];
        }
      }
      return here;
    }
    MBLM_DEVICE void write(int64_t first, const Channels&, const Pack<C, N>& grad) const {
      constexpr int kAtOnce = kAligned ? N : 1;
      MBLM_UNROLL_ALL
      for (int k = 0; k < N; k += kAtOnce) {
        const int64_t c = first + k;
        if (c >= width) break;
        T* const to = c < kept_width ? grad_kept + c
                      : grad_delayed ? grad_delayed + c - kept_width
                                     : nullptr;
        Pack<T, kAtOnce> result;
        for (int j = 0; j < kAtOnce; ++j) result.values[j] = rounded<T>(grad.values[k + j]);
        if (to) store_pack(to, result);
      }
    }
    // The last position's delayed half goes nowhere.
    MBLM_DEVICE void finish(int64_t lane) const {
      for (int64_t c = kept_width + lane; is_last && c < width; c += kWarp) {
        grad_kept[c] = rounded<T>(0);
      }
    }
  };

  __host__ MBLM_DEVICE int64_t kept_width() const {
    return in.shift ? in.width - in.width / 2 : in.width;
  }
  MBLM_DEVICE Position at(int64_t i) const {
    const int64_t row = quotient(i, in.length), t = i - row * in.length, kept = kept_width();
    const T* const x = in.x + row * in.x_row_stride + t * in.x_position_stride;
    T* const grad = grad_x + i * in.width;
    Position position{in.width, kept, x, nullptr, grad, nullptr, t == in.length - 1};
    if (!in.shift) return position;
    // The delayed half comes from the position before, the first one's from outside.
    if (t > 0) {
      position.delayed = x - in.x_position_stride + kept;
      position.grad_delayed = grad - in.width + kept;
    } else {
      if (in.previous) position.delayed = in.previous + row * in.previous_row_stride;
      if (grad_previous) position.grad_delayed = grad_previous + row * (in.width - kept);
    }
    return position;
  }
  MBLM_DEVICE C inverse(C mean) const {
    const C eps = C(in.eps), norm = sqrt(mean);
    return C(1) / (norm < eps ? eps : norm);  // NaN stays NaN
  }
  // Where eps bounds the norm, nothing goes through it.
  MBLM_DEVICE bool is_bounded(C inverse) const { return inverse >= C(1) / C(in.eps); }
};

// Whether packs of channels can be loaded at once and do not reach across the halves.
template <class T>
bool packs_fit(const ShiftRmsNormInput<T>& in) {
  constexpr int64_t N = kPackSize<T>;
  return ShiftedRows<T, true>{in}.kept_width() % N == 0 && in.width % N == 0 &&
         in.x_row_stride % N == 0 && in.x_position_stride % N == 0 &&
         in.previous_row_stride % N == 0 && is_aligned(in.x) && is_aligned(in.previous) &&
         is_aligned(in.weight);
}

}  // namespace

template <class T>
Error shift_rms_norm(const ShiftRmsNormInput<T>& in, int64_t positions, T* out,
                     compute_t<T>* inverse_norm, Stream stream) {
  return packs_fit(in) && is_aligned(out)
             ? launch_forward(ShiftedRows<T, true>{in}, positions, out, inverse_norm, stream)
             : launch_forward(ShiftedRows<T, false>{in}, positions, out, inverse_norm, stream);
}

int64_t shift_rms_norm_parts(int64_t positions) {
  return parts_of_positions(positions);
}

template <class T>
Error shift_rms_norm_backward(const ShiftRmsNormInput<T>& in, int64_t positions, const T* grad,
                              const compute_t<T>* inverse_norm, T* grad_x, T* grad_previous,
                              compute_t<T>* grad_weight, Stream stream) {
  const bool aligned = packs_fit(in) && is_aligned(grad) && is_aligned(grad_x) &&
                       is_aligned(grad_previous) && is_aligned(grad_weight);
  return aligned ? launch_backward(ShiftedRows<T, true>{in, grad_x, grad_previous}, positions, grad,
                                   inverse_norm, grad_weight, stream)
                 : launch_backward(ShiftedRows<T, false>{in, grad_x, grad_previous}, positions,
                                   grad, inverse_norm, grad_weight, stream);
}

#define MBLM_INSTANTIATE(T)                                                                 \
  template Error shift_rms_norm<T>(const ShiftRmsNormInput<T>&, int64_t, T*, compute_t<T>*, \
                                   Stream);                                                 \
  template Error shift_rms_norm_backward<T>(const ShiftRmsNormInput<T>&, int64_t, const T*, \
                                            const compute_t<T>*, T*, T*, compute_t<T>*, Stream)
MBLM_FOR_EACH_TYPE(MBLM_INSTANTIATE)
#undef MBLM_INSTANTIATE

}  // namespace mblm::cuda
