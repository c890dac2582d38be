// What the kernels' tests share: checks that count failures, numbers, comparisons.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cpu/bfloat16.h"

namespace mblm::test {

inline int failures = 0;

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      ++mblm::test::failures;                                               \
    }                                                                       \
  } while (false)

// Numbers in [-1, 1), the same in every run.
class Numbers {
 public:
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return double(state_ >> 11) / double(uint64_t(1) << 52) - 1;
  }

  template <class T>
  std::vector<T> vector(int64_t size) {
    std::vector<T> values(size);
    for (T& value : values) value = T(next());
    return values;
  }

  std::vector<int64_t> ids(int64_t size, int64_t below) {
    std::vector<int64_t> values(size);
    for (int64_t& value : values) value = int64_t((next() + 1) / 2 * double(below));
    return values;
  }

 private:
  uint64_t state_ = 1;
};

// Relative error of a value that was computed in the type's precision and rounded once.
template <class T>
constexpr double kTolerance = 1e-5;
template <>
inline constexpr double kTolerance<double> = 1e-12;
template <>
inline constexpr double kTolerance<cpu::BFloat16> = 8e-3;

template <class T>
bool close(T got, double expected) {
  return std::fabs(double(got) - expected) <= kTolerance<T> * (1 + std::fabs(expected));
}

template <class T>
bool all_close(const std::vector<T>& got, const std::vector<double>& expected) {
  if (got.size() != expected.size()) return false;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!close(got[i], expected[i])) {
      std::printf("[%zu]: got %g, expected %g\n", i, double(got[i]), expected[i]);
      return false;
    }
  }
  return true;
}

// The exit status of a test program.
inline int result() {
  if (failures > 0) std::printf("%d checks failed\n", failures);
  return failures > 0;
}

}  // namespace mblm::test
