// Runs a function on a team of threads that a sanitizer sees, as it does not OpenMP's.
#pragma once

#include <thread>
#include <vector>

#include "cpu/team.h"

namespace mblm::test {

// Calls function(worker) on so many threads of a team.
template <class Function>
void on_team(int64_t threads, Function function) {
  cpu::Team team(threads);
  std::vector<std::thread> others;
  for (int64_t index = 1; index < threads; ++index) {
    others.emplace_back([&team, &function, index] { function(cpu::Worker{team, index}); });
  }
  function(cpu::Worker{team, 0});
  for (std::thread& other : others) other.join();
}

}  // namespace mblm::test
