// Tests of the causal convolution against plain loops in double.
#include "cpu/causal_conv.h"

#include <algorithm>
#include <cmath>

#include "check.h"

using namespace mblm;

template <class T>
void forward_and_backward(int64_t rows, int64_t length, int64_t channels, int64_t taps,
                          bool with_window, int64_t gap) {
  using C = cpu::compute_t<T>;
  test::Numbers numbers;
  const int64_t before = taps - 1, whole = before + length, stride = channels + gap;
  const auto x = numbers.vector<T>(rows * length * stride);
  const auto window = numbers.vector<T>(rows * before * channels);
  const auto weight = numbers.vector<C>((taps + 1) * channels);
  const auto grad_y = numbers.vector<T>(rows * length * channels);
  const auto grad_next = numbers.vector<T>(rows * before * channels);
  const cpu::CausalConvInput<T> in{
      rows,         length,          channels, taps,
      x.data(),     length * stride, stride,   with_window ? window.data() : nullptr,
      weight.data()};

  std::vector<double> y(rows * length * channels), grad_x(y.size());
  std::vector<double> grad_window(window.size()), grad_weight(weight.size());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c) {
      std::vector<double> e(whole), grad_e(whole);
      for (int64_t i = 0; i < whole; ++i) {
        if (i >= before) e[i] = double(x[(row * length + i - before) * stride + c]);
        if (i < before && with_window) e[i] = double(window[(row * before + i) * channels + c]);
        if (i >= length) grad_e[i] += double(grad_next[(row * before + i - length) * channels + c]);
      }
      for (int64_t t = 0; t < length; ++t) {
        double v = double(weight[taps * channels + c]);
        for (int64_t k = 0; k < taps; ++k) v += double(weight[k * channels + c]) * e[t + k];
        const int64_t at = (row * length + t) * channels + c;
        const double gate = 1 / (1 + std::exp(-v));
        y[at] = v * gate;
        const double g = double(grad_y[at]) * gate * (1 + v * (1 - gate));
        for (int64_t k = 0; k < taps; ++k) {
          grad_e[t + k] += double(weight[k * channels + c]) * g;
          grad_weight[k * channels + c] += e[t + k] * g;
        }
        grad_weight[taps * channels + c] += g;
      }
      for (int64_t i = 0; i < whole; ++i) {
        if (i < before) grad_window[(row * before + i) * channels + c] = grad_e[i];
        if (i >= before) grad_x[(row * length + i - before) * channels + c] = grad_e[i];
      }
    }
  }

  // In two ranges, as two threads would.
  const int64_t items = rows * in.blocks() * in.tiles(), blocks = rows * in.blocks();
  std::vector<T> got(y.size(), T(7.0f));
  cpu::causal_conv(in, got.data(), 0, items / 2);
  cpu::causal_conv(in, got.data(), items / 2, items);
  CHECK(test::all_close(got, y));

  std::vector<T> got_x(y.size(), T(7.0f)), got_window(window.size(), T(7.0f));
  std::vector<C> got_weight(weight.size(), C(7)), more_weight(weight.size(), C(7));
  const cpu::CausalConvGradients<T> grad{grad_y.data(), grad_next.data(), got_x.data(),
                                         got_window.data(), got_weight.data()};
  auto more = grad;
  more.weight_bias = more_weight.data();
  for (int64_t tile = 0; tile < in.tiles(); ++tile) {
    cpu::causal_conv_backward(in, grad, tile, 0, blocks / 2);
    cpu::causal_conv_backward(in, more, tile, blocks / 2, blocks);
  }
  for (size_t i = 0; i < got_weight.size(); ++i) got_weight[i] += more_weight[i];
  CHECK(test::all_close(got_x, grad_x));
  CHECK(test::all_close(got_window, grad_window));
  CHECK(test::all_close(got_weight, grad_weight));
}

template <class T>
void all_sizes() {
  for (const int64_t rows : {0, 1, 3}) {
    for (const int64_t length : {0, 1, 2, 5, 32, 33, 70}) {
      for (const int64_t channels : {0, 1, 37, 64, 65}) {
        for (const int64_t taps : {1, 2, 4}) {
          forward_and_backward<T>(rows, length, channels, taps, true, 0);
          forward_and_backward<T>(rows, length, channels, taps, false, 3);
        }
      }
    }
  }
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
