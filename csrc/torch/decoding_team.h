// Runs a decoding call on the threads that torch has, or on fewer where that is quicker.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/team.h"

namespace mblm {

// How many threads so many products of weights and values between two bytes are worth: with more
// of them, waiting for each other after every matrix takes longer than they save.
inline int64_t threads_for(int64_t products) {
  constexpr int64_t kProductsPerThread = 1 << 17;
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
