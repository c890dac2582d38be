// RMSNorm of the activations, gated or not: see gated_rms_norm.h.
//
// A warp takes a position.
#include <algorithm>

#include "cuda/gated_rms_norm.h"
#include "cuda/kernel.cuh"
#include "cuda/rows.cuh"

namespace mblm::cuda {
namespace {

using cpu::GatedRmsNormInput;

constexpr int kWarps = 4;  // of a block

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

// x and the gates of channels [first, first + N) of a position.
template <class T, bool kAligned>
struct Gated {
  using C = compute_t<T>;
  static constexpr int N = kPackSize<T>;
  Pack<T, N> x, gate;
  bool has_gate;

  MBLM_DEVICE Gated(const GatedRmsNormInput<T>& in, int64_t position, int64_t first)
      : x(read_row<kAligned, N>(in.x + position * in.x_stride, in.width, first)),
        has_gate(in.gate != nullptr) {
    if (has_gate) {
      gate = read_row<kAligned, N>(in.gate + position * in.gate_stride, in.width, first);
    }
  }

  MBLM_DEVICE Gate<C> gate_of(int k) const {
    return has_gate ? Gate<C>(value_of(gate.values[k])) : Gate<C>();
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp)
    forward(GatedRmsNormInput<T> in, int64_t positions, T* out, compute_t<T>* inverse_norm) {
  using C = compute_t<T>;
  constexpr int N = kPackSize<T>;
  const int64_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + warp; i < positions;
       i += int64_t(gridDim.x) * kWarps) {
    C squares = 0;
    for (int64_t first = lane * N; first < in.width; first += kWarp * N) {
      const Gated<T, kAligned> here(in, i, first);
      for (int k = 0; k < N; ++k) {
        const C gated = value_of(here.x.values[k]) * here.gate_of(k).silu;
        squares += gated * gated;
      }
    }
    const C inverse = C(1) / sqrt(warp_sum(squares) / C(in.width) + C(in.eps));
    if (lane == 0) inverse_norm[i] = inverse;

    for (int64_t first = lane * N; first < in.width; first += kWarp * N) {
      const Gated<T, kAligned> here(in, i, first);
      const Pack<C, N> weight = read_row<kAligned, N>(in.weight, in.width, first);
      Pack<T, N> result;
      for (int k = 0; k < N; ++k) {
        const C gated = value_of(here.x.values[k]) * here.gate_of(k).silu;
        result.values[k] = rounded<T>(gated * inverse * weight.values[k]);
      }
      write_row<kAligned>(out + i * in.width, in.width, first, result);
    }
  }
}

// Each warp takes the positions of one part and sums their gradients of the weight.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp, 1)  // else registers are spilled
    backward(GatedRmsNormInput<T> in, int64_t positions, int64_t parts, const T* grad,
             const compute_t<T>* inverse_norm, T* grad_x, T* grad_gate, compute_t<T>* grad_weight) {
  using C = compute_t<T>;
  constexpr int N = kPackSize<T>;
  const int64_t width = in.width, each = (positions + parts - 1) / parts;
  const int64_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t part = int64_t(blockIdx.x) * kWarps + warp; part < parts;
       part += int64_t(gridDim.x) * kWarps) {
    // A lane reads and writes the same channels of the sums all along: no barrier is needed.
    C* sums = grad_weight + part * width;
    for (int64_t first = lane * N; first < width; first += kWarp * N) {
      write_row<kAligned>(sums, width, first, Pack<C, N>{});
    }
    const int64_t end = (part + 1) * each < positions ? (part + 1) * each : positions;
    for (int64_t i = part * each; i < end; ++i) {
      C along = 0;
      for (int64_t first = lane * N; first < width; first += kWarp * N) {
        const Gated<T, kAligned> here(in, i, first);
        const Pack<T, N> g = read_row<kAligned, N>(grad + i * width, width, first);
        const Pack<C, N> weight = read_row<kAligned, N>(in.weight, width, first);
        for (int k = 0; k < N; ++k) {
          along += value_of(g.values[k]) * weight.values[k] * value_of(here.x.values[k]) *
                   here.gate_of(k).silu;
        }
      }
      const C inverse = inverse_norm[i], mean = warp_sum(along) * inverse / C(width);

      for (int64_t first = lane * N; first < width; first += kWarp * N) {
        const Gated<T, kAligned> here(in, i, first);
        const Pack<T, N> g = read_row<kAligned, N>(grad + i * width, width, first);
        const Pack<C, N> weight = read_row<kAligned, N>(in.weight, width, first);
        Pack<C, N> sum = read_row<kAligned, N>(sums, width, first);
        Pack<T, N> to_x, to_gate;
        for (int k = 0; k < N; ++k) {
          const Gate<C> gate = here.gate_of(k);
          const C out = value_of(g.values[k]), value = value_of(here.x.values[k]);
          const C normalized = value * gate.silu * inverse;
          const C of_gated = inverse * (out * weight.values[k] - normalized * mean);
          sum.values[k] += out * normalized;
          to_x.values[k] = rounded<T>(of_gated * gate.silu);
          to_gate.values[k] = rounded<T>(of_gated * value * gate.slope);
        }
        write_row<kAligned>(sums, width, first, sum);
        write_row<kAligned>(grad_x + i * width, width, first, to_x);
        if (in.gate) write_row<kAligned>(grad_gate + i * width, width, first, to_gate);
      }
    }
  }
}

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
  const auto kernel = packs_fit(in) && is_aligned(out) ? forward<T, true> : forward<T, false>;
  return launch(kernel, divide_up(positions, kWarps), kWarps * kWarp, 0, stream, in, positions, out,
                inverse_norm);
}

int64_t gated_rms_norm_parts(int64_t positions) {
  constexpr int64_t kPositionsPerPart = 8, kMaxParts = 4096;
  return std::min(divide_up(positions, kPositionsPerPart), kMaxParts);
}

template <class T>
Error gated_rms_norm_backward(const GatedRmsNormInput<T>& in, int64_t positions, const T* grad,
                              const compute_t<T>* inverse_norm, T* grad_x, T* grad_gate,
                              compute_t<T>* grad_weight, Stream stream) {
  const bool aligned = packs_fit(in) && is_aligned(grad) && is_aligned(grad_x) &&
                       is_aligned(grad_gate) && is_aligned(grad_weight);
  const auto kernel = aligned ? backward<T, true> : backward<T, false>;
  const int64_t parts = gated_rms_norm_parts(positions);
  return launch(kernel, divide_up(parts, kWarps), kWarps * kWarp, 0, stream, in, positions, parts,
                grad, inverse_norm, grad_x, grad_gate, grad_weight);
}

#define MBLM_INSTANTIATE(T)                                                                 \
  template Error gated_rms_norm<T>(const GatedRmsNormInput<T>&, int64_t, T*, compute_t<T>*, \
                                   Stream);                                                 \
  template Error gated_rms_norm_backward<T>(const GatedRmsNormInput<T>&, int64_t, const T*, \
                                            const compute_t<T>*, T*, T*, compute_t<T>*, Stream)
MBLM_FOR_EACH_TYPE(MBLM_INSTANTIATE)
#undef MBLM_INSTANTIATE

}  // namespace mblm::cuda
