// Runs a function on a team of OpenMP's threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/cores.h"
#include "cpu/team.h"

namespace mblm::cpu {

// Makes a team of as many threads as there are, at most those asked for. Calls prepare(threads) on
// one of them, which allocates what they share and returns how many floats each needs for what
// products prepare; then function(worker) on each, the caller being the first, which neither throws
// nor allocates. If there is no memory, none calls it. Returns whether the team was crowded.
template <class Prepare, class Function>
bool with_team([[maybe_unused]] int64_t threads, Prepare prepare, Function function) {
  std::optional<Team> team;
  int64_t prepared = 0;
  std::exception_ptr failure;
  std::atomic<bool> has_failed{false};
  const auto attempt = [&](auto part) {
    try {
      if (!has_failed) part();
    } catch (...) {
      if (!has_failed.exchange(true)) failure = std::current_exception();
    }
  };
  const auto make_team = [&](int64_t size) {
    attempt([&] {
      team.emplace(size);
      prepared = prepare(size);
    });
  };
  const auto work = [&](int64_t index, auto wait) {
    std::optional<Worker> worker;
    attempt([&] {
      worker.emplace(Worker{*team, index});
      worker->prepared.resize(prepared);
    });
    wait();  // for what others have attempted
    if (!has_failed) function(static_cast<const Worker&>(*worker));
  };
  bool has_parallel = false;
#ifdef _OPENMP
  has_parallel = threads > 1 && !omp_in_parallel() && !is_forked();
  note_threads();
  if (has_parallel) {
#pragma omp parallel num_threads(int(threads))
    {
#pragma omp single
      make_team(omp_get_num_threads());
      work(omp_get_thread_num(), [] {
#pragma omp barrier
      });
    }
  }
#endif
  if (!has_parallel) {
    make_team(1);
    work(0, [] {});
  }
  if (failure) std::rethrow_exception(failure);
  return team->is_crowded();
}

}  // namespace mblm::cpu
