// The threads that work on one decoding call together, in phases with a barrier after each.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mblm::cpu {

// Shared by the threads of one call. A thread waits at a barrier by spinning, for the phases are
// microseconds long; when that takes long, as with more threads than cores, it gives its core away.
class Team {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Team(int64_t threads) : threads_(threads) {}

  int64_t threads() const { return threads_; }

  // Time that a thread, on average, has waited for others that had no core to run on: longer than
  // any phase takes.
  Clock::duration lost() const {
    const int64_t others = std::max<int64_t>(threads_ - 1, 1);
    return Clock::duration(lost_.load(std::memory_order_relaxed) / others);
  }

  // Returns when every thread of the team has called it. Calls idle(), a moment's work or none,
  // over and over until then.
  template <class Idle>
  void wait(Idle idle) {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      next_.store(0, std::memory_order_relaxed);
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int64_t turn = 0; turn < kTurnsBeforeYield; ++turn) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      idle();
    }
    const auto begin = Clock::now();
    while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
    const Clock::duration lost = Clock::now() - begin;
    if (lost > kLong) lost_.fetch_add(lost.count(), std::memory_order_relaxed);
  }

  void wait() { wait(pause); }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  // Calls function(begin, end) for parts of [0, items), for the thread of that index. A part is
  // taken by whichever thread is free; if there is one for each thread at most, each has its own,
  // so that what it reads stays in its cache from call to call. Of loops between two barriers, one
  // at most has more parts.
  template <class Function>
  void share(int64_t thread, int64_t items, int64_t part, Function function) {
    if (part * threads_ >= items) {
      const int64_t begin = thread * part;
      if (begin < items) function(begin, std::min(begin + part, items));
      return;
    }
    if (threads_ == 1) return function(int64_t(0), items);
    for (;;) {
      const int64_t begin = next_.fetch_add(part, std::memory_order_relaxed);
      if (begin >= items) return;
      function(begin, std::min(begin + part, items));
    }
  }

 private:
  static constexpr int64_t kTurnsBeforeYield = 2000;
  static constexpr std::chrono::microseconds kLong{500};

  const int64_t threads_;
  std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<Clock::rep> lost_{0};
};

// One thread of a team.
struct Worker {
  Team& team;
  int64_t index;
  mutable std::vector<float> prepared = {};  // what products keep of their inputs; see matrix.cpp
  mutable bool reads_once = false;           // products' weights go past the caches, if they can

  bool is_first() const { return index == 0; }

  // See Team::share.
  template <class Function>
  void share(int64_t items, int64_t part, Function function) const {
    team.share(index, items, part, function);
  }
};

}  // namespace mblm::cpu
