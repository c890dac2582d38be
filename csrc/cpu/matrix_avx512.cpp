// The inner loop of matrix.h with AVX-512 and, where there are, BF16 and VNNI instructions: see
// matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#ifndef MBLM_EMULATED  // A test defines it and what stands in for the instructions.
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/bfloat16.h"
#include "cpu/stream_sums.h"

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

// Each lane's sum with those 8, 4 and 12 lanes from it.
MBLM_AVX512 inline __m128 fold(__m512 v) {
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), upper);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Eight integers of 32 bits as the sums of four each, of 64 bits.
MBLM_AVX512 inline __m128i fold(__m256i v) {
  const __m256i wide = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                                        _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
  return _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

MBLM_AVX512 inline __m128i fold(__m512i v) {
  return _mm_add_epi64(fold(_mm512_castsi512_si256(v)), fold(_mm512_extracti64x4_epi64(v, 1)));
}

// sums[k] = the sum of a[k] + b[k].
MBLM_AVX512 inline void store_both(const __m512 a[kStreams], const __m512 b[kStreams],
                                   float* sums) {
  store_sums(fold(_mm512_add_ps(a[0], b[0])), fold(_mm512_add_ps(a[1], b[1])),
             fold(_mm512_add_ps(a[2], b[2])), fold(_mm512_add_ps(a[3], b[3])), sums);
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
    store_both(a, b, sums + row * kStreams);
    for (int64_t k = 0; k < kStreams && i < n; ++k) {
      const float* w = weight + k * apart * n;
      float rest = 0;
      for (int64_t j = i; j < n; ++j) rest += x[j] * w[j];
      sums[row * kStreams + k] += rest;
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
    store_both(a, b, sums + row * kStreams);
    for (int64_t k = 0; k < kStreams && i < n; ++k) {
      const BFloat16* w = weight + k * apart * n;
      float rest = 0;
      for (int64_t j = i; j < n; ++j) rest += (float(upper[j]) + float(lower[j])) * float(w[j]);
      sums[row * kStreams + k] += rest;
    }
  }
}

// Columns whose products a sum of 32 bits holds: 4 * 255 * 128 * 64 * (256 + 1) < 2^31.
constexpr int64_t kColumnsPerSum = 64 * kTileInputs;

// Values of 16 bits x = 256 upper + lower as two of 8 bits, all the upper ones, then all the lower
// ones, behind those of 16 bits. The header keeps 128 times the sum of the values.
MBLM_VNNI void split_in_bytes(const float* x, int64_t n, float* prepared) {
  round_to_int16(x, n, prepared);
  const int64_t filled = round_up(n, kTileInputs);
  const int16_t* values = int16_values(prepared);
  int8_t* upper = reinterpret_cast<int8_t*>(prepared + kPreparedHeader) + 2 * filled;
  int8_t* lower = upper + filled;
  int64_t sum = 0;
  for (int64_t i = 0; i < filled; ++i) {
    upper[i] = int8_t((values[i] + 128) >> 8);
    lower[i] = int8_t(values[i]);
    sum += values[i];
  }
  sum *= 128;
  std::memcpy(prepared + 2, &sum, sizeof(sum));
}

// For how long weights are asked for: what is read once leaves the later caches as they are.
enum Locality { kOnce = 0, kKept = 3 };  // as GCC's builtin counts it

// The instruction multiplies bytes without sign by bytes with one: 128 is added to each weight, and
// what that adds to the sum is taken off at the end. All sums are exact.
template <Locality kLocality>
MBLM_VNNI void dots_of_int8(const void* weights, int64_t, const float* prepared, int64_t n,
                            float* sums, int64_t count) {
  static_assert(kTileInputs == sizeof(__m512i) && kTileOutputs == kStreams);
  const __m512i sign = _mm512_set1_epi8(-128);
  const int8_t* upper =
      reinterpret_cast<const int8_t*>(int16_values(prepared) + round_up(n, kTileInputs));
  const int8_t* lower = upper + round_up(n, kTileInputs);
  int64_t added;
  std::memcpy(&added, prepared + 2, sizeof(added));
  const int8_t* weight = static_cast<const int8_t*>(weights);
  for (int64_t output = 0; output < count; output += kTileOutputs) {
    int64_t totals[] = {-added, -added, -added, -added};
    for (int64_t i = 0; i < n;) {
      const int64_t end = std::min(i + kColumnsPerSum, n);
      __m512i a[kTileOutputs], b[kTileOutputs];
      for (int64_t k = 0; k < kTileOutputs; ++k) a[k] = b[k] = _mm512_setzero_si512();
      for (; i < end; i += kTileInputs) {
        const __m512i first = load(upper + i), second = load(lower + i);
        for (int64_t k = 0; k < kTileOutputs; ++k, weight += kTileInputs) {
          __builtin_prefetch(weight + kTilesAhead, 0, kLocality);
          const __m512i bytes = _mm512_xor_si512(load(weight), sign);
          a[k] = _mm512_dpbusd_epi32(a[k], bytes, first);
          b[k] = _mm512_dpbusd_epi32(b[k], bytes, second);
        }
      }
      for (int64_t k = 0; k < kTileOutputs; ++k) {
        a[k] = _mm512_add_epi32(_mm512_slli_epi32(a[k], 8), b[k]);
      }
      add_sums(fold(a[0]), fold(a[1]), fold(a[2]), fold(a[3]), totals);
    }
    for (int64_t k = 0; k < kTileOutputs; ++k) sums[output + k] = float(totals[k]) * prepared[0];
  }
}

constexpr Kernel kFloat32 = {nullptr, dots_of_float};
constexpr Kernel kBFloat16 = {split_in_two, dots_of_bfloat16};
constexpr Kernel kInt8 = {split_in_bytes, dots_of_int8<kKept>, 1, dots_of_int8<kOnce>};

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
