// The inner loop of matrix.h with AVX2 and FMA: see matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include "cpu/bfloat16.h"

namespace mblm::cpu {
namespace {

#define MBLM_AVX2 __attribute__((target("avx2,fma")))

MBLM_AVX2 inline __m256 load(const float* p) {
  return _mm256_loadu_ps(p);
}

MBLM_AVX2 inline __m256 load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

MBLM_AVX2 inline __m256 load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

MBLM_AVX2 inline float sum(__m256 v) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

template <class W>
MBLM_AVX2 void dots(const void* weights, const float* x, int64_t n, float* sums, int64_t count) {
  const W* weight = static_cast<const W*>(weights);
  for (int64_t column = 0; column < count; ++column, weight += n) {
    __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      a = _mm256_fmadd_ps(load(weight + i), load(x + i), a);
      b = _mm256_fmadd_ps(load(weight + i + 8), load(x + i + 8), b);
      c = _mm256_fmadd_ps(load(weight + i + 16), load(x + i + 16), c);
      d = _mm256_fmadd_ps(load(weight + i + 24), load(x + i + 24), d);
    }
    float rest = 0;
    for (; i < n; ++i) rest += x[i] * float(weight[i]);
    sums[column] = sum(_mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d))) + rest;
  }
}

}  // namespace

void add_avx2_kernels(std::vector<MatrixKernels>& kernels) {
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.push_back({"AVX2", dots<float>, dots<BFloat16>, dots<int8_t>});
  }
}

}  // namespace mblm::cpu

#else

namespace mblm::cpu {
void add_avx2_kernels(std::vector<MatrixKernels>&) {}
}  // namespace mblm::cpu

#endif
