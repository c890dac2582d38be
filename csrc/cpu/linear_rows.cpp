// A linear map of a few rows: see linear_rows.h.
#include "cpu/linear_rows.h"

namespace mblm::cpu {

// Sum of x * weight in interleaved sums, as many as keep the loads of a core's memory busy.
template <class T>
MBLM_INLINE compute_t<T> dot(const T* __restrict x, const T* __restrict weight, int64_t n) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = 32;
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += C(x[i + lane]) * C(weight[i + lane]);
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] += C(x[i]) * C(weight[i]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <class T>
MBLM_INLINE void columns(const LinearRowsInput<T>& in, T* __restrict out, int64_t begin,
                         int64_t end) {
  using C = compute_t<T>;
  for (int64_t column = begin; column < end; ++column) {
    const T* weight = in.weight + column * in.inputs;
    const C bias = in.bias ? C(in.bias[column]) : C(0);
    for (int64_t row = 0; row < in.rows; ++row) {
      out[row * in.outputs + column] = T(dot(in.x + row * in.inputs, weight, in.inputs) + bias);
    }
  }
}

#define MBLM_INSTANTIATE(T)                                                            \
  template <>                                                                          \
  MBLM_CLONES void linear_rows<T>(const LinearRowsInput<T>& in, T* out, int64_t begin, \
                                  int64_t end) {                                       \
    columns(in, out, begin, end);                                                      \
  }
MBLM_INSTANTIATE(float)
MBLM_INSTANTIATE(double)
MBLM_INSTANTIATE(BFloat16)
#undef MBLM_INSTANTIATE

}  // namespace mblm::cpu
