// The inner loop of matrix.h with AVX-512 and, where there are, BF16 and VNNI instructions: see
// matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#ifndef MBLM_EMULATED  // A test defines it and what stands in for the instructions.
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>

#include "cpu/bfloat16.h"

// GCC 12 takes the undefined values in its own intrinsics for uninitialized ones.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace mblm::cpu {
namespace {

#ifdef MBLM_EMULATED
#define MBLM_TARGET(FEATURES)
#else
#define MBLM_TARGET(FEATURES) __attribute__((target(FEATURES)))
#endif
#define MBLM_AVX512 MBLM_TARGET("avx512f,avx512bw,avx512vl,avx2,fma")
#define MBLM_VNNI MBLM_TARGET("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")
#define MBLM_BF16 MBLM_TARGET("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")

template <class T>
MBLM_AVX512 inline __m512i load(const T* p) {
  return _mm512_loadu_si512(p);
}

MBLM_AVX512 inline float sum(__m512 v) {
  float lanes[16];
  _mm512_storeu_ps(lanes, v);
  for (int64_t half = 8; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

MBLM_AVX512 inline int64_t sum(__m512i v) {
  int32_t lanes[16];
  _mm512_storeu_si512(lanes, v);
  int64_t total = 0;
  for (const int32_t lane : lanes) total += lane;
  return total;
}

MBLM_AVX512 void dots_of_float(const void* weights, int64_t apart, const float* x, int64_t n,
                               float* sums, int64_t count) {
  const float* weight = static_cast<const float*>(weights);
  for (int64_t row = 0; row < count; ++row, weight += n) {
    __m512 a[kStreams], b[kStreams];
    for (int64_t k = 0; k < kStreams; ++k) a[k] = b[k] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m512 first = _mm512_loadu_ps(x + i), second = _mm512_loadu_ps(x + i + 16);
      for (int64_t k = 0; k < kStreams; ++k) {
        const float* w = weight + k * apart * n + i;
        a[k] = _mm512_fmadd_ps(_mm512_loadu_ps(w), first, a[k]);
        b[k] = _mm512_fmadd_ps(_mm512_loadu_ps(w + 16), second, b[k]);
      }
    }
    for (int64_t k = 0; k < kStreams; ++k) {
      const float* w = weight + k * apart * n;
      float rest = 0;
      for (int64_t j = i; j < n; ++j) rest += x[j] * w[j];
      sums[k * count + row] = sum(_mm512_add_ps(a[k], b[k])) + rest;
    }
  }
}

// x as the sum of two bfloat16, which together have 16 bits of it: all the upper ones, then all
// the lower ones.
MBLM_BF16 void split_in_two(const float* x, int64_t n, float* prepared) {
  BFloat16* upper = reinterpret_cast<BFloat16*>(prepared + kPreparedHeader);
  BFloat16* lower = upper + n;
  for (int64_t i = 0; i < n; ++i) {
    upper[i] = BFloat16(x[i]);
    // Of an infinity there is nothing left, not even NaN.
    const float left = x[i] - float(upper[i]);
    lower[i] = BFloat16(std::isnan(left) && !std::isnan(x[i]) ? 0.f : left);
  }
}

MBLM_BF16 void dots_of_bfloat16(const void* weights, int64_t apart, const float* prepared,
                                int64_t n, float* sums, int64_t count) {
  const BFloat16* upper = reinterpret_cast<const BFloat16*>(prepared + kPreparedHeader);
  const BFloat16* lower = upper + n;
  const BFloat16* weight = static_cast<const BFloat16*>(weights);
  for (int64_t row = 0; row < count; ++row, weight += n) {
    __m512 a[kStreams], b[kStreams];
    for (int64_t k = 0; k < kStreams; ++k) a[k] = b[k] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m512bh first = (__m512bh)load(upper + i), second = (__m512bh)load(lower + i);
      for (int64_t k = 0; k < kStreams; ++k) {
        const __m512bh pairs = (__m512bh)load(weight + k * apart * n + i);
        a[k] = _mm512_dpbf16_ps(a[k], pairs, first);
        b[k] = _mm512_dpbf16_ps(b[k], pairs, second);
      }
    }
    for (int64_t k = 0; k < kStreams; ++k) {
      const BFloat16* w = weight + k * apart * n;
      float rest = 0;
      for (int64_t j = i; j < n; ++j) rest += (float(upper[j]) + float(lower[j])) * float(w[j]);
      sums[k * count + row] = sum(_mm512_add_ps(a[k], b[k])) + rest;
    }
  }
}

MBLM_VNNI void dots_of_int8(const void* weights, int64_t apart, const float* prepared, int64_t n,
                            float* sums, int64_t count) {
  // Each of sixteen sums takes two products of 32 columns.
  constexpr int64_t kColumns = kColumnsPerInt32 * 16;
  const int16_t* x = int16_values(prepared);
  const int8_t* weight = static_cast<const int8_t*>(weights);
  for (int64_t row = 0; row < count; ++row, weight += n) {
    int64_t totals[kStreams] = {}, i = 0;
    while (i + 32 <= n) {
      const int64_t end = std::min(i + kColumns, n);
      __m512i products[kStreams];
      for (int64_t k = 0; k < kStreams; ++k) products[k] = _mm512_setzero_si512();
      for (; i + 32 <= end; i += 32) {
        const __m512i values = load(x + i);
        for (int64_t k = 0; k < kStreams; ++k) {
          const __m256i bytes =
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + k * apart * n + i));
          products[k] = _mm512_dpwssd_epi32(products[k], _mm512_cvtepi8_epi16(bytes), values);
        }
      }
      for (int64_t k = 0; k < kStreams; ++k) totals[k] += sum(products[k]);
    }
    for (int64_t k = 0; k < kStreams; ++k) {
      const int8_t* w = weight + k * apart * n;
      for (int64_t j = i; j < n; ++j) totals[k] += int32_t(x[j]) * w[j];
      sums[k * count + row] = float(totals[k]) * prepared[0];
    }
  }
}

constexpr Kernel kFloat32 = {nullptr, dots_of_float};
constexpr Kernel kBFloat16 = {split_in_two, dots_of_bfloat16};
constexpr Kernel kInt8 = {round_to_int16, dots_of_int8};

}  // namespace

#ifndef MBLM_EMULATED
void add_avx512_kernels(std::vector<MatrixKernels>& kernels) {
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))) {
    return;
  }
  // Without instructions for them, rounded weights are no quicker in wider registers.
  MatrixKernels best = kernels.front();
  best.name = "AVX-512";
  best.float32 = kFloat32;
  if (__builtin_cpu_supports("avx512bf16")) best.bfloat16 = kBFloat16;
  if (__builtin_cpu_supports("avx512vnni")) best.int8 = kInt8;
  kernels.insert(kernels.begin(), best);
}
#endif

}  // namespace mblm::cpu

#else

namespace mblm::cpu {
void add_avx512_kernels(std::vector<MatrixKernels>&) {}
}  // namespace mblm::cpu

#endif
