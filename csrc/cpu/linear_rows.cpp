// A linear map of a few rows: see linear_rows.h.
#include "cpu/linear_rows.h"

#include "cpu/dot.h"

namespace mblm::cpu {

template <class T>
MBLM_INLINE void columns(const LinearRowsInput<T>& in, T* __restrict out, int64_t begin,
                         int64_t end) {
  using C = compute_t<T>;
  for (int64_t column = begin; column < end; ++column) {
    const T* weight = in.weight + column * in.inputs;
    const C bias = in.bias ? C(in.bias[column]) : C(0);
    for (int64_t row = 0; row < in.rows; ++row) {
      out[row * in.outputs + column] = T(dot<C>(in.x + row * in.inputs, weight, in.inputs) + bias);
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
