// What the CPU kernels share: clones per instruction set, element types, sums in lanes.
//
// A kernel is a function on raw pointers that works on a range of independent items; the caller
// gives ranges to threads. No item's result depends on how the range was cut.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/bfloat16.h"

#define MBLM_INLINE inline __attribute__((always_inline))
#define MBLM_INLINE_LAMBDA __attribute__((always_inline))

// On a function: compiled for several instruction sets, of which the loader takes the best that
// the machine has. A sanitizer's runtime is not there yet when the loader chooses.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define MBLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// Whether the clone that runs here computes with 64 bytes at once.
#define MBLM_HAS_WIDE_REGISTERS __builtin_cpu_supports("x86-64-v4")
#else
#define MBLM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define MBLM_CLONES
#endif
#ifndef MBLM_HAS_WIDE_REGISTERS
#define MBLM_HAS_WIDE_REGISTERS false
#endif

// Behind the definition of a template of a kernel: it is compiled for all types of elements.
#define MBLM_INSTANTIATE(KERNEL)                    \
  template decltype(KERNEL<float>) KERNEL<float>;   \
  template decltype(KERNEL<double>) KERNEL<double>; \
  template decltype(KERNEL<BFloat16>) KERNEL<BFloat16>;

// In the body of a loop around a loop over columns: GCC would jam several of the outer loop's turns
// into the inner loop, which it then no longer vectorizes.
#define MBLM_NO_JAM asm volatile("")

namespace mblm::cpu {

// What values of type T are computed in, element by element. Sums are in double for every type.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

// Values of any type that are computed with at once, at most, and whole lanes of them.
constexpr int64_t kMostLanes = 8;
inline int64_t padded(int64_t size) {
  return (size + kMostLanes - 1) / kMostLanes * kMostLanes;
}

// term(0) + ... + term(n - 1), in sixteen interleaved sums that the compiler keeps in registers.
template <class Term>
MBLM_INLINE double sum_in_lanes(int64_t n, Term term) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] += term(i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <class T>
MBLM_INLINE double sum_of_squares(const T* x, int64_t n) {
  return sum_in_lanes(n, [x](int64_t i) MBLM_INLINE_LAMBDA {
    const double value = x[i];
    return value * value;
  });
}

// Asks for n values that will be read soon, one request per cache line of 64 bytes.
template <class T>
MBLM_INLINE void prefetch(const T* values, int64_t n) {
  for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(T))) __builtin_prefetch(values + i);
}

// Columns that a kernel summing over rows holds in one tile of sums on the stack.
constexpr int64_t kTileColumns = 512;

}  // namespace mblm::cpu
