// The inner loops of matrix.h with AVX-512 and, where there are, VNNI instructions: see
// matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#ifndef MBLM_EMULATED  // A test defines it and what stands in for the instructions.
#include <immintrin.h>
#endif

#include <algorithm>
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

using Vector = __m512;
constexpr int64_t kLanes = 16;
constexpr int kFewOutputs = 3, kFewRows = 8, kManyOutputs = 6, kManyRows = 4;

MBLM_AVX512 inline Vector zeros() {
  return _mm512_setzero_ps();
}

MBLM_AVX512 inline Vector load(const float* values) {
  return _mm512_loadu_ps(values);
}

MBLM_AVX512 inline Vector load(const BFloat16* values) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

MBLM_AVX512 inline void store(float* values, Vector v) {
  _mm512_storeu_ps(values, v);
}

MBLM_AVX512 inline Vector multiply_add(Vector a, Vector b, Vector sum) {
  return _mm512_fmadd_ps(a, b, sum);
}

// Each lane's sum with those 8, 4 and 12 lanes from it.
MBLM_AVX512 inline __m128 fold(Vector v) {
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), upper);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

}  // namespace
}  // namespace mblm::cpu

#define MBLM_TILE MBLM_AVX512
#include "cpu/matrix_tile.h"

namespace mblm::cpu {
namespace {

// Sixteen integers of 32 bits as the sums of eight each, of 64 bits; those of four fit 32 bits.
MBLM_AVX512 inline __m128i fold(__m512i v) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i quarter =
      _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m256i wide = _mm256_cvtepi32_epi64(quarter);
  return _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

// Columns of which four of sixteen sums fit 32 bits: 4 * 4 * 255 * 128 * (256 + 1) * 16 < 2^31.
constexpr int64_t kColumnsPerSum = 16 * kTileInputs;

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

// sums[r * kPanelStride + k] = the sum of a tile's output k and row r. The instruction multiplies
// bytes without sign by bytes with one: 128 is added to each weight, and what that adds to the sum
// is taken off at the end. All sums are exact. Of each tile, kAsked lines further ahead are asked
// for.
template <int kRows, int kAsked>
MBLM_VNNI void multiply_int8(const int8_t* weight, const int8_t* ahead, const float* prepared,
                             int64_t row_stride, int64_t n, float* sums) {
  static_assert(kTileInputs == sizeof(__m512i) && kTileOutputs == kStreams);
  const __m512i sign = _mm512_set1_epi8(-128);
  const int64_t to_lower = round_up(n, kTileInputs);
  const int8_t* upper[kRows];
  int64_t totals[kRows][kTileOutputs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float* row = prepared + r * row_stride;
    upper[r] = reinterpret_cast<const int8_t*>(int16_values(row) + to_lower);
    int64_t added;
    std::memcpy(&added, row + 2, sizeof(added));
    std::fill_n(totals[r], kTileOutputs, -added);
  }
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min(i + kColumnsPerSum, n);
    __m512i a[kRows][kTileOutputs], b[kRows][kTileOutputs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int64_t k = 0; k < kTileOutputs; ++k) a[r][k] = b[r][k] = _mm512_setzero_si512();
    }
    for (; i < end; i += kTileInputs) {
      __m512i bytes[kTileOutputs];
#pragma GCC unroll 8
      for (int64_t k = 0; k < kTileOutputs; ++k) {
        if (k < kAsked) __builtin_prefetch(ahead + k * kTileInputs);
        bytes[k] = _mm512_xor_si512(_mm512_loadu_si512(weight + k * kTileInputs), sign);
      }
      weight += kTileOutputs * kTileInputs;
      ahead += kTileOutputs * kTileInputs;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i first = _mm512_loadu_si512(upper[r] + i);
        const __m512i second = _mm512_loadu_si512(upper[r] + to_lower + i);
#pragma GCC unroll 8
        for (int64_t k = 0; k < kTileOutputs; ++k) {
          a[r][k] = _mm512_dpbusd_epi32(a[r][k], bytes[k], first);
          b[r][k] = _mm512_dpbusd_epi32(b[r][k], bytes[k], second);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      __m128i of[kTileOutputs];
#pragma GCC unroll 8
      for (int64_t k = 0; k < kTileOutputs; ++k) {
        of[k] = fold(_mm512_add_epi32(_mm512_slli_epi32(a[r][k], 8), b[r][k]));
      }
      add_sums(of[0], of[1], of[2], of[3], totals[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < kTileOutputs; ++k) {
      sums[r * kPanelStride + k] = float(totals[r][k]) * prepared[r * row_stride];
    }
  }
}

MBLM_VNNI void multiply_row_of_int8(const void* weights, int64_t, const float* prepared, int64_t n,
                                    float* sums, int64_t count) {
  const int8_t* weight = static_cast<const int8_t*>(weights);
  for (int64_t output = 0; output < count; output += kTileOutputs) {
    const int8_t* const tiles = weight + output * round_up(n, kTileInputs);
    multiply_int8<1, kTileOutputs>(tiles, tiles + kTilesAhead, prepared, 0, n, sums + output);
  }
}

MBLM_VNNI void multiply_panel_of_int8(const Panel& panel) {
  // By how many lines they ask for.
  constexpr decltype(&multiply_int8<1, 0>) kOne[] = {
      multiply_int8<1, 0>, multiply_int8<1, 1>, multiply_int8<1, 2>, nullptr, multiply_int8<1, 4>};
  constexpr decltype(kOne) kTwo = {multiply_int8<2, 0>, multiply_int8<2, 1>, multiply_int8<2, 2>,
                                   nullptr, multiply_int8<2, 4>};
  const int64_t n = panel.n;
  for (int64_t output = 0; output < panel.outputs; output += kTileOutputs) {
    const int8_t* const weight =
        static_cast<const int8_t*>(panel.weight) + output * round_up(n, kTileInputs);
    // All turns ask for some of the weights behind the tile's: memory is to be read meanwhile.
    int64_t asked = 0;
    for (int64_t row = 0; row < panel.rows; row += 2) {
      const int64_t turns = (panel.rows - row + 1) / 2;
      const int64_t lines = (kTileOutputs - asked + turns - 1) / turns;
      const auto multiply = (row + 1 < panel.rows ? kTwo : kOne)[lines];
      multiply(weight, weight + kTilesAhead + asked * kTileInputs, panel.x + row * panel.row_stride,
               panel.row_stride, n, panel.sums + row * kPanelStride + output);
      asked += lines;
    }
  }
}

constexpr Kernel kFloat32 = {nullptr, multiply_row<float>, multiply_panel<float>};
constexpr Kernel kBFloat16 = {nullptr, multiply_row<BFloat16>, multiply_panel<BFloat16>};
constexpr Kernel kInt8 = {split_in_bytes, multiply_row_of_int8, multiply_panel_of_int8, 1};

}  // namespace

#ifndef MBLM_EMULATED
void add_avx512_kernels(std::vector<MatrixKernels>& kernels) {
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))) {
    return;
  }
  MatrixKernels best = {"AVX-512", kFloat32, kBFloat16, kernels.front().int8};
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
