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

// The sums of each vector's lanes: those 8 from each other are added, then 4, 2 and 1. All at once
// takes fewer instructions than one after another, which is much where rows are short.
MBLM_AVX512 inline __m128 sums_of(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const Vector cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  const Vector fours =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const Vector pairs = _mm512_add_ps(fours, _mm512_shuffle_ps(fours, fours, 0x4e));
  const Vector sums = _mm512_add_ps(pairs, _mm512_shuffle_ps(pairs, pairs, 0xb1));
  return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sums));
}

}  // namespace
}  // namespace mblm::cpu

#define MBLM_TILE MBLM_AVX512
#include "cpu/matrix_tile.h"

namespace mblm::cpu {
namespace {

// Tiles whose sums stay in registers. Few rows are one tile, for weights that come from memory;
// tiles of many rows have theirs in a cache.
template <class W>
MBLM_AVX512 void multiply_panel(const Panel& panel) {
  constexpr int kFewRows = 8;
  if (panel.rows <= kFewRows) {
    multiply_in_tiles<W, W, 3, kFewRows>(panel);
  } else {
    multiply_in_tiles<W, float, 6, 4>(panel);
  }
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

// Columns whose sums fit 32 bits: 255 * 128 * 2^16 < 2^31.
constexpr int64_t kColumnsPerSum = 1 << 16;

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

// The four bytes of some inputs, in all lanes.
MBLM_VNNI inline __m512i four_bytes(const int8_t* values) {
  int32_t all;
  std::memcpy(&all, values, sizeof(all));
  return _mm512_set1_epi32(all);
}

// to (16 of 64 bits) += 256 upper + lower.
MBLM_VNNI inline void add_sums(__m512i upper, __m512i lower, int64_t* to) {
  for (int half = 0; half < 2; ++half) {
    const __m256i a = half ? _mm512_extracti64x4_epi64(upper, 1) : _mm512_castsi512_si256(upper);
    const __m256i b = half ? _mm512_extracti64x4_epi64(lower, 1) : _mm512_castsi512_si256(lower);
    const __m512i sum =
        _mm512_add_epi64(_mm512_slli_epi64(_mm512_cvtepi32_epi64(a), 8), _mm512_cvtepi32_epi64(b));
    const __m512i before = _mm512_loadu_si512(to + 8 * half);
    _mm512_storeu_si512(to + 8 * half, _mm512_add_epi64(before, sum));
  }
}

// Vectors of 16 outputs in a tile.
constexpr int kVectors = kTileOutputs / 16;
static_assert(kTileInputs == 4 && kTileOutputs % 16 == 0);

// Four inputs' products of a tile and some rows' upper and, `to_lower` after them, lower bytes.
template <int kRows>
MBLM_VNNI inline void add_four(const int8_t* weight, const int8_t* const (&upper)[kRows],
                               int64_t at, int64_t to_lower, __m512i (&a)[kRows][kVectors],
                               __m512i (&b)[kRows][kVectors]) {
  const __m512i sign = _mm512_set1_epi8(-128);
  __m512i bytes[kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) {
    bytes[k] = _mm512_xor_si512(_mm512_loadu_si512(weight + k * 64), sign);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512i first = four_bytes(upper[r] + at), second = four_bytes(upper[r] + to_lower + at);
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
      a[r][k] = multiply_bytes(bytes[k], first, a[r][k]);
      b[r][k] = multiply_bytes(bytes[k], second, b[r][k]);
    }
  }
}

// sums[r * kPanelStride + k] = the sum of a tile's output k and row r. The instruction multiplies
// bytes without sign by bytes with one: 128 is added to each weight, and what that adds to the sum
// is taken off at the end. All sums are exact. With each four inputs, kAsked lines of later weights
// are prefetched: into the first cache, or into the second where several turns prefetch a part
// each, since the rows of the turns between would drive them out of the first.
template <int kRows, int kAsked>
MBLM_VNNI void multiply_int8(const int8_t* weight, const int8_t* ahead, const float* prepared,
                             int64_t row_stride, int64_t n, float* sums) {
  constexpr int64_t kStep = kTileOutputs * kTileInputs, kLine = 64;
  constexpr int kNear = kAsked == kVectors ? 3 : 2;
  constexpr int kChains = kRows == 1 ? 2 : 1;  // a single row's sums would wait for each other
  const int64_t filled = round_up(n, kTileInputs);
  const int8_t* upper[kRows];
  int64_t totals[kRows * kTileOutputs] = {};
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    upper[r] = reinterpret_cast<const int8_t*>(int16_values(prepared + r * row_stride) + filled);
  }
  for (int64_t i = 0; i < filled;) {
    const int64_t end = std::min(i + kColumnsPerSum, filled);
    __m512i a[kChains][kRows][kVectors], b[kChains][kRows][kVectors];
#pragma GCC unroll 32
    for (int k = 0; k < kChains * kRows * kVectors; ++k) {
      const int chain = k / (kRows * kVectors), row = k / kVectors % kRows;
      a[chain][row][k % kVectors] = b[chain][row][k % kVectors] = _mm512_setzero_si512();
    }
    for (int64_t steps = kChains; i < end; i += steps * kTileInputs) {
      if (i + steps * kTileInputs > end) steps = 1;
#pragma GCC unroll 8
      for (int k = 0; k < kChains; ++k) {
        if (k > 0 && k >= steps) break;
#pragma GCC unroll 8
        for (int line = 0; line < kAsked; ++line, ahead += kLine) {
          __builtin_prefetch(ahead, 0, kNear);
        }
        add_four<kRows>(weight, upper, i + k * kTileInputs, filled, a[k], b[k]);
        weight += kStep;
      }
    }
#pragma GCC unroll 32
    for (int k = 0; k < kChains * kRows * kVectors; ++k) {
      const int chain = k / (kRows * kVectors), row = k / kVectors % kRows;
      add_sums(a[chain][row][k % kVectors], b[chain][row][k % kVectors],
               totals + (row * kVectors + k % kVectors) * 16);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float* row = prepared + r * row_stride;
    int64_t added;
    std::memcpy(&added, row + 2, sizeof(added));
    for (int64_t k = 0; k < kTileOutputs; k += 8) {
      const __m512i total = _mm512_sub_epi64(_mm512_loadu_si512(totals + r * kTileOutputs + k),
                                             _mm512_set1_epi64(added));
      _mm256_storeu_ps(sums + r * kPanelStride + k,
                       _mm256_mul_ps(_mm512_cvtepi64_ps(total), _mm256_set1_ps(row[0])));
    }
  }
}

MBLM_VNNI void multiply_row_of_int8(const void* weights, int64_t, const float* prepared, int64_t n,
                                    float* sums, int64_t count) {
  for (int64_t output = 0; output < count; output += kTileOutputs) {
    const int8_t* const tiles =
        static_cast<const int8_t*>(weights) + output * round_up(n, kTileInputs);
    multiply_int8<1, kVectors>(tiles, tiles + kTilesAhead, prepared, 0, n, sums + output);
  }
}

// multiply_int8 by how many rows it has, and how many lines it asks for.
using MultiplyInt8 = decltype(&multiply_int8<1, 0>);
template <int kRows>
constexpr MultiplyInt8 kAsking[] = {multiply_int8<kRows, 0>, multiply_int8<kRows, 1>,
                                    multiply_int8<kRows, 2>};
constexpr const MultiplyInt8* kByRows[] = {kAsking<1>, kAsking<2>, kAsking<3>,
                                           kAsking<4>, kAsking<5>, kAsking<6>};

MBLM_VNNI void multiply_panel_of_int8(const Panel& panel) {
  constexpr int64_t kRows = std::size(kByRows);
  const int64_t n = panel.n, filled = round_up(n, kTileInputs);
  for (int64_t output = 0; output < panel.outputs; output += kTileOutputs) {
    const int8_t* const weight = static_cast<const int8_t*>(panel.weight) + output * filled;
    // Each turn asks for its part of later weights, so that memory is read all the time.
    const int8_t* ahead = weight + kTilesAhead;
    int64_t left_to_ask = kVectors;
    for (int64_t row = 0; row < panel.rows;) {
      const int64_t left = panel.rows - row, turns = (left + kRows - 1) / kRows;
      const int64_t lines = (left_to_ask + turns - 1) / turns, rows = (left + turns - 1) / turns;
      kByRows[rows - 1][lines](weight, ahead, panel.x + row * panel.row_stride, panel.row_stride, n,
                               panel.sums + row * kPanelStride + output);
      ahead += lines * (filled / kTileInputs) * 64;
      left_to_ask -= lines;
      row += rows;
    }
  }
}

constexpr Kernel kFloat32 = {nullptr, multiply_row<float>, multiply_panel<float>};
constexpr Kernel kBFloat16 = {nullptr, multiply_row<BFloat16>, multiply_panel<BFloat16>};
constexpr Kernel kInt8 = {split_in_bytes, multiply_row_of_int8, multiply_panel_of_int8,
                          kTileOutputs, 1};

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
