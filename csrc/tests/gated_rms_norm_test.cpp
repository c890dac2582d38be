// Tests of gated_rms_norm against plain loops in double.
#include "cpu/gated_rms_norm.h"

#include "check.h"

using namespace mblm;

constexpr double kEps = 1e-5;

template <class T>
void forward_and_backward(int64_t positions, int64_t width, bool gated, int64_t gap) {
  using C = cpu::compute_t<T>;
  test::Numbers numbers;
  const int64_t stride = width + gap;
  const auto x = numbers.vector<T>(positions * stride), gate = numbers.vector<T>(x.size());
  const auto grad = numbers.vector<T>(positions * width);
  const auto weight = numbers.vector<C>(width);
  const cpu::GatedRmsNormInput<T> in{width,  x.data(),      stride, gated ? gate.data() : nullptr,
                                     stride, weight.data(), kEps};

  std::vector<double> out(positions * width), inverse(positions), grad_x(out.size());
  std::vector<double> grad_gate(out.size()), grad_weight(width);
  for (int64_t i = 0; i < positions; ++i) {
    std::vector<double> open(width), silu(width, 1.0), normalized(width);
    double squares = 0, along = 0;
    for (int64_t c = 0; c < width; ++c) {
      const double z = double(gate[i * stride + c]);
      open[c] = 1 / (1 + std::exp(-z));
      if (gated) silu[c] = z * open[c];
      normalized[c] = double(x[i * stride + c]) * silu[c];
      squares += normalized[c] * normalized[c];
    }
    inverse[i] = 1 / std::sqrt(squares / double(width) + kEps);
    for (int64_t c = 0; c < width; ++c) {
      const double g = double(grad[i * width + c]);
      normalized[c] *= inverse[i];
      out[i * width + c] = normalized[c] * double(weight[c]);
      grad_weight[c] += g * normalized[c];
      along += g * double(weight[c]) * normalized[c] / double(width);
    }
    for (int64_t c = 0; c < width; ++c) {
      const double scaled = double(grad[i * width + c]) * double(weight[c]);
      const double of_gated = inverse[i] * (scaled - normalized[c] * along);
      const double slope = open[c] * (1 + double(gate[i * stride + c]) * (1 - open[c]));
      grad_x[i * width + c] = of_gated * silu[c];
      grad_gate[i * width + c] = of_gated * double(x[i * stride + c]) * slope;
    }
  }

  // In two ranges, as two threads would. What is not zero before shows what is not written.
  const int64_t half = positions / 2;
  std::vector<T> got(out.size(), T(7.0f)), got_x(out.size(), T(7.0f)), got_gate = got_x;
  std::vector<C> got_inverse(positions), got_weight(width, C(7)), more_weight(width, C(7));
  cpu::gated_rms_norm(in, got.data(), got_inverse.data(), 0, half);
  cpu::gated_rms_norm(in, got.data(), got_inverse.data(), half, positions);
  CHECK(test::all_close(got, out));
  CHECK(test::all_close(got_inverse, inverse));

  T* to_gate = gated ? got_gate.data() : nullptr;
  cpu::gated_rms_norm_backward(in, grad.data(), got_inverse.data(), got_x.data(), to_gate,
                               got_weight.data(), 0, half);
  cpu::gated_rms_norm_backward(in, grad.data(), got_inverse.data(), got_x.data(), to_gate,
                               more_weight.data(), half, positions);
  for (int64_t c = 0; c < width; ++c) got_weight[c] += more_weight[c];
  CHECK(test::all_close(got_x, grad_x));
  CHECK(test::all_close(got_weight, grad_weight));
  if (gated) CHECK(test::all_close(got_gate, grad_gate));
}

template <class T>
void all_sizes() {
  for (const int64_t positions : {0, 1, 2, 5}) {
    for (const int64_t width : {1, 2, 8, 37, 130}) {
      for (const bool gated : {false, true}) {
        forward_and_backward<T>(positions, width, gated, 0);
        forward_and_backward<T>(positions, width, gated, 5);
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
