// A linear map of a few rows: see linear_rows.h.
#include "cpu/linear_rows.h"

#include "cpu/dot.h"

namespace mblm::cpu {

template <class T>
MBLM_CLONES void linear_rows(const LinearRowsInput<T>& in, T* __restrict out, int64_t begin,
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

MBLM_INSTANTIATE(linear_rows)

}  // namespace mblm::cpu
