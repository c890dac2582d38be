// Tests of the emulated CUDA kernel of linear_rows against that of the CPU.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/linear_rows.cu"

using namespace mblm;

template <class T>
void equals_cpu(int64_t rows, int64_t inputs, int64_t outputs, bool with_bias) {
  test::Numbers numbers;
  const auto x = numbers.vector<T>(rows * inputs), weight = numbers.vector<T>(outputs * inputs);
  const auto bias = numbers.vector<T>(outputs);
  const cpu::LinearRowsInput<T> in = {rows,     inputs,        outputs,
                                      x.data(), weight.data(), with_bias ? bias.data() : nullptr};
  std::vector<T> out(rows * outputs);
  cpu::linear_rows(in, out.data(), 0, outputs);
  const auto [got] = test::in_both_orders([&] {
    auto out = test::unwritten<T>(rows * outputs);
    CHECK(!cuda::linear_rows(in, out.data(), nullptr));
    return std::tuple(out);
  });
  CHECK(test::nearly(got, out, 4));

  // A row gives the same bits on its own, and where it is not aligned.
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<T> moved(1, T(0.0f)), one(outputs);
    moved.insert(moved.end(), x.begin() + row * inputs, x.begin() + (row + 1) * inputs);
    const T* places[] = {x.data() + row * inputs, moved.data() + 1};
    for (const T* alone : places) {
      CHECK(!cuda::linear_rows({1, inputs, outputs, alone, weight.data(), in.bias}, one.data(),
                               nullptr));
      CHECK(test::same_bits(
          one, std::vector<T>(got.begin() + row * outputs, got.begin() + (row + 1) * outputs)));
    }
  }
}

template <class T>
void all_sizes() {
  for (const int64_t rows : {0, 1, 11}) {
    for (const int64_t inputs : {0, 37, 520}) {
      equals_cpu<T>(rows, inputs, 5, false);
      equals_cpu<T>(rows, inputs, 41, true);
    }
  }
  equals_cpu<T>(2, 16, 0, true);
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
