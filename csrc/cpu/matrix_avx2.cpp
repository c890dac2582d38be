// The inner loop of matrix.h with AVX2 and FMA: see matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>

#include "cpu/bfloat16.h"

namespace mblm::cpu {
namespace {

#define MBLM_AVX2 __attribute__((target("avx2,fma")))

// How far ahead of the multiplications rounded weights are asked for. Reading them takes so little
// time that the machine's own prefetching would not keep up; float32 is better without.
constexpr int64_t kAhead = 1024;

MBLM_AVX2 inline float sum(__m256 v) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

MBLM_AVX2 inline int64_t sum(__m256i v) {
  const __m256i wide = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                                        _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
  const __m128i q = _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return _mm_cvtsi128_si64(q) + _mm_extract_epi64(q, 1);
}

template <class T>
MBLM_AVX2 inline __m256i load(const T* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

MBLM_AVX2 void dots_of_float(const void* weights, const float* x, int64_t n, float* sums,
                             int64_t count) {
  const float* weight = static_cast<const float*>(weights);
  const auto multiply = [&](int64_t i, __m256 sum) __attribute__((target("avx2,fma"))) {
    return _mm256_fmadd_ps(_mm256_loadu_ps(weight + i), _mm256_loadu_ps(x + i), sum);
  };
  for (int64_t row = 0; row < count; ++row, weight += n) {
    __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      a = multiply(i, a);
      b = multiply(i + 8, b);
      c = multiply(i + 16, c);
      d = multiply(i + 24, d);
    }
    float rest = 0;
    for (; i < n; ++i) rest += x[i] * weight[i];
    sums[row] = sum(_mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d))) + rest;
  }
}

// Of 16 values those with even index come first: a word of 32 bits holds two weights, of which one
// becomes a float by a shift and the other by a mask.
MBLM_AVX2 void part_even_and_odd(const float* x, int64_t n, float* prepared) {
  float* to = prepared + kPreparedHeader;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int64_t k = 0; k < 8; ++k) {
      to[i + k] = x[i + 2 * k];
      to[i + 8 + k] = x[i + 2 * k + 1];
    }
  }
  std::copy_n(x + i, n - i, to + i);
}

MBLM_AVX2 void dots_of_bfloat16(const void* weights, const float* prepared, int64_t n, float* sums,
                                int64_t count) {
  const float* x = prepared + kPreparedHeader;
  const BFloat16* weight = static_cast<const BFloat16*>(weights);
  const __m256i upper = _mm256_set1_epi32(int32_t(0xffff0000u));
  for (int64_t row = 0; row < count; ++row, weight += n) {
    __m256 even[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, odd[2] = {even[0], even[0]};
    const auto multiply = [&](int64_t i, int k) __attribute__((target("avx2,fma"))) {
      const __m256i pair = load(weight + i);
      even[k] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)),
                                _mm256_loadu_ps(x + i), even[k]);
      odd[k] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pair, upper)),
                               _mm256_loadu_ps(x + i + 8), odd[k]);
    };
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(weight + i) + kAhead, _MM_HINT_T0);
      multiply(i, 0);
      multiply(i + 16, 1);
    }
    if (i + 16 <= n) {
      multiply(i, 0);
      i += 16;
    }
    float rest = 0;
    for (; i < n; ++i) rest += x[i] * float(weight[i]);
    sums[row] =
        sum(_mm256_add_ps(_mm256_add_ps(even[0], odd[0]), _mm256_add_ps(even[1], odd[1]))) + rest;
  }
}

MBLM_AVX2 void dots_of_int8(const void* weights, const float* prepared, int64_t n, float* sums,
                            int64_t count) {
  // Each of eight sums takes two products of sixteen columns.
  constexpr int64_t kColumns = kColumnsPerInt32 * 8;
  const int16_t* x = int16_values(prepared);
  const int8_t* weight = static_cast<const int8_t*>(weights);
  for (int64_t row = 0; row < count; ++row, weight += n) {
    int64_t total = 0, i = 0;
    while (i + 16 <= n) {
      const int64_t end = std::min(i + kColumns, n);
      __m256i products = _mm256_setzero_si256();
      const auto multiply = [&](int64_t at) __attribute__((target("avx2,fma"))) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + at));
        const __m256i pairs = _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), load(x + at));
        products = _mm256_add_epi32(products, pairs);
      };
      for (; i + 64 <= end; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(weight + i) + kAhead, _MM_HINT_T0);
        multiply(i);
        multiply(i + 16);
        multiply(i + 32);
        multiply(i + 48);
      }
      for (; i + 16 <= end; i += 16) multiply(i);
      total += sum(products);
    }
    for (; i < n; ++i) total += int32_t(x[i]) * weight[i];
    sums[row] = float(total) * prepared[0];
  }
}

}  // namespace

void add_avx2_kernels(std::vector<MatrixKernels>& kernels) {
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.insert(kernels.begin(), {"AVX2",
                                     {nullptr, dots_of_float},
                                     {part_even_and_odd, dots_of_bfloat16},
                                     {round_to_int16, dots_of_int8}});
  }
}

}  // namespace mblm::cpu

#else

namespace mblm::cpu {
void add_avx2_kernels(std::vector<MatrixKernels>&) {}
}  // namespace mblm::cpu

#endif
