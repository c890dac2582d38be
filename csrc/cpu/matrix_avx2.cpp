// The inner loops of matrix.h with AVX2 and FMA: see matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/bfloat16.h"

#define MBLM_AVX2 __attribute__((target("avx2,fma")))

namespace mblm::cpu {
namespace {

using Vector = __m256;
constexpr int64_t kLanes = 8;

MBLM_AVX2 inline Vector zeros() {
  return _mm256_setzero_ps();
}

MBLM_AVX2 inline Vector load(const float* values) {
  return _mm256_loadu_ps(values);
}

// From what bytes of eight bfloat16 values, twice in a vector, their floats come; 0x80 is a zero.
alignas(32) constexpr uint32_t kWiden[] = {0x01008080, 0x03028080, 0x05048080, 0x07068080,
                                           0x09088080, 0x0b0a8080, 0x0d0c8080, 0x0f0e8080};

// One instruction beside the load. GCC would keep kWiden in a register and sums in memory.
MBLM_AVX2 inline Vector load(const BFloat16* values) {
  __m256i bits =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  asm("vpshufb %1, %0, %0" : "+x"(bits) : "m"(kWiden));
  return _mm256_castsi256_ps(bits);
}

MBLM_AVX2 inline void store(float* values, Vector v) {
  _mm256_storeu_ps(values, v);
}

MBLM_AVX2 inline Vector multiply_add(Vector a, Vector b, Vector sum) {
  return _mm256_fmadd_ps(a, b, sum);
}

// The sums of each vector's lanes: those 4 from each other are added, then 2 and 1. All at once
// takes fewer instructions than one after another, which is much where rows are short.
MBLM_AVX2 inline __m128 sums_of(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab =
      _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  const Vector cd =
      _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
  // Pairs of a, c, b and d.
  const Vector pairs =
      _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  const Vector sums = _mm256_add_ps(pairs, _mm256_shuffle_ps(pairs, pairs, 0xb1));
  return _mm_blend_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1), 0xa);
}

}  // namespace
}  // namespace mblm::cpu

#define MBLM_TILE MBLM_AVX2
#include "cpu/matrix_tile.h"

namespace mblm::cpu {
namespace {

// to (8) += each output's two sums, whose sum fits 32 bits; four outputs in each vector. Integers
// of up to 53 bits are exact.
MBLM_AVX2 inline void add_sums(__m256i first, __m256i second, __m256d (&to)[2]) {
  const __m256i sums =
      _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), _MM_SHUFFLE(3, 1, 2, 0));
  to[0] = _mm256_add_pd(to[0], _mm256_cvtepi32_pd(_mm256_castsi256_si128(sums)));
  to[1] = _mm256_add_pd(to[1], _mm256_cvtepi32_pd(_mm256_extracti128_si256(sums, 1)));
}

// sums[r * kPanelStride + k] = the sum of a tile's output k and row r: of several rows, half of the
// outputs at a time. The first of them ask for later tiles; a single one reads all in order.
template <int kRows>
MBLM_AVX2 inline void multiply_int8(const int8_t* tile, const float* prepared, int64_t row_stride,
                                    int64_t n, bool is_first, float* sums) {
  constexpr int64_t kOutputs = kRows == 1 ? kTileOutputs : 16, kVectors = kOutputs / 4;
  constexpr int64_t kStep = kTileOutputs * kTileInputs;
  static_assert(kTileInputs == 4 && kTileOutputs % kOutputs == 0);
  for (int64_t output = 0; output < kTileOutputs; output += kOutputs) {
    const int8_t* weight = tile + output * kTileInputs;
    __m256d totals[kRows][kVectors / 2][2] = {};
    for (int64_t i = 0; i < n;) {
      const int64_t end = std::min(i + kColumnsPerInt32, n);
      __m256i products[kRows][kVectors];
#pragma GCC unroll 8
      for (auto& of_outputs : products) {
#pragma GCC unroll 8
        for (__m256i& product : of_outputs) product = _mm256_setzero_si256();
      }
      for (; i < end; i += kTileInputs, weight += kStep) {
        if (kRows > 1 && is_first) __builtin_prefetch(weight + kTilesAhead);
        __m256i values[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int64_t four;
          std::memcpy(&four, int16_values(prepared + r * row_stride) + i, sizeof(four));
          values[r] = _mm256_set1_epi64x(four);
        }
#pragma GCC unroll 8
        for (int64_t k = 0; k < kVectors; ++k) {
          const __m256i wide = _mm256_cvtepi8_epi16(
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + k * 16)));
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            products[r][k] = _mm256_add_epi32(products[r][k], _mm256_madd_epi16(wide, values[r]));
          }
        }
      }
#pragma GCC unroll 8
      for (int64_t k = 0; k < kRows * kVectors; k += 2) {
        const int64_t r = k / kVectors, first = k % kVectors;
        if (kRows == 1) asm("" : "+x"(products[r][first]));  // or GCC 12 keeps a sum in memory
        add_sums(products[r][first], products[r][first + 1], totals[r][first / 2]);
      }
    }
#pragma GCC unroll 8
    for (int64_t k = 0; k < kRows * kVectors; ++k) {
      const int64_t r = k / kVectors, four = k % kVectors;
      _mm_storeu_ps(sums + r * kPanelStride + output + 4 * four,
                    _mm_mul_ps(_mm256_cvtpd_ps(totals[r][four / 2][four % 2]),
                               _mm_set1_ps(prepared[r * row_stride])));
    }
  }
}

MBLM_AVX2 void multiply_row_of_int8(const void* weights, int64_t, const float* prepared, int64_t n,
                                    float* sums, int64_t count) {
  const int8_t* weight = static_cast<const int8_t*>(weights);
  for (int64_t output = 0; output < count; output += kTileOutputs) {
    multiply_int8<1>(weight + output * round_up(n, kTileInputs), prepared, 0, n, true,
                     sums + output);
  }
}

MBLM_AVX2 void multiply_panel_of_int8(const Panel& panel) {
  const int64_t n = panel.n, stride = panel.row_stride;
  for (int64_t output = 0; output < panel.outputs; output += kTileOutputs) {
    const int8_t* weight =
        static_cast<const int8_t*>(panel.weight) + output * round_up(n, kTileInputs);
    for (int64_t row = 0; row < panel.rows; row += 2) {
      const float* x = panel.x + row * stride;
      float* sums = panel.sums + row * kPanelStride + output;
      const auto multiply = row + 1 < panel.rows ? multiply_int8<2> : multiply_int8<1>;
      multiply(weight, x, stride, n, row == 0, sums);
    }
  }
}

template <class W>
constexpr Kernel kFloats = {nullptr,  multiply_row<W>, multiply_streams<W>, kStreamOutputs,
                            kStreams, pack_rows,       kPanelStreams};
constexpr Kernel kInt8 = {round_to_int16, multiply_row_of_int8, multiply_panel_of_int8,
                          kTileOutputs, 1};

}  // namespace

void add_avx2_kernels(std::vector<MatrixKernels>& kernels) {
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.insert(kernels.begin(), {"AVX2", kFloats<float>, kFloats<BFloat16>, kInt8});
  }
}

}  // namespace mblm::cpu

#else

namespace mblm::cpu {
void add_avx2_kernels(std::vector<MatrixKernels>&) {}
}  // namespace mblm::cpu

#endif
