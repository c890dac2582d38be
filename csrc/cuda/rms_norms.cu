// RMSNorm of rows that are made as they are read, and its gradients: see rms_norms.h. A warp takes
// a position; lane l holds the packs l, l + 32, ... of it, whether they can be loaded at once or
// not, so that the order of a sum does not depend on how a row lies in memory.
//
// Such rows are a class with an input `in` that has a width and a weight, and tells by at(i) of a
// position: read(first) gives N channels of it, whose k-th is value(k); write(first, those, their
// gradients); finish(lane), when all are written. inverse(mean) is one over the norm, from the mean
// of squares; is_bounded(inverse) where nothing goes through it.
#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/rms_norms.h"

namespace mblm::cuda {
namespace {

using cpu::GatedRmsNormInput;
using cpu::ShiftRmsNormInput;

// Channels [first, first + N) of a row, zeros beyond its end.
template <bool kAligned, int N, class T>
MBLM_DEVICE Pack<T, N> read_row(const T* row, int64_t width, int64_t first) {
  if constexpr (kAligned) {
    return load_pack<N>(row + first);
  } else {
    Pack<T, N> pack;
    for (int k = 0; k < N; ++k) {
      pack.values[k] = first + k < width ? row[first + k] : rounded<T>(0);
    }
    return pack;
  }
}

template <bool kAligned, int N, class T>
MBLM_DEVICE void write_row(T* row, int64_t width, int64_t first, const Pack<T, N>& pack) {
  if constexpr (kAligned) {
    store_pack(row + first, pack);
  } else {
    for (int k = 0; k < N && first + k < width; ++k) row[first + k] = pack.values[k];
  }
}

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

// Gated or not.
template <class T, bool kAligned>
struct GatedRows {
  using C = compute_t<T>;
  static constexpr int N = kPackSize<T>;
  static constexpr bool kPacked = kAligned;
  GatedRmsNormInput<T> in;
  T *grad_x = nullptr, *grad_other = nullptr;

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
      if (here.has_gate) write_row<kAligned>(rows.grad_other + i * width, width, first, to_gate);
    }
    MBLM_DEVICE void finish(int64_t /* lane */) const {}
  };

  MBLM_DEVICE Position at(int64_t i) const { return {*this, i}; }
  MBLM_DEVICE C inverse(C mean) const { return C(1) / sqrt(mean + C(in.eps)); }
  MBLM_DEVICE bool is_bounded(C) const { return false; }
};

// Whether packs of channels can be loaded at once, and in which rows' class.
template <class T>
bool packs_fit(const GatedRmsNormInput<T>& in) {
  constexpr int64_t N = kPackSize<T>;
  return in.width % N == 0 && in.x_stride % N == 0 && in.gate_stride % N == 0 && is_aligned(in.x) &&
         is_aligned(in.gate) && is_aligned(in.weight);
}

// Shifted by a position or not. Aligned packs do not reach across the halves of a position.
template <class T, bool kAligned>
struct ShiftedRows {
  using C = compute_t<T>;
  static constexpr int N = kPackSize<T>;
  static constexpr bool kPacked = kAligned;
  ShiftRmsNormInput<T> in;
  T *grad_x = nullptr, *grad_other = nullptr;  // the latter of what is shifted in

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
      if (grad_other) position.grad_delayed = grad_other + row * (in.width - kept);
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

// The same, where they do not reach across the halves.
template <class T>
bool packs_fit(const ShiftRmsNormInput<T>& in) {
  constexpr int64_t N = kPackSize<T>;
  return ShiftedRows<T, true>{in}.kept_width() % N == 0 && in.width % N == 0 &&
         in.x_row_stride % N == 0 && in.x_position_stride % N == 0 &&
         in.previous_row_stride % N == 0 && is_aligned(in.x) && is_aligned(in.previous) &&
         is_aligned(in.weight);
}

template <bool kAligned, class T>
GatedRows<T, kAligned> rows_of(const GatedRmsNormInput<T>& in, T* grad_x, T* grad_other) {
  return {in, grad_x, grad_other};
}
template <bool kAligned, class T>
ShiftedRows<T, kAligned> rows_of(const ShiftRmsNormInput<T>& in, T* grad_x, T* grad_other) {
  return {in, grad_x, grad_other};
}

constexpr int kNormWarps = 4;  // of a block

template <class Rows, class T, class C>
__global__ void __launch_bounds__(kNormWarps* kWarp, 1)  // else registers are spilled
    norm_forward(Rows rows, int64_t positions, T* out, C* inverse_norm) {
  constexpr int N = kPackSize<T>;
  const int64_t width = rows.in.width, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t i = int64_t(blockIdx.x) * kNormWarps + warp; i < positions;
       i += int64_t(gridDim.x) * kNormWarps) {
    const auto position = rows.at(i);
    C squares = 0;
    for (int64_t first = lane * N; first < width; first += kWarp * N) {
      const auto here = position.read(first);
      for (int k = 0; k < N; ++k) {
        const C value = here.value(k);
        squares += value * value;
      }
    }
    const C inverse = rows.inverse(warp_sum(squares) / C(width));
    if (lane == 0) inverse_norm[i] = inverse;

    for (int64_t first = lane * N; first < width; first += kWarp * N) {
      const auto here = position.read(first);
      const Pack<C, N> weight = read_row<Rows::kPacked, N>(rows.in.weight, width, first);
      Pack<T, N> result;
      for (int k = 0; k < N; ++k) {
        result.values[k] = rounded<T>(here.value(k) * inverse * weight.values[k]);
      }
      write_row<Rows::kPacked>(out + i * width, width, first, result);
    }
  }
}

// Each warp takes the positions of one part and sums their gradients of the weight, in shared
// memory if there is room for it.
template <class Rows, class T, class C>
__global__ void __launch_bounds__(kNormWarps* kWarp, 1)  // else registers are spilled
    norm_backward(Rows rows, int64_t positions, int64_t parts, bool in_shared, const T* grad,
                  const C* inverse_norm, C* grad_weight) {
  constexpr int N = kPackSize<T>;
  constexpr bool kPacked = Rows::kPacked;
  const int64_t width = rows.in.width, each = (positions + parts - 1) / parts;
  const int64_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t part = int64_t(blockIdx.x) * kNormWarps + warp; part < parts;
       part += int64_t(gridDim.x) * kNormWarps) {
    C* const own_grad = grad_weight + part * width;
    C* const sums = in_shared ? shared_memory<C>() + warp * width : own_grad;
    // A lane reads and writes the same channels of the sums all along: no barrier is needed.
    for (int64_t first = lane * N; first < width; first += kWarp * N) {
      write_row<false>(sums, width, first, Pack<C, N>{});
    }
    const int64_t end = (part + 1) * each < positions ? (part + 1) * each : positions;
    for (int64_t i = part * each; i < end; ++i) {
      const auto position = rows.at(i);
      C along = 0;
      for (int64_t first = lane * N; first < width; first += kWarp * N) {
        const auto here = position.read(first);
        const Pack<T, N> g = read_row<kPacked, N>(grad + i * width, width, first);
        const Pack<C, N> weight = read_row<kPacked, N>(rows.in.weight, width, first);
        for (int k = 0; k < N; ++k) {
          along += value_of(g.values[k]) * weight.values[k] * here.value(k);
        }
      }
      const C inverse = inverse_norm[i];
      const C mean = rows.is_bounded(inverse) ? C(0) : warp_sum(along) * inverse / C(width);

      for (int64_t first = lane * N; first < width; first += kWarp * N) {
        const auto here = position.read(first);
        const Pack<T, N> g = read_row<kPacked, N>(grad + i * width, width, first);
        const Pack<C, N> weight = read_row<kPacked, N>(rows.in.weight, width, first);
        Pack<C, N> sum = read_row<kPacked, N>(sums, width, first), of_values;
        for (int k = 0; k < N; ++k) {
          const C out = value_of(g.values[k]), normalized = here.value(k) * inverse;
          sum.values[k] += out * normalized;
          of_values.values[k] = inverse * (out * weight.values[k] - normalized * mean);
        }
        write_row<kPacked>(sums, width, first, sum);
        position.write(first, here, of_values);
      }
      position.finish(lane);
    }
    for (int64_t first = lane * N; in_shared && first < width; first += kWarp * N) {
      write_row<false>(own_grad, width, first, read_row<false, N>(sums, width, first));
    }
  }
}

template <class Rows, class T, class C>
Error launch_forward(const Rows& rows, int64_t positions, T* out, C* inverse_norm, Stream stream) {
  return launch(norm_forward<Rows, T, C>, divide_up(positions, kNormWarps), kNormWarps * kWarp, 0,
                stream, rows, positions, out, inverse_norm);
}

template <class Rows, class T, class C>
Error launch_backward(const Rows& rows, int64_t positions, const T* grad, const C* inverse_norm,
                      C* grad_weight, Stream stream) {
  constexpr size_t kMaxShared = 48 * 1024;
  const int64_t parts = rms_norm_parts(positions);
  const size_t sums = kNormWarps * size_t(rows.in.width) * sizeof(C);
  const bool in_shared = sums <= kMaxShared;
  return launch(norm_backward<Rows, T, C>, divide_up(parts, kNormWarps), kNormWarps * kWarp,
                in_shared ? sums : 0, stream, rows, positions, parts, in_shared, grad, inverse_norm,
                grad_weight);
}

}  // namespace

template <template <class> class Input, class T>
Error rms_norm(const Input<T>& in, int64_t positions, T* out, compute_t<T>* inverse_norm,
               Stream stream) {
  T* const none = nullptr;
  return packs_fit(in) && is_aligned(out)
             ? launch_forward(rows_of<true>(in, none, none), positions, out, inverse_norm, stream)
             : launch_forward(rows_of<false>(in, none, none), positions, out, inverse_norm, stream);
}

int64_t rms_norm_parts(int64_t positions) {
  constexpr int64_t kPositionsPerPart = 8, kMaxParts = 4096;
  return std::min(divide_up(positions, kPositionsPerPart), kMaxParts);
}

template <template <class> class Input, class T>
Error rms_norm_backward(const Input<T>& in, int64_t positions, const T* grad,
                        const compute_t<T>* inverse_norm, T* grad_x, T* grad_other,
                        compute_t<T>* grad_weight, Stream stream) {
  const bool aligned = packs_fit(in) && is_aligned(grad) && is_aligned(grad_x) &&
                       is_aligned(grad_other) && is_aligned(grad_weight);
  return aligned ? launch_backward(rows_of<true>(in, grad_x, grad_other), positions, grad,
                                   inverse_norm, grad_weight, stream)
                 : launch_backward(rows_of<false>(in, grad_x, grad_other), positions, grad,
                                   inverse_norm, grad_weight, stream);
}

#define MBLM_INSTANTIATE_NORM(Input, T)                     \
  template decltype(rms_norm<Input, T>) rms_norm<Input, T>; \
  template decltype(rms_norm_backward<Input, T>) rms_norm_backward<Input, T>;
MBLM_INSTANTIATE_NORM(GatedRmsNormInput, float)
MBLM_INSTANTIATE_NORM(GatedRmsNormInput, double)
MBLM_INSTANTIATE_NORM(GatedRmsNormInput, BFloat16)
MBLM_INSTANTIATE_NORM(ShiftRmsNormInput, float)
MBLM_INSTANTIATE_NORM(ShiftRmsNormInput, double)
MBLM_INSTANTIATE_NORM(ShiftRmsNormInput, BFloat16)
#undef MBLM_INSTANTIATE_NORM

}  // namespace mblm::cuda
