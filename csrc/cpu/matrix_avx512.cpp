// The inner loop of matrix.h with AVX-512: see matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include "cpu/bfloat16.h"

// GCC 12 takes the undefined values in its own intrinsics for uninitialized ones.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace mblm::cpu {
namespace {

#define MBLM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))

MBLM_AVX512 inline __m512 load(const float* p) {
  return _mm512_loadu_ps(p);
}

MBLM_AVX512 inline __m512 load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

MBLM_AVX512 inline __m512 load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

template <class W>
MBLM_AVX512 void dots(const void* weights, const float* x, int64_t n, float* sums, int64_t count) {
  const W* weight = static_cast<const W*>(weights);
  for (int64_t column = 0; column < count; ++column, weight += n) {
    __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      a = _mm512_fmadd_ps(load(weight + i), load(x + i), a);
      b = _mm512_fmadd_ps(load(weight + i + 16), load(x + i + 16), b);
      c = _mm512_fmadd_ps(load(weight + i + 32), load(x + i + 32), c);
      d = _mm512_fmadd_ps(load(weight + i + 48), load(x + i + 48), d);
    }
    float rest = 0;
    for (; i < n; ++i) rest += x[i] * float(weight[i]);
    const __m512 all = _mm512_add_ps(_mm512_add_ps(a, c), _mm512_add_ps(b, d));
    sums[column] = _mm512_reduce_add_ps(all) + rest;
  }
}

}  // namespace

void add_avx512_kernels(std::vector<MatrixKernels>& kernels) {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    kernels.push_back({"AVX-512", dots<float>, dots<BFloat16>, dots<int8_t>});
  }
}

}  // namespace mblm::cpu

#else

namespace mblm::cpu {
void add_avx512_kernels(std::vector<MatrixKernels>&) {}
}  // namespace mblm::cpu

#endif
