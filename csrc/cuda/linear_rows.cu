// A linear map of a few rows: see linear_rows.h.
//
// A warp takes an output of up to kRows rows, its lanes the inputs as rows.cuh has it.
#include "cuda/kernel.cuh"
#include "cuda/linear_rows.h"
#include "cuda/rows.cuh"

namespace mblm::cuda {
namespace {

using cpu::LinearRowsInput;

template <class T, int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    columns(LinearRowsInput<T> in, int64_t first_row, T* out) {
  using C = compute_t<T>;
  constexpr int N = kPackSize<T>;
  const int lane = threadIdx.x % kWarp;
  for (int64_t column = first_item_of_warp(); column < in.outputs; column += warp_stride()) {
    const T* weight = in.weight + column * in.inputs;
    C sums[kRows] = {};
    MBLM_UNROLL
    for (int64_t first = lane * N; first < in.inputs; first += kWarp * N) {
      const Pack<T, N> w = read_row<kAligned, N>(weight, in.inputs, first);
      for (int r = 0; r < kRows; ++r) {
        if (first_row + r >= in.rows) continue;
        const T* row = in.x + (first_row + r) * in.inputs;
        const Pack<T, N> x = read_row<kAligned, N>(row, in.inputs, first);
        for (int k = 0; k < N; ++k) sums[r] += value_of(x.values[k]) * value_of(w.values[k]);
      }
    }
    const C bias = in.bias ? value_of(in.bias[column]) : C(0);
    for (int r = 0; r < kRows; ++r) {
      const C sum = warp_sum(sums[r]);
      if (lane == 0 && first_row + r < in.rows) {
        out[(first_row + r) * in.outputs + column] = rounded<T>(sum + bias);
      }
    }
  }
}

template <class T, bool kAligned>
Error launch_rows(const LinearRowsInput<T>& in, T* out, Stream stream) {
  constexpr int kRows = 8;
  const int64_t blocks = divide_up(in.outputs, kWarps);
  if (in.rows == 1) {
    return launch(columns<T, 1, kAligned>, blocks, kThreads, 0, stream, in, int64_t(0), out);
  }
  for (int64_t row = 0; row < in.rows; row += kRows) {
    if (const Error error =
            launch(columns<T, kRows, kAligned>, blocks, kThreads, 0, stream, in, row, out)) {
      return error;
    }
  }
  return nullptr;
}

}  // namespace

template <class T>
Error linear_rows(const LinearRowsInput<T>& in, T* out, Stream stream) {
  const bool aligned = in.inputs % kPackSize<T> == 0 && is_aligned(in.x) && is_aligned(in.weight);
  return aligned ? launch_rows<T, true>(in, out, stream) : launch_rows<T, false>(in, out, stream);
}

MBLM_INSTANTIATE(linear_rows)

}  // namespace mblm::cuda
