// Tests of shift_rms_norm against plain loops in double.
#include "cpu/shift_rms_norm.h"

#include <algorithm>
#include <tuple>

#include "check.h"

using namespace mblm;

constexpr double kEps = 1e-8;

template <class T>
struct Case {
  int64_t rows, length, width;
  bool shift, with_previous, strided;
  std::vector<T> x, previous, grad;
  std::vector<cpu::compute_t<T>> weight;
  cpu::ShiftRmsNormInput<T> in;

  Case(int64_t rows, int64_t length, int64_t width, bool shift, bool with_previous, bool strided)
      : rows(rows), length(length), width(width), shift(shift) {
    test::Numbers numbers;
    const int64_t position_stride = width + (strided ? 5 : 0);
    const int64_t row_stride = length * position_stride + (strided ? 11 : 0);
    x = numbers.vector<T>(rows * row_stride);
    previous = numbers.vector<T>(rows * (width / 2));
    grad = numbers.vector<T>(rows * length * width);
    weight = numbers.vector<cpu::compute_t<T>>(width);
    in = {length,
          width,
          x.data(),
          row_stride,
          position_stride,
          weight.data(),
          with_previous ? previous.data() : nullptr,
          width / 2,
          shift,
          kEps};
  }

  int64_t kept() const { return shift ? width - width / 2 : width; }

  // Channel c of the shifted position t.
  double s(int64_t row, int64_t t, int64_t c) const {
    if (c >= kept()) --t;
    if (t >= 0) return double(in.x[row * in.x_row_stride + t * in.x_position_stride + c]);
    return in.previous ? double(previous[row * (width / 2) + c - kept()]) : 0.0;
  }

  double inverse(int64_t row, int64_t t) const {
    double squares = 0;
    for (int64_t c = 0; c < width; ++c) squares += s(row, t, c) * s(row, t, c);
    return 1 / std::max(std::sqrt(squares / double(width)), kEps);
  }
};

template <class T>
void forward_and_backward(const Case<T>& test_case) {
  using C = cpu::compute_t<T>;
  const auto& [rows, length, width] = std::tie(test_case.rows, test_case.length, test_case.width);
  const int64_t positions = rows * length, kept = test_case.kept(), delayed = width - kept;
  std::vector<double> out(positions * width), inverse(positions), grad_x(positions * width);
  std::vector<double> grad_previous(rows * delayed), grad_weight(width);
  for (int64_t i = 0; i < positions; ++i) {
    const int64_t row = i / length, t = i % length;
    inverse[i] = test_case.inverse(row, t);
    double along = 0;
    for (int64_t c = 0; c < width; ++c) {
      const double normalized = test_case.s(row, t, c) * inverse[i];
      const double g = double(test_case.grad[i * width + c]);
      out[i * width + c] = normalized * double(test_case.weight[c]);
      grad_weight[c] += g * normalized;
      along += g * double(test_case.weight[c]) * normalized / double(width);
    }
    if (inverse[i] >= 1 / kEps) along = 0;
    for (int64_t c = 0; c < width; ++c) {
      const double scaled = double(test_case.grad[i * width + c]) * double(test_case.weight[c]);
      const double grad_s = inverse[i] * (scaled - test_case.s(row, t, c) * inverse[i] * along);
      if (c < kept) {
        grad_x[i * width + c] += grad_s;
      } else if (t > 0) {
        grad_x[(i - 1) * width + c] += grad_s;
      } else {
        grad_previous[row * delayed + c - kept] += grad_s;
      }
    }
  }

  // In two ranges, as two threads would.
  const int64_t half = positions / 2;
  std::vector<T> got(positions * width);
  std::vector<C> got_inverse(positions);
  cpu::shift_rms_norm(test_case.in, got.data(), got_inverse.data(), 0, half);
  cpu::shift_rms_norm(test_case.in, got.data(), got_inverse.data(), half, positions);
  CHECK(test::all_close(got, out));
  CHECK(test::all_close(got_inverse, inverse));

  std::vector<T> got_x(positions * width), got_previous(rows * delayed);
  std::vector<C> got_weight(width), more_weight(width);
  cpu::shift_rms_norm_backward(test_case.in, test_case.grad.data(), got_inverse.data(),
                               got_x.data(), got_previous.data(), got_weight.data(), 0, half);
  cpu::shift_rms_norm_backward(test_case.in, test_case.grad.data(), got_inverse.data(),
                               got_x.data(), got_previous.data(), more_weight.data(), half,
                               positions);
  for (int64_t c = 0; c < width; ++c) got_weight[c] += more_weight[c];
  CHECK(test::all_close(got_x, grad_x));
  if (test_case.in.previous && length > 0) CHECK(test::all_close(got_previous, grad_previous));
  CHECK(test::all_close(got_weight, grad_weight));
}

template <class T>
void all_sizes() {
  for (const int64_t rows : {0, 1, 3}) {
    for (const int64_t length : {0, 1, 2, 5}) {
      for (const int64_t width : {1, 2, 3, 16, 37, 130}) {
        for (const bool strided : {false, true}) {
          forward_and_backward(Case<T>(rows, length, width, false, false, strided));
          forward_and_backward(Case<T>(rows, length, width, true, false, strided));
          forward_and_backward(Case<T>(rows, length, width, true, true, strided));
        }
      }
    }
  }
}

void bounds_a_vanishing_norm() {
  Case<double> zeros(1, 3, 4, true, false, false);
  std::fill(zeros.x.begin(), zeros.x.end(), 1e-10);
  forward_and_backward(zeros);
  std::fill(zeros.x.begin(), zeros.x.end(), 0.0);
  forward_and_backward(zeros);
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  bounds_a_vanishing_norm();
  return test::result();
}
