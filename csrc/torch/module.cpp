// What this library was compiled with, for mblm.build_info(). The kernels register themselves.

#include <torch/library.h>

#include <string>

namespace {

#ifdef __clang__
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

#ifdef _OPENMP
constexpr const char* kOpenMP = "true";
#else
constexpr const char* kOpenMP = "false";
#endif

std::string compiled_with() {
  return std::string("{\"compiler\": \"") + kCompiler + "\", \"openmp\": " + kOpenMP + "}";
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mblm, m) {
  m.def("compiled_with() -> str", &compiled_with);
}
