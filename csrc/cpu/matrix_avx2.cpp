// The inner loops of matrix.h with AVX2 and FMA: see matrix_kernels.h.
#include "cpu/matrix_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>

#include "cpu/bfloat16.h"
#include "cpu/stream_sums.h"

#define MBLM_AVX2 __attribute__((target("avx2,fma")))

namespace mblm::cpu {
namespace {

using Vector = __m256;
constexpr int64_t kLanes = 8;
constexpr int kFewOutputs = 3, kFewRows = 4, kManyOutputs = 3, kManyRows = 4;

MBLM_AVX2 inline Vector zeros() {
  return _mm256_setzero_ps();
}

MBLM_AVX2 inline Vector load(const float* values) {
  return _mm256_loadu_ps(values);
}

MBLM_AVX2 inline Vector load(const BFloat16* values) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

MBLM_AVX2 inline void store(float* values, Vector v) {
  _mm256_storeu_ps(values, v);
}

MBLM_AVX2 inline Vector multiply_add(Vector a, Vector b, Vector sum) {
  return _mm256_fmadd_ps(a, b, sum);
}

// Each lane's sum with that four lanes from it.
MBLM_AVX2 inline __m128 fold(Vector v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

}  // namespace
}  // namespace mblm::cpu

#define MBLM_TILE MBLM_AVX2
#include "cpu/matrix_tile.h"

namespace mblm::cpu {
namespace {

// totals (four of 64 bits) += the sums of each output's eight integers, of four outputs, of which
// the sums of four fit 32 bits.
MBLM_AVX2 inline __m256i add_sums(const __m256i (&of)[kTileOutputs], __m256i totals) {
  const __m256i ab =
      _mm256_add_epi32(_mm256_unpacklo_epi32(of[0], of[1]), _mm256_unpackhi_epi32(of[0], of[1]));
  const __m256i cd =
      _mm256_add_epi32(_mm256_unpacklo_epi32(of[2], of[3]), _mm256_unpackhi_epi32(of[2], of[3]));
  const __m256i all =
      _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(all));
  const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(all, 1));
  return _mm256_add_epi64(totals, _mm256_add_epi64(low, high));
}

// sums[r * kPanelStride + k] = the sum of a tile's output k and row r. The first rows of a tile ask
// for those behind it.
template <int kRows>
MBLM_AVX2 inline void multiply_int8(const int8_t* weight, const float* prepared, int64_t row_stride,
                                    int64_t n, bool is_first, float* sums) {
  // Each of eight sums takes two products of sixteen columns; four are summed together.
  constexpr int64_t kColumns = kColumnsPerInt32 * 8 / 4;
  static_assert(kColumns % kTileInputs == 0);
  __m256i totals[kRows];
  for (__m256i& total : totals) total = _mm256_setzero_si256();
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min(i + kColumns, n);
    __m256i products[kRows][kTileOutputs];
#pragma GCC unroll 8
    for (auto& of_outputs : products) {
#pragma GCC unroll 8
      for (__m256i& product : of_outputs) product = _mm256_setzero_si256();
    }
    for (; i < end; i += kTileInputs, weight += kTileOutputs * kTileInputs) {
#pragma GCC unroll 8
      for (int64_t k = 0; is_first && k < kTileOutputs; ++k) {
        __builtin_prefetch(weight + k * kTileInputs + kTilesAhead);
      }
      for (int64_t part = 0; part < kTileInputs; part += 16) {
        __m256i values[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const int16_t* from = int16_values(prepared + r * row_stride) + i + part;
          values[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        }
#pragma GCC unroll 8
        for (int64_t k = 0; k < kTileOutputs; ++k) {
          const int8_t* w = weight + k * kTileInputs + part;
          const __m256i wide =
              _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            products[r][k] = _mm256_add_epi32(products[r][k], _mm256_madd_epi16(wide, values[r]));
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) totals[r] = add_sums(products[r], totals[r]);
  }
  for (int r = 0; r < kRows; ++r) {
    int64_t total[kTileOutputs];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(total), totals[r]);
    for (int64_t k = 0; k < kTileOutputs; ++k) {
      sums[r * kPanelStride + k] = float(total[k]) * prepared[r * row_stride];
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

}  // namespace

void add_avx2_kernels(std::vector<MatrixKernels>& kernels) {
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.insert(kernels.begin(),
                   {"AVX2",
                    {nullptr, multiply_row<float>, multiply_panel<float>},
                    {nullptr, multiply_row<BFloat16>, multiply_panel<BFloat16>},
                    {round_to_int16, multiply_row_of_int8, multiply_panel_of_int8, 1}});
  }
}

}  // namespace mblm::cpu

#else

namespace mblm::cpu {
void add_avx2_kernels(std::vector<MatrixKernels>&) {}
}  // namespace mblm::cpu

#endif
