// The Python module mblm._C: what it was compiled with, and decoding. Loading it registers the
// operators' kernels.
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/cores.h"
#include "decode/torch/cache.h"
#include "decode/torch/device_cache.h"
#include "decode/torch/draws.h"
#include "decode/torch/gil.h"
#include "decode/torch/guard.h"
#include "decode/torch/weights.h"
#include "torch/tensors.h"

// What a run did with a row is a tuple in Python.
template <>
struct pybind11::detail::type_caster<mblm::decode::Ran> {
  static constexpr auto name = const_name("tuple");
  static handle cast(const mblm::decode::Ran& ran, return_value_policy, handle) {
    return make_tuple(ran.ids, ran.log_probs, name_of(ran.reason)).release();
  }
};

// The state of a hosted stage is an object, held among what is destroyed without the GIL.
template <>
struct pybind11::detail::type_caster<mblm::decode::HostedState> {
  PYBIND11_TYPE_CASTER(mblm::decode::HostedState, const_name("object"));

  struct Held {
    object of;

    explicit Held(object given) : of(std::move(given)) {}
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;
    ~Held() {
      const mblm::decode::WithGil gil;
      of = {};
    }
  };

  bool load(handle given, bool) {
    value = std::make_shared<const Held>(reinterpret_borrow<object>(given));
    return true;
  }
  static handle cast(const mblm::decode::HostedState& state, return_value_policy, handle) {
    object of = state ? static_cast<const Held*>(state.get())->of : none();
    return of.release();
  }
};

namespace {

namespace py = pybind11;
using namespace mblm::decode;
using at::Tensor;
using Weights = std::shared_ptr<Hierarchy>;

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

void bind_weights(py::module_& module) {
  py::class_<Stage, std::shared_ptr<Stage>>(module, "Stage", "A stage's packed weights.")
      .def_static("transformer", &transformer_stage, py::arg("weights"), py::arg("heads"))
      .def_static("mamba1", &mamba1_stage, py::arg("weights"), py::arg("eps"))
      .def_static("mamba2", &mamba2_stage, py::arg("weights"), py::arg("eps"))
      .def_static("hosted", &hosted_stage, py::arg("dim"));

  py::class_<Hierarchy, std::shared_ptr<Hierarchy>>(module, "Hierarchy",
                                                    "A model's packed weights.")
      .def(py::init<std::vector<std::shared_ptr<Stage>>, std::vector<int64_t>, std::vector<Tensor>,
                    const std::vector<double>&>(),
           py::arg("stages"), py::arg("seq_lens"), py::arg("weights"), py::arg("eps"))
      .def_property_readonly("max_length", &Hierarchy::max_length)
      .def_property_readonly("num_tokens", &Hierarchy::num_tokens);
}

std::vector<int32_t> int32s(const Tensor& tensor) {
  const Tensor values = tensor.contiguous();
  const int32_t* data = values.const_data_ptr<int32_t>();
  return {data, data + values.numel()};
}

// Tables that mblm/inference/automaton.py has checked; what would lead out of them is refused.
std::shared_ptr<Automaton> automaton(const Tensor& classes, const Tensor& next,
                                     const Tensor& distance, int64_t start) {
  auto made = std::make_shared<Automaton>();
  made->class_of = int32s(classes);
  made->next = int32s(next);
  made->distance = int32s(distance);
  made->classes = next.dim() == 2 ? next.size(1) : 0;
  made->start = int32_t(start);
  const auto states = int64_t(made->distance.size());
  const auto all = [](const std::vector<int32_t>& values, int64_t least, int64_t end) {
    return std::all_of(values.begin(), values.end(),
                       [&](int32_t value) { return least <= value && value < end; });
  };
  const bool fits = int64_t(made->next.size()) == states * made->classes && 0 <= start &&
                    start < states && all(made->next, -1, states) &&
                    all(made->class_of, 0, made->classes);
  if (!fits) throw py::value_error("an automaton's tables do not fit each other");
  return made;
}

NewPlan plan(int64_t max_tokens, double temperature, int64_t top_k, double top_p, double min_p,
             std::shared_ptr<GeneratorDraws> draws, int64_t lane, std::shared_ptr<Automaton> allow,
             std::shared_ptr<Automaton> stop, bool log_probs, bool pause, int64_t draft) {
  mblm::cpu::Sampling sampling;  // the likeliest, as with a temperature of 0
  if (temperature > 0) {
    sampling = {float(temperature), top_k, float(top_p), min_p};
    // Too small a number for a float keeps the likeliest, as 0 would not.
    if (top_p > 0) sampling.top_p = std::max(sampling.top_p, std::numeric_limits<float>::min());
  }
  return {{max_tokens, sampling, std::move(allow), std::move(stop), log_probs, pause, draft},
          std::move(draws),
          lane};
}

// What a call leaves to Python goes to methods of its caller, a NativeCache.
class Caller : public Host {
 public:
  explicit Caller(py::handle cache) : cache_(cache) {}

  Supplied step(const Wanted& wanted) override {
    const WithGil gil;
    const py::object given = cache_.attr("step_hosted")(wanted.stage, wanted.ids, wanted.positions,
                                                        wanted.contexts, wanted.states);
    auto [outputs, contexts, states] =
        given.cast<std::tuple<Tensor, Tensor, std::vector<HostedState>>>();
    return {std::move(outputs), std::move(contexts), std::move(states)};
  }

  SavedState feed(std::optional<SavedState> before, const Tensor& ids) override {
    const WithGil gil;
    return cache_.attr("feed_long")(std::move(before), ids).cast<SavedState>();
  }

 private:
  const py::handle cache_;
};

// A handle of a row, if it can be one.
std::optional<RowId> row_of(py::handle given) {
  int overflow = 1;
  const RowId row =
      PyLong_CheckExact(given.ptr()) ? PyLong_AsLongLongAndOverflow(given.ptr(), &overflow) : 0;
  return overflow == 0 ? std::optional(row) : std::nullopt;
}

RowIds rows_of(const py::sequence& given) {
  RowIds rows;
  for (const py::object item : given) {  // which a sequence may have made for this alone
    const std::optional<RowId> row = row_of(item);
    if (!row) {
      throw py::value_error("row " + std::string(py::repr(item)) +
                            ": there is no such row, or it was dropped");
    }
    rows.push_back(*row);
  }
  return rows;
}

// Token ids (n) of bytes, or a tensor as it is.
Tensor ids_of(py::handle given) {
  if (THPVariable_Check(given.ptr())) return given.cast<Tensor>();
  if (!PyBytes_Check(given.ptr())) {
    const std::string kind = Py_TYPE(given.ptr())->tp_name;
    throw py::type_error("ids: expected bytes or a tensor, got " + kind);
  }
  const auto count = int64_t(PyBytes_GET_SIZE(given.ptr()));
  const auto* const bytes = reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(given.ptr()));
  Tensor ids = mblm::make::empty({count}, at::kLong);
  std::copy_n(bytes, count, ids.mutable_data_ptr<int64_t>());
  return ids;
}

// Token ids of rows (n), as many of each, side by side: (rows, n). The caller's own.
Tensor stacked(const std::vector<Tensor>& rows) {
  const int64_t count = rows.empty() ? 0 : rows[0].numel();
  Tensor ids = own_tensor({int64_t(rows.size()), count}, at::kLong);
  int64_t* to = ids.mutable_data_ptr<int64_t>();
  for (const Tensor& given : rows) {
    const Tensor row = check_given("rows", given, {count}, at::kLong);
    to = std::copy_n(row.const_data_ptr<int64_t>(), count, to);
  }
  return ids;
}

// A method of rows as Python calls it: without the GIL, for rows that nobody else may use
// meanwhile.
template <class Result, class... Arguments>
auto of_rows(Result (Cache::*method)(const Lease&, Arguments...)) {
  return [method](Cache& cache, const py::sequence& given, const std::decay_t<Arguments>&... all) {
    const RowIds rows = rows_of(given);
    const WithoutGil released;
    return (cache.*method)(cache.lease(rows), all...);
  };
}

// The same with a host, which its caller is, and with the weights that the caller's model has now.
template <class Result, class... Arguments>
auto of_rows(Result (Cache::*method)(const Lease&, Host&, Arguments...)) {
  return [method](Cache& cache, py::handle caller, const Weights& weights,
                  const py::sequence& given, const std::decay_t<Arguments>&... all) {
    const RowIds rows = rows_of(given);
    Caller host(caller);
    const WithoutGil released;
    cache.set_hierarchy(weights);
    return (cache.*method)(cache.lease(rows), host, all...);
  };
}

// What is proposed after bytes that come in pieces, for tests.
std::vector<int64_t> proposed(const std::vector<std::vector<int32_t>>& pieces, int64_t most,
                              double price) {
  Pool pool(Bytes::kPage);
  Bytes bytes;
  Proposer proposer;
  for (const std::vector<int32_t>& piece : pieces) {
    bytes.reserve(pool, int64_t(piece.size()));
    for (const int32_t id : piece) bytes.push_back(id);
    proposer.reserve(bytes, bytes.size());
    proposer.follow(bytes);
  }
  const auto found = proposer.propose(bytes, most, Price{.any = 0, .each = price});
  return {found.begin(), found.end()};
}

void bind_cache(py::module_& module) {
  using Release = py::call_guard<WithoutGil>;

  py::class_<Automaton, std::shared_ptr<Automaton>>(module, "Automaton")
      .def(py::init(&automaton), py::arg("classes"), py::arg("next"), py::arg("distance"),
           py::arg("start"));

  py::class_<GeneratorDraws, std::shared_ptr<GeneratorDraws>>(module, "Draws")
      .def(py::init<std::optional<at::Generator>, int64_t, int64_t, at::Device>(),
           py::arg("generator"), py::arg("lanes"), py::arg("num_tokens"), py::arg("device"));

  py::class_<NewPlan>(module, "Plan")
      .def(py::init(&plan), py::arg("max_tokens"), py::arg("temperature"), py::arg("top_k"),
           py::arg("top_p"), py::arg("min_p"), py::arg("draws"), py::arg("lane"), py::arg("allow"),
           py::arg("stop"), py::arg("log_probs"), py::arg("pause"), py::arg("draft"));

  py::class_<SavedState>(module, "State")
      .def(py::init<int64_t, int64_t, std::map<std::string, Tensor>,
                    std::map<int64_t, HostedState>>(),
           py::arg("length"), py::arg("taken"), py::arg("tensors"), py::arg("hosted"))
      .def_readonly("hosted", &SavedState::hosted)
      .def_readonly("length", &SavedState::length)
      .def_readonly("taken", &SavedState::taken)
      .def_readonly("tensors", &SavedState::tensors);

  py::class_<Cache, std::shared_ptr<Cache>>(module, "Cache", "See mblm/inference/native_cache.py.")
      .def(py::init([](std::shared_ptr<Hierarchy> hierarchy) {
             TORCH_CHECK_VALUE(hierarchy->is_on_cpu(), "weights must be on the CPU");
             return std::make_shared<Cache>(std::move(hierarchy));
           }),
           py::arg("hierarchy").none(false))
      .def("add", &Cache::add, Release())
      .def("drop",
           [](Cache& cache, const py::sequence& given) {
             RowIds rows;
             for (const py::object item : given) {
               if (const std::optional<RowId> row = row_of(item)) rows.push_back(*row);
             }
             const WithoutGil released;
             cache.drop(rows);
           })
      .def("copy", of_rows(&Cache::copy))
      .def("lengths", of_rows(&Cache::lengths))
      .def("feed",
           [](Cache& cache, py::handle caller, const Weights& weights, const py::sequence& rows,
              const py::sequence& pieces, int64_t most) {
             std::vector<Tensor> ids;
             for (const py::object piece : pieces) ids.push_back(ids_of(piece));
             of_rows (&Cache::feed)(cache, caller, weights, rows, ids, most);
           })
      .def("begin", of_rows(&Cache::begin))
      .def("run", of_rows(&Cache::run))
      .def("last", of_rows(&Cache::last))
      .def("logits", of_rows(&Cache::logits))
      .def("choose", of_rows(&Cache::choose))
      .def("state", of_rows(&Cache::state))
      .def("state_so_far", of_rows(&Cache::state_so_far))
      .def("set_state", of_rows(&Cache::set_state));

#ifdef MBLM_CUDA
  py::class_<DeviceCache, Cache, std::shared_ptr<DeviceCache>>(module, "DeviceCache",
                                                               "The same, on a GPU.")
      .def(py::init([](std::shared_ptr<Hierarchy> hierarchy, int64_t max_rows) {
             return std::make_shared<DeviceCache>(std::move(hierarchy), max_rows);
           }),
           py::arg("hierarchy").none(false), py::arg("max_rows"))
      .def_property_readonly("slots", py::cpp_function(&DeviceCache::slots, Release()))
      .def_property_readonly("graphs", py::cpp_function(&DeviceCache::graphs, Release()));
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("compiler") = kCompiler;
  module.attr("openmp") = kOpenMP;
  module.def("is_forked", &mblm::cpu::is_forked);
  module.def("proposed", &proposed, py::arg("pieces"), py::arg("most"), py::arg("price"));
  module.def("stacked", &stacked, py::arg("rows"));
  py::register_local_exception_translator(translate);
  bind_guard(module);
  bind_weights(module);
  bind_cache(module);
}
