// The AVX-512 loops on any machine: SIMDe stands in for the instructions.
#include <cstdio>

#if __has_include(<simde/x86/avx512.h>)

#include "check_kernel.h"

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512/add.h>
#include <simde/x86/avx512/cast.h>
#include <simde/x86/avx512/cvt.h>
#include <simde/x86/avx512/dpbf16.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/extract.h>
#include <simde/x86/avx512/fmadd.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/set1.h>
#include <simde/x86/avx512/setzero.h>
#include <simde/x86/avx512/slli.h>
#include <simde/x86/avx512/xor.h>

#define MBLM_EMULATED
#include "cpu/matrix_avx512.cpp"

using namespace mblm;

int main() {
  test::check_dots<float>(cpu::kFloat32, "AVX-512");
  test::check_dots<cpu::BFloat16>(cpu::kBFloat16, "AVX-512 with BF16");
  test::check_dots<int8_t>(cpu::kInt8, "AVX-512 with VNNI");
  test::check_extremes_of_int8(cpu::kInt8);
  return test::result();
}

#else

int main() {
  std::printf("skipped: no SIMDe (Debian: libsimde-dev) to stand in for AVX-512\n");
  return 77;
}

#endif
