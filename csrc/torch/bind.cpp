// The Python module mblm._C: what it was compiled with. Loading it registers the kernels.
#include <pybind11/pybind11.h>

namespace {

#ifdef __clang__
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("compiler") = kCompiler;
  module.attr("openmp") = kOpenMP;
}
