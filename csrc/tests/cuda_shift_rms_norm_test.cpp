// Tests of the emulated CUDA kernels of shift_rms_norm against those of the CPU.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/rms_norms.cu"

using namespace mblm;

template <class T>
struct Case {
  using C = cpu::compute_t<T>;
  int64_t rows, length, width;
  std::vector<T> x, previous, grad;
  std::vector<C> weight;
  cpu::ShiftRmsNormInput<T> in;

  // padding: how much further apart than they must be positions lie.
  Case(int64_t rows, int64_t length, int64_t width, bool shift, bool with_previous, int64_t padding)
      : rows(rows), length(length), width(width) {
    test::Numbers numbers;
    const int64_t position_stride = width + padding, row_stride = length * position_stride;
    x = numbers.vector<T>(rows * row_stride);
    previous = numbers.vector<T>(rows * (width / 2));
    grad = numbers.vector<T>(rows * length * width);
    weight = numbers.vector<C>(width);
    in = {length,
          width,
          x.data(),
          row_stride,
          position_stride,
          weight.data(),
          with_previous ? previous.data() : nullptr,
          width / 2,
          shift,
          1e-8};
  }
};

template <class T>
void equals_cpu(const Case<T>& test_case) {
  using C = cpu::compute_t<T>;
  const auto& in = test_case.in;
  const int64_t positions = test_case.rows * test_case.length, values = positions * in.width;
  std::vector<T> out(values), grad_x(values), grad_previous(test_case.previous.size(), T(7.0f));
  std::vector<C> inverse(positions), grad_weight(in.width);
  T* to_previous = in.previous ? grad_previous.data() : nullptr;
  cpu::shift_rms_norm(in, out.data(), inverse.data(), 0, positions);
  cpu::shift_rms_norm_backward(in, test_case.grad.data(), inverse.data(), grad_x.data(),
                               to_previous, grad_weight.data(), 0, positions);

  const auto [got, got_inverse] = test::in_both_orders([&] {
    auto out = test::unwritten<T>(values);
    auto inverse = test::unwritten<C>(positions);
    CHECK(!cuda::rms_norm(in, positions, out.data(), inverse.data(), nullptr));
    return std::tuple(out, inverse);
  });
  CHECK(test::nearly(got, out));
  CHECK(test::nearly(got_inverse, inverse));

  const int64_t parts = cuda::rms_norm_parts(positions);
  const auto [got_x, got_previous, weight_parts] = test::in_both_orders([&] {
    auto x = test::unwritten<T>(values);
    auto previous = test::unwritten<T>(grad_previous.size());
    auto weight = test::unwritten<C>(parts * in.width);
    CHECK(!cuda::rms_norm_backward(in, positions, test_case.grad.data(), inverse.data(), x.data(),
                                   in.previous ? previous.data() : nullptr, weight.data(),
                                   nullptr));
    return std::tuple(x, previous, weight);
  });
  std::vector<C> got_weight(in.width);
  for (int64_t i = 0; i < parts * in.width; ++i) got_weight[i % in.width] += weight_parts[i];
  CHECK(test::nearly(got_x, grad_x));
  CHECK(test::nearly(got_previous, grad_previous));
  CHECK(test::nearly(got_weight, grad_weight, 4));
}

template <class T>
void all_sizes() {
  for (const int64_t rows : {0, 2}) {
    for (const int64_t length : {0, 1, 5}) {
      for (const int64_t width : {1, 37, 640}) {
        for (const int64_t padding : {0, 5}) {
          equals_cpu(Case<T>(rows, length, width, false, false, padding));
          equals_cpu(Case<T>(rows, length, width, true, false, padding));
          equals_cpu(Case<T>(rows, length, width, true, true, padding));
        }
      }
    }
  }
  equals_cpu(Case<T>(9, 17, 48, true, true, 0));  // several parts of several positions
  equals_cpu(
      Case<T>(1, 3, 12800, true, true, 0));  // sums of the weight's gradient in no shared memory
}

// A row gives the same bits however its inputs lie in memory.
void alignment_makes_no_difference() {
  Case<float> test_case(2, 3, 640, true, true, 0);
  std::vector<float> out(test_case.grad.size()), inverse(6), moved(test_case.grad.size());
  CHECK(!cuda::rms_norm(test_case.in, 6, out.data(), inverse.data(), nullptr));
  std::vector<float> x(1, 0.0f);
  x.insert(x.end(), test_case.x.begin(), test_case.x.end());
  test_case.in.x = x.data() + 1;
  CHECK(!cuda::rms_norm(test_case.in, 6, moved.data(), inverse.data(), nullptr));
  CHECK(test::same_bits(out, moved));
}

void bounds_a_vanishing_norm() {
  Case<double> zeros(1, 3, 4, true, false, 0);
  std::fill(zeros.x.begin(), zeros.x.end(), 1e-10);
  equals_cpu(zeros);
  std::fill(zeros.x.begin(), zeros.x.end(), 0.0);
  equals_cpu(zeros);
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  alignment_makes_no_difference();
  bounds_a_vanishing_norm();
  return test::result();
}
