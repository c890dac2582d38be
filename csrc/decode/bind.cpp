// The Python module mblm._C: what it was compiled with, and decoding. Loading it registers the
// operators' kernels.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "decode/guard.h"
#include "decode/weights.h"

namespace {

namespace py = pybind11;
using namespace mblm::decode;
using at::Tensor;

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

// PyTorch's exceptions become Python's: c10::ValueError is a ValueError, without a backtrace.
void translate(std::exception_ptr exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const c10::Error&) {
    torch::translate_exception_to_python(exception);
  }
}

// pybind11 holds what is not const.
std::shared_ptr<Stage> mutable_stage(std::shared_ptr<const Stage> stage) {
  return std::const_pointer_cast<Stage>(std::move(stage));
}

void bind_weights(py::module_& module) {
  py::class_<Stage, std::shared_ptr<Stage>>(module, "Stage", "A stage's packed weights.")
      .def_static(
          "transformer",
          [](std::vector<Tensor> weights, int64_t heads) {
            return mutable_stage(transformer_stage(std::move(weights), heads));
          },
          py::arg("weights"), py::arg("heads"))
      .def_static(
          "mamba1",
          [](std::vector<Tensor> weights, const std::vector<double>& eps) {
            return mutable_stage(mamba1_stage(std::move(weights), eps));
          },
          py::arg("weights"), py::arg("eps"))
      .def_static(
          "mamba2",
          [](std::vector<Tensor> weights, double eps) {
            return mutable_stage(mamba2_stage(std::move(weights), eps));
          },
          py::arg("weights"), py::arg("eps"))
      .def_static(
          "hosted", [](int64_t dim) { return mutable_stage(hosted_stage(dim)); }, py::arg("dim"))
      .def_property_readonly(
          "is_hosted",
          [](const Stage& stage) { return std::holds_alternative<Hosted>(stage.model); })
      .def_readonly("dim", &Stage::dim);

  py::class_<Hierarchy, std::shared_ptr<Hierarchy>>(module, "Hierarchy",
                                                    "A model's packed weights.")
      .def(py::init([](const std::vector<std::shared_ptr<Stage>>& stages,
                       std::vector<int64_t> seq_lens, std::vector<Tensor> weights,
                       const std::vector<double>& eps) {
             return std::make_shared<Hierarchy>(
                 std::vector<std::shared_ptr<const Stage>>(stages.begin(), stages.end()),
                 std::move(seq_lens), std::move(weights), eps);
           }),
           py::arg("stages"), py::arg("seq_lens"), py::arg("weights"), py::arg("eps"))
      .def_property_readonly("max_length", &Hierarchy::max_length)
      .def_property_readonly("num_tokens", &Hierarchy::num_tokens);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("compiler") = kCompiler;
  module.attr("openmp") = kOpenMP;
  py::register_local_exception_translator(translate);
  bind_guard(module);
  bind_weights(module);
}
