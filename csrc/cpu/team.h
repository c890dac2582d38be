// The threads that work on one decoding call together, in phases with a barrier after each.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/cache_lines.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mblm::cpu {

// Shared by the threads of one call. A thread waits at a barrier by spinning, for the phases are
// microseconds long. When that takes long, as with more threads than cores, it gives its core away;
// then it sleeps, for where processor time is limited, what it spends on waiting is taken from the
// threads that it waits for.
class Team {
 public:
  // It never goes back, and is read without a system call.
  using Clock = std::chrono::steady_clock;

  explicit Team(int64_t threads)
      : threads_(threads),
        rounds_(std::bit_width(uint64_t(threads - 1))),
        flags_(threads * rounds_) {}

  int64_t threads() const { return threads_; }

  // Whether a thread, on average, has waited for more than half of the time, which is all that a
  // second thread can win, for others that had no core to run on: longer than any phase takes.
  bool is_crowded() const {
    constexpr std::chrono::milliseconds kFewest{2};
    const int64_t others = std::max<int64_t>(threads_ - 1, 1);
    const auto lost = Clock::duration(lost_.load(std::memory_order_relaxed) / others);
    return lost > kFewest && 2 * lost > Clock::now() - begun_;
  }

  // Returns when every thread of the team has called it as often: `phase` times. Calls idle(), a
  // moment's work or none, over and over until then.
  template <class Idle>
  void wait(int64_t thread, uint32_t phase, Idle idle) {
    // For the loops after this: those that have this number in turns are over everywhere.
    if (thread == 0) next_[phase % 2].value.store(0, std::memory_order_relaxed);
    // In each round a thread tells one other that it has come, and all that it has heard of by
    // then: a flag has one writer and one reader, whose caches exchange it once.
    for (int64_t round = 0, distance = 1; distance < threads_; ++round, distance *= 2) {
      flag((thread + distance) % threads_, round).store(phase, std::memory_order_release);
      await(flag(thread, round), phase, idle);
    }
  }

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
  void share(int64_t thread, uint32_t phase, int64_t items, int64_t part, Function function) {
    if (part * threads_ >= items) {
      const int64_t begin = thread * part;
      if (begin < items) function(begin, std::min(begin + part, items));
      return;
    }
    if (threads_ == 1) return function(int64_t(0), items);
    for (auto& next = next_[phase % 2].value;;) {
      const int64_t begin = next.fetch_add(part, std::memory_order_relaxed);
      if (begin >= items) return;
      function(begin, std::min(begin + part, items));
    }
  }

 private:
  static constexpr int64_t kTurnsBeforeYield = 2000;
  static constexpr std::chrono::microseconds kLong{500}, kBeforeSleep{2000};
  static constexpr std::chrono::microseconds kShortestSleep{50}, kLongestSleep{1000};

  template <class T>
  struct alignas(cache_lines::kBytesApart) Line {
    std::atomic<T> value{0};
  };

  std::atomic<uint32_t>& flag(int64_t thread, int64_t round) {
    return flags_[thread * rounds_ + round].value;
  }

  template <class Idle>
  void await(const std::atomic<uint32_t>& flag, uint32_t phase, Idle idle) {
    // The thread that writes the flag may already be in the next phase, so the number can be
    // larger; numbers wrap around.
    const auto has_come = [&] {
      return int32_t(flag.load(std::memory_order_acquire) - phase) >= 0;
    };
    for (int64_t turn = 0; turn < kTurnsBeforeYield; ++turn) {
      if (has_come()) return;
      idle();
    }
    const auto begin = Clock::now();
    Clock::duration lost{}, sleep = kShortestSleep;
    for (; !has_come(); lost = Clock::now() - begin) {
      std::this_thread::yield();  // to a thread of the team that has no core, if there is one
      if (lost < kBeforeSleep) continue;
      std::this_thread::sleep_for(sleep);
      sleep = std::min<Clock::duration>(2 * sleep, kLongestSleep);
    }
    if (lost > kLong) lost_.fetch_add(lost.count(), std::memory_order_relaxed);
  }

  const int64_t threads_, rounds_;
  const Clock::time_point begun_ = Clock::now();
  std::vector<Line<uint32_t>> flags_;  // (threads, rounds)
  Line<int64_t> next_[2];
  std::atomic<Clock::rep> lost_{0};
};

// One thread of a team.
struct Worker {
  Team& team;
  int64_t index;
  // What products keep of their inputs; see matrix.cpp.
  mutable cache_lines::Vector<float> prepared = {};

  mutable uint32_t phase = 0;  // how often it has waited

  bool is_first() const { return index == 0; }
  bool is_last() const { return index + 1 == team.threads(); }

  // See Team.
  template <class Function>
  void share(int64_t items, int64_t part, Function function) const {
    team.share(index, phase, items, part, function);
  }
  template <class Idle>
  void wait(Idle idle) const {
    team.wait(index, ++phase, idle);
  }
  void wait() const { wait(Team::pause); }
};

}  // namespace mblm::cpu
