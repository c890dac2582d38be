// Tests of the emulated CUDA kernels of gated_rms_norm and shift_rms_norm against those of the CPU.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/rms_norms.cu"

using namespace mblm;

// Of either norm. other is the size of the gate, or of what is shifted in; none for 0.
template <class T, class Input, class OnCpu, class Backward>
void equals_cpu(const Input& in, int64_t positions, int64_t other, OnCpu on_cpu,
                Backward on_cpu_backward) {
  using C = cpu::compute_t<T>;
  test::Numbers numbers;
  const int64_t values = positions * in.width;
  const auto grad = numbers.vector<T>(values);
  std::vector<T> out(values), grad_x(values), grad_other(other);
  std::vector<C> inverse(positions), grad_weight(in.width);
  on_cpu(in, out.data(), inverse.data(), 0, positions);
  on_cpu_backward(in, grad.data(), inverse.data(), grad_x.data(),
                  other ? grad_other.data() : nullptr, grad_weight.data(), 0, positions);
  const int64_t parts = cuda::rms_norm_parts(positions);
  const auto [got, got_inverse, got_x, got_other, of_parts] = test::in_both_orders([&] {
    auto out = test::unwritten<T>(values), x = out, to_other = test::unwritten<T>(other);
    auto own = test::unwritten<C>(positions), weight = test::unwritten<C>(parts * in.width);
    CHECK(!cuda::rms_norm(in, positions, out.data(), own.data(), nullptr));
    CHECK(!cuda::rms_norm_backward(in, positions, grad.data(), inverse.data(), x.data(),
                                   other ? to_other.data() : nullptr, weight.data(), nullptr));
    return std::tuple(out, own, x, to_other, weight);
  });
  CHECK(test::nearly(got, out));
  CHECK(test::nearly(got_inverse, inverse));
  CHECK(test::nearly(got_x, grad_x));
  CHECK(test::nearly(got_other, grad_other));
  CHECK(test::nearly(test::sum_of_parts(of_parts, in.width), grad_weight, 4));
}

// gap: how much further apart than they must be positions lie.
template <class T>
void gated(int64_t positions, int64_t width, bool has_gate, int64_t gap) {
  test::Numbers numbers;
  const int64_t stride = width + gap;
  const auto x = numbers.vector<T>(positions * stride), gate = numbers.vector<T>(x.size());
  const auto weight = numbers.vector<cpu::compute_t<T>>(width);
  const cpu::GatedRmsNormInput<T> in{
      width, x.data(), stride, has_gate ? gate.data() : nullptr, stride, weight.data(), 1e-5};
  equals_cpu<T>(
      in, positions, has_gate ? positions * width : 0, [](auto... all) { cpu::rms_norm(all...); },
      [](auto... all) { cpu::rms_norm_backward(all...); });
}

template <class T>
struct Shifted {
  int64_t positions, other;
  std::vector<T> x, previous;
  std::vector<cpu::compute_t<T>> weight;
  cpu::ShiftRmsNormInput<T> in;

  Shifted(int64_t rows, int64_t length, int64_t width, bool shift, bool has_previous, int64_t gap)
      : positions(rows * length), other(has_previous ? rows * (width / 2) : 0) {
    test::Numbers numbers;
    x = numbers.vector<T>(positions * (width + gap));
    previous = numbers.vector<T>(rows * (width / 2));
    weight = numbers.vector<cpu::compute_t<T>>(width);
    const T* const before = has_previous ? previous.data() : nullptr;
    in = {length,    width, x.data(), length * (width + gap), width + gap, weight.data(), before,
          width / 2, shift, 1e-8};
  }

  void check() const {
    // Without a position, nothing is written of what is shifted in.
    equals_cpu<T>(
        in, positions, positions > 0 ? other : 0, [](auto... all) { cpu::rms_norm(all...); },
        [](auto... all) { cpu::rms_norm_backward(all...); });
  }
};

template <class T>
void all_sizes() {
  for (const int64_t width : {1, 37, 640}) {
    for (const int64_t gap : {0, 5}) {
      for (const bool has_gate : {false, true}) {
        for (const int64_t positions : {0, 1, 5}) gated<T>(positions, width, has_gate, gap);
      }
      for (const int64_t rows : {0, 2}) {
        for (const int64_t length : {0, 1, 5}) {
          Shifted<T>(rows, length, width, false, false, gap).check();
          Shifted<T>(rows, length, width, true, false, gap).check();
          Shifted<T>(rows, length, width, true, true, gap).check();
        }
      }
    }
  }
  for (const bool has_gate : {false, true}) gated<T>(150, 48, has_gate, 0);  // several parts
  Shifted<T>(9, 17, 48, true, true, 0).check();
  Shifted<T>(1, 3, 12800, true, true, 0).check();  // gradients are summed in no shared memory
}

// A row gives the same bits however its inputs lie in memory.
void alignment_makes_no_difference() {
  Shifted<float> given(2, 3, 640, true, true, 0);
  std::vector<float> out(given.x.size()), inverse(6), moved(given.x.size()), x(1, 0.0f);
  CHECK(!cuda::rms_norm(given.in, 6, out.data(), inverse.data(), nullptr));
  x.insert(x.end(), given.x.begin(), given.x.end());
  given.in.x = x.data() + 1;
  CHECK(!cuda::rms_norm(given.in, 6, moved.data(), inverse.data(), nullptr));
  CHECK(test::same_bits(out, moved));
}

void bounds_a_vanishing_norm() {
  for (const double value : {1e-10, 0.0}) {
    Shifted<double> given(1, 3, 4, true, false, 0);
    std::fill(given.x.begin(), given.x.end(), value);
    given.check();
  }
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  alignment_makes_no_difference();
  bounds_a_vanishing_norm();
  return test::result();
}
