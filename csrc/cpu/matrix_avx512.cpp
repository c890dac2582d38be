// The inner loops of matrix.h with AVX-512 and, where there are, VNNI instructions: see
// matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#ifndef MBLM_EMULATED  // A test defines it and what stands in for the instructions.
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <iterator>

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
#define MBLM_VNNI MBLM_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")

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

// totals (twice four of 64 bits) += the sums of each output's sixteen integers, of four outputs, of
// which the sums of four fit 32 bits.
MBLM_VNNI inline __m512i add_sums(const __m512i (&of)[kTileOutputs], __m512i totals) {
  const __m512i ab =
      _mm512_add_epi32(_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[0], of[1]));
  const __m512i cd =
      _mm512_add_epi32(_mm512_unpacklo_epi32(of[2], of[3]), _mm512_unpackhi_epi32(of[2], of[3]));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(all));
  const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(all, 1));
  return _mm512_add_epi64(totals, _mm512_add_epi64(low, high));
}

// sum += each four products of bytes, those of `bytes` without sign. GCC would copy sums from
// register to register.
MBLM_VNNI inline __m512i multiply_bytes(__m512i bytes, __m512i values, __m512i sum) {
#ifdef MBLM_EMULATED
  return _mm512_dpbusd_epi32(sum, bytes, values);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(values));
  return sum;
#endif
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
// is taken off at the end. All sums are exact. At each tile, kAsked lines of later weights are
// prefetched: into the first cache, or into the second where several turns prefetch a part each,
// since the rows of the turns between would drive them out of the first.
template <int kRows, int kAsked>
MBLM_VNNI void multiply_int8(const int8_t* weight, const int8_t* ahead, const float* prepared,
                             int64_t row_stride, int64_t n, float* sums) {
  static_assert(kTileInputs == sizeof(__m512i) && kTileOutputs == kStreams);
  constexpr int kNear = kAsked == kTileOutputs ? 3 : 2;
  const __m512i sign = _mm512_set1_epi8(-128);
  const int64_t to_lower = round_up(n, kTileInputs);
  const int8_t* upper[kRows];
  __m512i totals[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float* row = prepared + r * row_stride;
    upper[r] = reinterpret_cast<const int8_t*>(int16_values(row) + to_lower);
    totals[r] = _mm512_setzero_si512();
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
        if (k < kAsked) __builtin_prefetch(ahead + k * kTileInputs, 0, kNear);
        bytes[k] = _mm512_xor_si512(_mm512_loadu_si512(weight + k * kTileInputs), sign);
      }
      weight += kTileOutputs * kTileInputs;
      ahead += kAsked * kTileInputs;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i first = _mm512_loadu_si512(upper[r] + i);
        const __m512i second = _mm512_loadu_si512(upper[r] + to_lower + i);
#pragma GCC unroll 8
        for (int64_t k = 0; k < kTileOutputs; ++k) {
          a[r][k] = multiply_bytes(bytes[k], first, a[r][k]);
          b[r][k] = multiply_bytes(bytes[k], second, b[r][k]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      __m512i of[kTileOutputs];
#pragma GCC unroll 8
      for (int64_t k = 0; k < kTileOutputs; ++k) {
        of[k] = _mm512_add_epi32(_mm512_slli_epi32(a[r][k], 8), b[r][k]);
      }
      totals[r] = add_sums(of, totals[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float* row = prepared + r * row_stride;
    int64_t added;
    std::memcpy(&added, row + 2, sizeof(added));
    const __m256i both = _mm256_add_epi64(_mm512_castsi512_si256(totals[r]),
                                          _mm512_extracti64x4_epi64(totals[r], 1));
    const __m128 values = _mm256_cvtepi64_ps(_mm256_sub_epi64(both, _mm256_set1_epi64x(added)));
    _mm_storeu_ps(sums + r * kPanelStride, _mm_mul_ps(values, _mm_set1_ps(row[0])));
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

// multiply_int8 by how many rows it has, and how many lines it asks for.
template <int kRows>
constexpr decltype(&multiply_int8<1, 0>) kAsking[] = {
    multiply_int8<kRows, 0>, multiply_int8<kRows, 1>, multiply_int8<kRows, 2>, nullptr,
    multiply_int8<kRows, 4>};
constexpr const decltype(&multiply_int8<1, 0>)* kByRows[] = {kAsking<1>, kAsking<2>, kAsking<3>};

MBLM_VNNI void multiply_panel_of_int8(const Panel& panel) {
  constexpr int64_t kRows = std::size(kByRows);
  const int64_t n = panel.n, filled = round_up(n, kTileInputs);
  for (int64_t output = 0; output < panel.outputs; output += kTileOutputs) {
    const int8_t* const weight = static_cast<const int8_t*>(panel.weight) + output * filled;
    // Each turn asks for its part of later weights, so that memory is read all the time.
    const int8_t* ahead = weight + kTilesAhead;
    int64_t left_to_ask = kTileOutputs;
    for (int64_t row = 0; row < panel.rows; row += kRows) {
      const int64_t left = panel.rows - row, turns = (left + kRows - 1) / kRows;
      const int64_t lines = (left_to_ask + turns - 1) / turns;
      const auto multiply = kByRows[std::min(left, kRows) - 1][lines];
      multiply(weight, ahead, panel.x + row * panel.row_stride, panel.row_stride, n,
               panel.sums + row * kPanelStride + output);
      ahead += lines * filled;
      left_to_ask -= lines;
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
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512dq")) {
    best.int8 = kInt8;
  }
  kernels.insert(kernels.begin(), best);
}
#endif

}  // namespace mblm::cpu

#else

namespace mblm::cpu {
void add_avx512_kernels(std::vector<MatrixKernels>&) {}
}  // namespace mblm::cpu

#endif
