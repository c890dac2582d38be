// Python's lock, let go of and taken back, also while the interpreter ends. To a thread that asks
// for it then, CPython before 3.14 ends the thread, unwinding functions that nothing may unwind:
// the process would abort. Such a thread waits here until the process is gone.
#pragma once

#include <pybind11/pybind11.h>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

#include <chrono>
#include <optional>
#include <thread>

namespace mblm::decode {

// What unwinds comes from the C library: the reference that catches it refers to nothing.
#ifdef __GNUC__
#define MBLM_MAY_BE_NULL __attribute__((no_sanitize("null")))
#else
#define MBLM_MAY_BE_NULL
#endif

template <class Function>
MBLM_MAY_BE_NULL void or_wait_for_the_end(Function function) {
#ifdef __GLIBCXX__
  try {
    function();
  } catch (abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  function();
#endif
}

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() {
    or_wait_for_the_end([this] { PyEval_RestoreThread(state_); });
  }

 private:
  PyThreadState* const state_;
};

class WithGil {
 public:
  WithGil() {
    or_wait_for_the_end([this] { acquired_.emplace(); });
  }

 private:
  std::optional<pybind11::gil_scoped_acquire> acquired_;
};

}  // namespace mblm::decode
