// Tests of the transpose of large matrices.
#include "cpu/transpose.h"

#include "check.h"

using namespace mblm;

int main() {
  test::Numbers numbers;
  for (const int64_t rows : {0, 1, 7, 8, 16, 17, 40, 129}) {
    for (const int64_t columns : {0, 1, 8, 15, 16, 33, 100}) {
      for (const int64_t apart : {0, 3}) {
        const int64_t stride = columns + apart;
        const auto from = numbers.vector<float>(rows * stride);
        std::vector<float> to(rows * columns, NAN);
        const cpu::TransposeInput in{rows, columns, from.data(), stride};
        // Two ranges of blocks, as two threads would have them.
        cpu::transpose_matrix(in, to.data(), 0, in.blocks() / 2);
        cpu::transpose_matrix(in, to.data(), in.blocks() / 2, in.blocks());
        bool is_transposed = true;
        for (int64_t i = 0; i < rows * columns; ++i) {
          is_transposed &= to[i] == from[i % rows * stride + i / rows];
        }
        CHECK(is_transposed);
      }
    }
  }
  return test::result();
}
