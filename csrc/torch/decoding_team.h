// Runs a decoding call on the threads that torch has, or on fewer where that is quicker.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <optional>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/team.h"

namespace mblm {

// How many calls are still to be made with one thread, since other programs want the cores.
inline std::atomic<int64_t>& calls_alone() {
  static std::atomic<int64_t> calls{0};
  return calls;
}

inline void remember_crowd() {
  constexpr int64_t kCalls = 256;
  calls_alone().store(kCalls, std::memory_order_relaxed);
}

// How many threads so many products of weights and values between two bytes are worth: with more
// of them, waiting for each other after every matrix takes longer than they save.
inline int64_t threads_for(int64_t products) {
  constexpr int64_t kProductsPerThread = 1 << 17;
  if (calls_alone().load(std::memory_order_relaxed) > 0) {
    calls_alone().fetch_sub(1, std::memory_order_relaxed);
    return 1;
  }
  return std::clamp<int64_t>(products / kProductsPerThread, 1, at::get_num_threads());
}

// Calls function(worker) on every thread of a team; the caller's own is the first.
template <class Function>
void with_team([[maybe_unused]] int64_t threads, Function function) {
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
    std::optional<cpu::Team> team;
#pragma omp parallel num_threads(int(threads))
    {
#pragma omp single
      team.emplace(omp_get_num_threads());
      function(cpu::Worker{*team, omp_get_thread_num()});
    }
    return;
  }
#endif
  cpu::Team team(1);
  function(cpu::Worker{team, 0});
}

}  // namespace mblm
