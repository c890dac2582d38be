// Tests of the emulated CUDA kernels of causal_conv against those of the CPU.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/causal_conv.cu"

using namespace mblm;

template <class T>
void equals_cpu(int64_t rows, int64_t length, int64_t channels, int64_t taps, bool with_window,
                int64_t padding) {
  using C = cpu::compute_t<T>;
  test::Numbers numbers;
  const int64_t stride = channels + padding;
  const auto x = numbers.vector<T>(rows * length * stride);
  const auto window = numbers.vector<T>(rows * (taps - 1) * channels);
  const auto weight_bias = numbers.vector<C>((taps + 1) * channels);
  const cpu::CausalConvInput<T> in = {rows,
                                      length,
                                      channels,
                                      taps,
                                      x.data(),
                                      length * stride,
                                      stride,
                                      with_window ? window.data() : nullptr,
                                      weight_bias.data()};
  const int64_t values = rows * length * channels, tiles = in.tiles();
  std::vector<T> y(values);
  cpu::causal_conv(in, y.data(), 0, rows * in.blocks() * tiles);
  const auto [got] = test::in_both_orders([&] {
    auto y = test::unwritten<T>(values);
    CHECK(!cuda::causal_conv(in, y.data(), nullptr));
    return std::tuple(y);
  });
  CHECK(test::nearly(got, y));

  const auto grad_y = numbers.vector<T>(values), grad_next = numbers.vector<T>(window.size());
  std::vector<T> grad_x(values), grad_window(window.size());
  std::vector<C> grad_weight(weight_bias.size());
  const T* next = with_window ? grad_next.data() : nullptr;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    cpu::causal_conv_backward<T>(
        in, {grad_y.data(), next, grad_x.data(), grad_window.data(), grad_weight.data()}, tile, 0,
        rows * in.blocks());
  }
  const auto [got_x, got_window, parts] = test::in_both_orders([&] {
    auto x = test::unwritten<T>(values), window = test::unwritten<T>(grad_window.size());
    auto parts = test::unwritten<C>(cuda::causal_conv_parts(in) * (taps + 1) * channels);
    CHECK(!cuda::causal_conv_backward<T>(
        in, {grad_y.data(), next, x.data(), window.data(), parts.data()}, nullptr));
    return std::tuple(x, window, parts);
  });
  CHECK(test::nearly(got_x, grad_x, 2));
  CHECK(test::nearly(got_window, grad_window, 2));
  CHECK(test::nearly(test::sum_of_parts(parts, grad_weight.size()), grad_weight, 10));
}

template <class T>
void all_sizes() {
  for (const int64_t taps : {1, 2, 4, 7}) {
    for (const int64_t length : {0, 2, 40}) {
      equals_cpu<T>(2, length, 9, taps, false, 0);
      equals_cpu<T>(3, length, 70, taps, true, 3);
    }
  }
  equals_cpu<T>(0, 3, 4, 4, true, 0);
  equals_cpu<T>(2, 3, 0, 4, true, 0);
  equals_cpu<T>(600, 2, 3, 3, true, 0);  // parts of several blocks
  equals_cpu<T>(1, 30, 3, cuda::kConvMaxTaps, true, 0);
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
