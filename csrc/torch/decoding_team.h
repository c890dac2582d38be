// Runs a decoding call on the threads that torch has, or on fewer where that is quicker.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "cpu/with_team.h"

namespace mblm {

// Until when one thread decodes alone, since other programs want the cores; in the clock's ticks.
inline std::atomic<cpu::Team::Clock::rep>& end_of_crowd() {
  static std::atomic<cpu::Team::Clock::rep> end{0};
  return end;
}

inline cpu::Team::Clock::time_point alone_until() {
  return cpu::Team::Clock::time_point(
      cpu::Team::Clock::duration(end_of_crowd().load(std::memory_order_relaxed)));
}

// Long beside the few milliseconds that a new trial costs while the crowd is still there.
inline void remember_crowd() {
  constexpr std::chrono::milliseconds kAlone{50};
  const auto end = cpu::Team::Clock::now() + kAlone;
  end_of_crowd().store(end.time_since_epoch().count(), std::memory_order_relaxed);
}

// How many threads so many products of weights and values between two bytes are worth: with more
// of them, waiting for each other after every matrix takes longer than they save.
inline int64_t threads_for(int64_t products,
                           cpu::Team::Clock::time_point now = cpu::Team::Clock::now()) {
  constexpr int64_t kProductsPerThread = 1 << 17;
  if (now < alone_until() || cpu::is_forked()) return 1;
  const int64_t most = std::min<int64_t>(at::get_num_threads(), cpu::allowed_cores());
  return std::clamp<int64_t>(products / kProductsPerThread, 1, most);
}

// See cpu/with_team.h. A crowded team leaves the next calls to one thread.
template <class Prepare, class Function>
void with_team(int64_t threads, Prepare prepare, Function function) {
  if (cpu::with_team(threads, prepare, function)) remember_crowd();
}

}  // namespace mblm
