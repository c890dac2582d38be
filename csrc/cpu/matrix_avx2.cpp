// The inner loop of matrix.h with AVX2 and FMA: see matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>

#include "cpu/bfloat16.h"
#include "cpu/stream_sums.h"

namespace mblm::cpu {
namespace {

#define MBLM_AVX2 __attribute__((target("avx2,fma")))

// Each lane's sum with that four lanes from it.
MBLM_AVX2 inline __m128 fold(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

// Eight integers of 32 bits as the sums of four each, of 64 bits.
MBLM_AVX2 inline __m128i fold(__m256i v) {
  const __m256i wide = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                                        _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
  return _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

// sums[k] = the sum of a[k] + b[k].
MBLM_AVX2 inline void store_both(const __m256 a[kStreams], const __m256 b[kStreams], float* sums) {
  store_sums(fold(_mm256_add_ps(a[0], b[0])), fold(_mm256_add_ps(a[1], b[1])),
             fold(_mm256_add_ps(a[2], b[2])), fold(_mm256_add_ps(a[3], b[3])), sums);
}

template <class T>
MBLM_AVX2 inline __m256i load(const T* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

MBLM_AVX2 void dots_of_float(const void* weights, int64_t apart, const float* x, int64_t n,
                             float* sums, int64_t count) {
  const float* weight = static_cast<const float*>(weights);
  for (int64_t row = 0; row < count; ++row, weight += n) {
    __m256 a[kStreams], b[kStreams];
    for (int64_t k = 0; k < kStreams; ++k) a[k] = b[k] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m256 first = _mm256_loadu_ps(x + i), second = _mm256_loadu_ps(x + i + 8);
      for (int64_t k = 0; k < kStreams; ++k) {
        const float* w = weight + k * apart * n + i;
        a[k] = _mm256_fmadd_ps(_mm256_loadu_ps(w), first, a[k]);
        b[k] = _mm256_fmadd_ps(_mm256_loadu_ps(w + 8), second, b[k]);
      }
    }
    store_both(a, b, sums + row * kStreams);
    for (int64_t k = 0; k < kStreams && i < n; ++k) {
      const float* w = weight + k * apart * n;
      float rest = 0;
      for (int64_t j = i; j < n; ++j) rest += x[j] * w[j];
      sums[row * kStreams + k] += rest;
    }
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

MBLM_AVX2 void dots_of_bfloat16(const void* weights, int64_t apart, const float* prepared,
                                int64_t n, float* sums, int64_t count) {
  const float* x = prepared + kPreparedHeader;
  const BFloat16* weight = static_cast<const BFloat16*>(weights);
  const __m256i upper = _mm256_set1_epi32(int32_t(0xffff0000u));
  for (int64_t row = 0; row < count; ++row, weight += n) {
    __m256 even[kStreams], odd[kStreams];
    for (int64_t k = 0; k < kStreams; ++k) even[k] = odd[k] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m256 first = _mm256_loadu_ps(x + i), second = _mm256_loadu_ps(x + i + 8);
      for (int64_t k = 0; k < kStreams; ++k) {
        const __m256i pairs = load(weight + k * apart * n + i);
        even[k] =
            _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), first, even[k]);
        odd[k] =
            _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pairs, upper)), second, odd[k]);
      }
    }
    store_both(even, odd, sums + row * kStreams);
    for (int64_t k = 0; k < kStreams && i < n; ++k) {
      const BFloat16* w = weight + k * apart * n;
      float rest = 0;
      for (int64_t j = i; j < n; ++j) rest += x[j] * float(w[j]);
      sums[row * kStreams + k] += rest;
    }
  }
}

MBLM_AVX2 void dots_of_int8(const void* weights, int64_t, const float* prepared, int64_t n,
                            float* sums, int64_t count) {
  // Each of eight sums takes two products of sixteen columns.
  constexpr int64_t kColumns = kColumnsPerInt32 * 8;
  static_assert(kTileOutputs == kStreams && kColumns % kTileInputs == 0);
  const int8_t* weight = static_cast<const int8_t*>(weights);
  for (int64_t output = 0; output < count; output += kTileOutputs) {
    int64_t totals[kTileOutputs] = {};
    for (int64_t i = 0; i < n;) {
      const int64_t end = std::min(i + kColumns, n);
      __m256i products[kTileOutputs];
      for (__m256i& product : products) product = _mm256_setzero_si256();
      for (; i < end; i += kTileInputs, weight += kTileOutputs * kTileInputs) {
        for (int64_t k = 0; k < kTileOutputs; ++k) {
          __builtin_prefetch(weight + k * kTileInputs + kTilesAhead);
        }
        for (int64_t part = 0; part < kTileInputs; part += 16) {
          const __m256i values = load(int16_values(prepared) + i + part);
          for (int64_t k = 0; k < kTileOutputs; ++k) {
            const int8_t* w = weight + k * kTileInputs + part;
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
            products[k] = _mm256_add_epi32(products[k],
                                           _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), values));
          }
        }
      }
      add_sums(fold(products[0]), fold(products[1]), fold(products[2]), fold(products[3]), totals);
    }
    for (int64_t k = 0; k < kTileOutputs; ++k) sums[output + k] = float(totals[k]) * prepared[0];
  }
}

}  // namespace

void add_avx2_kernels(std::vector<MatrixKernels>& kernels) {
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.insert(kernels.begin(), {"AVX2",
                                     {nullptr, dots_of_float},
                                     {part_even_and_odd, dots_of_bfloat16},
                                     {round_to_int16, dots_of_int8, 1}});
  }
}

}  // namespace mblm::cpu

#else

namespace mblm::cpu {
void add_avx2_kernels(std::vector<MatrixKernels>&) {}
}  // namespace mblm::cpu

#endif
