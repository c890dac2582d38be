// RMSNorm of rows that are made as they are read, and its gradients: what shift_rms_norm.cu and
// gated_rms_norm.cu share. A warp takes a position.
//
// Such rows are a class that names element types T and C, has an input `in` with width and weight,
// and tells by at(i) of a position: read(first) gives N channels of it, whose k-th is value(k);
// write(first, those, their gradients); finish(lane), when all are written. inverse(mean) is one
// over the norm, from the mean of squares; is_bounded(inverse) where nothing goes through it.
#pragma once

#include <algorithm>

#include "cuda/rows.cuh"

namespace mblm::cuda {

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

// In how many parts the gradient of the weight is given.
inline int64_t parts_of_positions(int64_t positions) {
  constexpr int64_t kPositionsPerPart = 8, kMaxParts = 4096;
  return std::min(divide_up(positions, kPositionsPerPart), kMaxParts);
}

template <class Rows, class T, class C>
Error launch_backward(const Rows& rows, int64_t positions, const T* grad, const C* inverse_norm,
                      C* grad_weight, Stream stream) {
  constexpr size_t kMaxShared = 48 * 1024;
  const int64_t parts = parts_of_positions(positions);
  const size_t sums = kNormWarps * size_t(rows.in.width) * sizeof(C);
  const bool in_shared = sums <= kMaxShared;
  return launch(norm_backward<Rows, T, C>, divide_up(parts, kNormWarps), kNormWarps * kWarp,
                in_shared ? sums : 0, stream, rows, positions, parts, in_shared, grad, inverse_norm,
                grad_weight);
}

}  // namespace mblm::cuda
