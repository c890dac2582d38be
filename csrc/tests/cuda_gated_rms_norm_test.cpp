// Tests of the emulated CUDA kernels of gated_rms_norm against those of the CPU.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/rms_norms.cu"

using namespace mblm;

// gap: how much further apart than they must be positions lie.
template <class T>
void equals_cpu(int64_t positions, int64_t width, bool gated, int64_t gap) {
  using C = cpu::compute_t<T>;
  test::Numbers numbers;
  const int64_t stride = width + gap, values = positions * width;
  const auto x = numbers.vector<T>(positions * stride), gate = numbers.vector<T>(x.size());
  const auto grad = numbers.vector<T>(values);
  const auto weight = numbers.vector<C>(width);
  const cpu::GatedRmsNormInput<T> in{width,  x.data(),      stride, gated ? gate.data() : nullptr,
                                     stride, weight.data(), 1e-5};
  std::vector<T> out(values), grad_x(values), grad_gate(gated ? values : 0);
  std::vector<C> inverse(positions), grad_weight(width);
  cpu::gated_rms_norm(in, out.data(), inverse.data(), 0, positions);
  cpu::gated_rms_norm_backward(in, grad.data(), inverse.data(), grad_x.data(), grad_gate.data(),
                               grad_weight.data(), 0, positions);

  const auto [got, got_inverse] = test::in_both_orders([&] {
    auto out = test::unwritten<T>(values);
    auto inverse = test::unwritten<C>(positions);
    CHECK(!cuda::rms_norm(in, positions, out.data(), inverse.data(), nullptr));
    return std::tuple(out, inverse);
  });
  CHECK(test::nearly(got, out));
  CHECK(test::nearly(got_inverse, inverse));

  const int64_t parts = cuda::rms_norm_parts(positions);
  const auto [got_x, got_gate, weight_parts] = test::in_both_orders([&] {
    auto x = test::unwritten<T>(values);
    auto to_gate = test::unwritten<T>(grad_gate.size());
    auto weight = test::unwritten<C>(parts * width);
    CHECK(!cuda::rms_norm_backward(in, positions, grad.data(), inverse.data(), x.data(),
                                   gated ? to_gate.data() : nullptr, weight.data(), nullptr));
    return std::tuple(x, to_gate, weight);
  });
  std::vector<C> got_weight(width);
  for (int64_t i = 0; i < parts * width; ++i) got_weight[i % width] += weight_parts[i];
  CHECK(test::nearly(got_x, grad_x));
  CHECK(test::nearly(got_gate, grad_gate));
  CHECK(test::nearly(got_weight, grad_weight, 4));
}

template <class T>
void all_sizes() {
  for (const bool gated : {false, true}) {
    for (const int64_t positions : {0, 1, 5}) {
      for (const int64_t width : {1, 37, 640}) {
        for (const int64_t gap : {0, 5}) equals_cpu<T>(positions, width, gated, gap);
      }
    }
    equals_cpu<T>(150, 48, gated, 0);  // several parts of several positions
  }
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
