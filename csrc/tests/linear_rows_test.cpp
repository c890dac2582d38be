// Tests of linear_rows against plain loops in double.
#include "cpu/linear_rows.h"

#include "check.h"

using namespace mblm;

template <class T>
void equals_plain_loops() {
  test::Numbers numbers;
  for (const int64_t rows : {0, 1, 3, 8}) {
    for (const int64_t inputs : {0, 1, 31, 32, 33, 100}) {
      for (const int64_t outputs : {0, 1, 5}) {
        for (const bool with_bias : {false, true}) {
          const auto x = numbers.vector<T>(rows * inputs),
                     weight = numbers.vector<T>(outputs * inputs);
          const auto bias = numbers.vector<T>(outputs);
          std::vector<double> expected(rows * outputs);
          for (int64_t i = 0; i < rows * outputs; ++i) {
            const int64_t row = i / outputs, column = i % outputs;
            double sum = with_bias ? double(bias[column]) : 0;
            for (int64_t k = 0; k < inputs; ++k) {
              sum += double(x[row * inputs + k]) * double(weight[column * inputs + k]);
            }
            expected[i] = sum;
          }
          const cpu::LinearRowsInput<T> in{
              rows, inputs, outputs, x.data(), weight.data(), with_bias ? bias.data() : nullptr};
          std::vector<T> out(rows * outputs, T(NAN));
          // Two ranges of columns, as two threads would have them.
          cpu::linear_rows(in, out.data(), 0, outputs / 2);
          cpu::linear_rows(in, out.data(), outputs / 2, outputs);
          CHECK(test::all_close(out, expected));
        }
      }
    }
  }
}

int main() {
  equals_plain_loops<float>();
  equals_plain_loops<double>();
  equals_plain_loops<cpu::BFloat16>();
  return test::result();
}
