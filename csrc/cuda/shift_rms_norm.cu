// Causal shift fused with RMSNorm: see shift_rms_norm.h.
//
// A warp takes a position.
#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/rows.cuh"
#include "cuda/shift_rms_norm.h"

namespace mblm::cuda {
namespace {

using cpu::ShiftRmsNormInput;

constexpr int kWarps = 4;  // of a block

// Where the two halves of one shifted position lie.
template <class T>
struct Halves {
  const T* kept;     // kept_width channels
  const T* delayed;  // the others; null for zeros
};

template <class T>
__host__ MBLM_DEVICE int64_t kept_width(const ShiftRmsNormInput<T>& in) {
  return in.shift ? in.width - in.width / 2 : in.width;
}

template <class T>
MBLM_DEVICE Halves<T> halves_of(const ShiftRmsNormInput<T>& in, int64_t row, int64_t t) {
  const T* x = in.x + row * in.x_row_stride + t * in.x_position_stride;
  if (!in.shift) return {x, nullptr};
  if (t > 0) return {x, x - in.x_position_stride + kept_width(in)};
  return {x, in.previous ? in.previous + row * in.previous_row_stride : nullptr};
}

// Channels [first, first + N) of a shifted position, zeros beyond its end. Aligned packs do not
// reach across the halves.
template <bool kAligned, int N, class T>
MBLM_DEVICE Pack<T, N> read_shifted(const Halves<T>& s, int64_t kept, int64_t width,
                                    int64_t first) {
  Pack<T, N> pack;
  if constexpr (kAligned) {
    const T* from = first < kept ? s.kept + first : s.delayed ? s.delayed + first - kept : nullptr;
    if (from) return load_pack<N>(from);
    for (int k = 0; k < N; ++k) pack.values[k] = rounded<T>(0);
  } else {
    for (int k = 0; k < N; ++k) {
      const int64_t c = first + k;
      const bool zero = c >= width || (c >= kept && !s.delayed);
      pack.values[k] = zero ? rounded<T>(0) : c < kept ? s.kept[c] : s.delayed[c - kept];
    }
  }
  return pack;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp)
    forward(ShiftRmsNormInput<T> in, int64_t positions, T* out, compute_t<T>* inverse_norm) {
  using C = compute_t<T>;
  constexpr int N = kPackSize<T>;
  const int64_t kept = kept_width(in), lane = threadIdx.x % kWarp;
  const int64_t warp = threadIdx.x / kWarp, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + warp; i < positions; i += warps) {
    const int64_t row = quotient(i, in.length);
    const Halves<T> s = halves_of(in, row, i - row * in.length);
    C squares = 0;
    for (int64_t first = lane * N; first < in.width; first += kWarp * N) {
      const Pack<T, N> pack = read_shifted<kAligned, N>(s, kept, in.width, first);
      for (int k = 0; k < N; ++k) squares += value_of(pack.values[k]) * value_of(pack.values[k]);
    }
    const C eps = C(in.eps), norm = sqrt(warp_sum(squares) / C(in.width));
    const C inverse = C(1) / (norm < eps ? eps : norm);  // NaN stays NaN
    if (lane == 0) inverse_norm[i] = inverse;

    for (int64_t first = lane * N; first < in.width; first += kWarp * N) {
      const Pack<T, N> pack = read_shifted<kAligned, N>(s, kept, in.width, first);
      const Pack<C, N> weight = read_row<kAligned, N>(in.weight, in.width, first);
      Pack<T, N> result;
      for (int k = 0; k < N; ++k) {
        result.values[k] = rounded<T>(value_of(pack.values[k]) * inverse * weight.values[k]);
      }
      write_row<kAligned>(out + i * in.width, in.width, first, result);
    }
  }
}

// Each warp takes the positions of one part and sums their gradients of the weight, in shared
// memory if there is room for it.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp, 1)  // else registers are spilled
    backward(ShiftRmsNormInput<T> in, int64_t positions, int64_t parts, bool in_shared,
             const T* grad, const compute_t<T>* inverse_norm, T* grad_x, T* grad_previous,
             compute_t<T>* grad_weight) {
  using C = compute_t<T>;
  constexpr int N = kPackSize<T>;
  const int64_t width = in.width, kept = kept_width(in), delayed = width - kept;
  const int64_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t each = (positions + parts - 1) / parts;
  const C bound = C(1) / C(in.eps);
  for (int64_t part = int64_t(blockIdx.x) * kWarps + warp; part < parts;
       part += int64_t(gridDim.x) * kWarps) {
    C* sums = in_shared ? shared_memory<C>() + warp * width : grad_weight + part * width;
    // A lane reads and writes the same channels of the sums all along: no barrier is needed.
    for (int64_t first = lane * N; first < width; first += kWarp * N) {
      for (int k = 0; k < N && first + k < width; ++k) sums[first + k] = 0;
    }
    const int64_t end = (part + 1) * each < positions ? (part + 1) * each : positions;
    for (int64_t i = part * each; i < end; ++i) {
      const int64_t row = quotient(i, in.length), t = i - row * in.length;
      const Halves<T> s = halves_of(in, row, t);
      const T* own_grad = grad + i * width;
      C along = 0;
      for (int64_t first = lane * N; first < width; first += kWarp * N) {
        const Pack<T, N> g = read_row<kAligned, N>(own_grad, width, first);
        const Pack<T, N> x = read_shifted<kAligned, N>(s, kept, width, first);
        const Pack<C, N> w = read_row<kAligned, N>(in.weight, width, first);
        for (int k = 0; k < N; ++k) {
          along += value_of(g.values[k]) * w.values[k] * value_of(x.values[k]);
        }
      }
      const C inverse = inverse_norm[i];
      // Where eps bounds the norm, nothing goes through it.
      const C mean = inverse >= bound ? C(0) : warp_sum(along) * inverse / C(width);

      T* own = grad_x + i * width;
      // The delayed half came from the position before, the first one's from outside.
      T* source = t > 0 ? own - delayed : grad_previous ? grad_previous + row * delayed : nullptr;
      for (int64_t first = lane * N; first < width; first += kWarp * N) {
        const Pack<T, N> g = read_row<kAligned, N>(own_grad, width, first);
        const Pack<T, N> x = read_shifted<kAligned, N>(s, kept, width, first);
        const Pack<C, N> w = read_row<kAligned, N>(in.weight, width, first);
        Pack<C, N> sum = read_row<kAligned, N>(sums, width, first);
        Pack<T, N> result;
        for (int k = 0; k < N; ++k) {
          const C value = value_of(g.values[k]), normalized = value_of(x.values[k]) * inverse;
          sum.values[k] += value * normalized;
          result.values[k] = rounded<T>(inverse * (value * w.values[k] - normalized * mean));
        }
        if constexpr (kAligned) {
          store_pack(sums + first, sum);
          if (first < kept) {
            store_pack(own + first, result);
          } else if (source) {
            store_pack(source + first - kept, result);
          }
        } else {
          for (int k = 0; k < N && first + k < width; ++k) {
            const int64_t c = first + k;
            sums[c] = sum.values[k];
            if (c < kept) {
              own[c] = result.values[k];
            } else if (source) {
              source[c - kept] = result.values[k];
            }
          }
        }
      }
      // The last position's delayed half went nowhere.
      if (t == in.length - 1) {
        for (int64_t c = kept + lane; c < width; c += kWarp) own[c] = rounded<T>(0);
      }
    }
    if (in_shared) {
      for (int64_t first = lane * N; first < width; first += kWarp * N) {
        for (int k = 0; k < N && first + k < width; ++k) {
          grad_weight[part * width + first + k] = sums[first + k];
        }
      }
    }
  }
}

// Whether packs of channels can be loaded at once and do not reach across the halves.
template <class T>
bool packs_fit(const ShiftRmsNormInput<T>& in) {
  constexpr int64_t N = kPackSize<T>;
  return kept_width(in) % N == 0 && in.width % N == 0 && in.x_row_stride % N == 0 &&
         in.x_position_stride % N == 0 && in.previous_row_stride % N == 0 && is_aligned(in.x) &&
         is_aligned(in.previous) && is_aligned(in.weight);
}

}  // namespace

template <class T>
Error shift_rms_norm(const ShiftRmsNormInput<T>& in, int64_t positions, T* out,
                     compute_t<T>* inverse_norm, Stream stream) {
  const auto kernel = packs_fit(in) && is_aligned(out) ? forward<T, true> : forward<T, false>;
  return launch(kernel, divide_up(positions, kWarps), kWarps * kWarp, 0, stream, in, positions, out,
                inverse_norm);
}

int64_t shift_rms_norm_parts(int64_t positions) {
  constexpr int64_t kPositionsPerPart = 8, kMaxParts = 4096;
  return std::min(divide_up(positions, kPositionsPerPart), kMaxParts);
}

template <class T>
Error shift_rms_norm_backward(const ShiftRmsNormInput<T>& in, int64_t positions, const T* grad,
                              const compute_t<T>* inverse_norm, T* grad_x, T* grad_previous,
                              compute_t<T>* grad_weight, Stream stream) {
  constexpr size_t kMaxShared = 48 * 1024;
  const bool aligned = packs_fit(in) && is_aligned(grad) && is_aligned(grad_x) &&
                       is_aligned(grad_previous) && is_aligned(grad_weight);
  const auto kernel = aligned ? backward<T, true> : backward<T, false>;
  const int64_t parts = shift_rms_norm_parts(positions);
  const size_t sums = kWarps * size_t(in.width) * sizeof(compute_t<T>);
  const bool in_shared = sums <= kMaxShared;
  return launch(kernel, divide_up(parts, kWarps), kWarps * kWarp, in_shared ? sums : 0, stream, in,
                positions, parts, in_shared, grad, inverse_norm, grad_x, grad_previous,
                grad_weight);
}

#define MBLM_INSTANTIATE(T)                                                                 \
  template Error shift_rms_norm<T>(const ShiftRmsNormInput<T>&, int64_t, T*, compute_t<T>*, \
                                   Stream);                                                 \
  template Error shift_rms_norm_backward<T>(const ShiftRmsNormInput<T>&, int64_t, const T*, \
                                            const compute_t<T>*, T*, T*, compute_t<T>*, Stream)
MBLM_FOR_EACH_TYPE(MBLM_INSTANTIATE)
#undef MBLM_INSTANTIATE

}  // namespace mblm::cuda
