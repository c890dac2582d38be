// The AVX-512 loops on any machine: SIMDe stands in for the instructions.
#include <cstdio>

#if __has_include(<simde/x86/avx512.h>)

#include <algorithm>
#include <cstring>

#include "check_kernel.h"

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512/add.h>
#include <simde/x86/avx512/cast.h>
#include <simde/x86/avx512/compress.h>
#include <simde/x86/avx512/cvt.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/extract.h>
#include <simde/x86/avx512/fmadd.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/set1.h>
#include <simde/x86/avx512/setzero.h>
#include <simde/x86/avx512/shuffle.h>
#include <simde/x86/avx512/slli.h>
#include <simde/x86/avx512/storeu.h>
#include <simde/x86/avx512/sub.h>
#include <simde/x86/avx512/xor.h>

// What SIMDe lacks: values of one type converted to another.
template <class From, class To, class Out, class In>
Out convert(const In& values) {
  constexpr size_t kCount = sizeof(In) / sizeof(From);
  From from[kCount];
  To to[kCount];
  std::memcpy(from, &values, sizeof(from));
  std::copy(from, from + kCount, to);
  Out out;
  static_assert(sizeof(out) == sizeof(to));
  std::memcpy(&out, to, sizeof(out));
  return out;
}
inline __m512i _mm512_cvtepu16_epi32(__m256i values) {
  return convert<uint16_t, uint32_t, __m512i>(values);
}
inline __m512i _mm512_cvtepi32_epi64(__m256i values) {
  return convert<int32_t, int64_t, __m512i>(values);
}
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
#define _mm512_cvtepi64_ps convert<int64_t, float, __m256, __m512i>

#define MBLM_EMULATED
#include "cpu/matrix_avx512.cpp"

using namespace mblm;

int main() {
  test::check_sums<float>(cpu::kFloat32, "AVX-512");
  test::check_sums<cpu::BFloat16>(cpu::kBFloat16, "AVX-512");
  test::check_sums<int8_t>(cpu::kInt8, "AVX-512 with VNNI");
  test::check_extremes_of_int8(cpu::kInt8);
  return test::result();
}

#else

int main() {
  std::printf("skipped: no SIMDe (Debian: libsimde-dev) to stand in for AVX-512\n");
  return 77;
}

#endif
