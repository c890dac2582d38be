// The small matrix product: see products.h.
#include "cpu/products.h"

namespace mblm::cpu {

template <class C>
MBLM_CLONES void product(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t a_row,
                         int64_t a_column, const C* b, int64_t b_row, C keep, const C* from, C* to,
                         int64_t to_row) {
  // A stride of one is a constant to the compiler.
  if (a_column == 1) {
    inline_product(rows, columns, depth, a, a_row, int64_t(1), b, b_row, keep, from, to, to_row);
  } else {
    inline_product(rows, columns, depth, a, int64_t(1), a_column, b, b_row, keep, from, to, to_row);
  }
}
template decltype(product<float>) product<float>;
template decltype(product<double>) product<double>;

}  // namespace mblm::cpu
