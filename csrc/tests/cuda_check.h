// What the tests of emulated CUDA kernels share.
#pragma once

#include <cstring>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda_emulation.h"

namespace mblm::test {

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// What run(), which launches kernels and gives a tuple of vectors, gives: the same bits in
// whichever order the threads run.
template <class Run>
auto in_both_orders(Run run) {
  cuda::emulation::mblm_falling_order = false;
  auto rising = run();
  cuda::emulation::mblm_falling_order = true;
  const auto falling = run();
  cuda::emulation::mblm_falling_order = false;
  std::apply(
      [&](const auto&... a) {
        std::apply([&](const auto&... b) { CHECK((same_bits(a, b) && ...)); }, falling);
      },
      rising);
  return rising;
}

// Values that stand out where a kernel does not write.
template <class T>
std::vector<T> unwritten(int64_t size) {
  return std::vector<T>(size, T(7.0f));
}

// Relative error of a value that was computed in the type's precision, in another order.
template <class T, class Expected>
bool nearly(const std::vector<T>& got, const std::vector<Expected>& expected, double factor = 1) {
  if (got.size() != expected.size()) return false;
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = double(got[i]), b = double(expected[i]);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    if (!(std::fabs(a - b) <= factor * kTolerance<T> * (1 + std::fabs(b)))) {
      std::printf("[%zu]: got %g, expected %g\n", i, a, b);
      return false;
    }
  }
  return true;
}

}  // namespace mblm::test
