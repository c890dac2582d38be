// Runs CUDA kernels on the CPU, so that their logic is tested on any machine.
//
// Included before a .cu file, it lets a C++ compiler take that file: the qualifiers mean nothing or
// `static`, launch() runs the blocks one after another, and a block's threads are fibers that take
// turns at barriers and shuffles. Between two barriers the threads run one after another, in rising
// or falling order: a result that differs between the two lacks a barrier. Shared memory has
// exactly the size asked for, so that the address sanitizer sees what lies outside, and is filled
// with NaNs, so that nothing rests on what it held before.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#elif !defined(_FORTIFY_SOURCE)  // which takes jumps between stacks for errors
#define MBLM_QUICK_SWITCH
#endif

#define MBLM_CUDA_EMULATION
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

#include "cuda/stream.h"

namespace mblm::cuda::emulation {

struct Index {
  unsigned x = 0;
};

// In which order a block's threads run between barriers. Python finds it by its name.
extern "C" {
[[gnu::visibility("default")]] inline bool mblm_falling_order = false;
}

// A thread's stack and where it stands on it. Fibers outlive blocks and serve one after the other.
struct Fiber {
  static constexpr size_t kStackSize = 128 * 1024;
  enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

  alignas(16) char stack[kStackSize];
  ucontext_t context;
  jmp_buf point;
  bool started = false;
  State state = State::kDone;
  uint64_t handed_over = 0;
  void* fake_stack = nullptr;
};

inline Index thread_index, block_index, block_dimension, grid_dimension;
inline unsigned char* shared = nullptr;

// Runs the threads of one block at a time.
class Scheduler {
 public:
  // Runs body() in so many threads, to its end.
  void run(int threads, const std::function<void()>& body) {
    while (int(fibers_.size()) < threads) {
      fibers_.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers_.back();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = Fiber::kStackSize;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Scheduler::fiber_main, 0);
    }
    threads_ = threads;
    body_ = &body;
    for (int i = 0; i < threads; ++i) fibers_[i]->state = State::kReady;
    for (;;) {
      bool progress = false, all_done = true;
      for (int i = 0; i < threads; ++i) {
        running_ = mblm_falling_order ? threads - 1 - i : i;
        if (current().state != State::kReady) continue;
        thread_index.x = unsigned(running_);
        to_thread(current());
        progress = true;
      }
      for (int i = 0; i < threads; ++i) all_done &= fibers_[i]->state == State::kDone;
      if (all_done) return;
      for (int warp = 0; warp < threads; warp += 32) {
        progress |= release(warp, std::min(warp + 32, threads), State::kAtWarpBarrier);
      }
      progress |= release(0, threads, State::kAtBlockBarrier);
      if (!progress) fail("threads wait at different barriers");
    }
  }

  // Called from a thread: wait for all threads of the block, or of the warp.
  void wait(bool for_block) {
    current().state = for_block ? State::kAtBlockBarrier : State::kAtWarpBarrier;
    to_scheduler(current());
  }

  // Called from a thread: what a lane of its warp hands over in the same call.
  template <class T>
  T exchange(T value, int lane) {
    static_assert(sizeof(T) <= sizeof(Fiber::handed_over));
    std::memcpy(&current().handed_over, &value, sizeof(T));
    wait(false);
    const int from = running_ / 32 * 32 + lane;
    if (lane < 0 || lane >= 32 || from >= threads_) fail("a shuffle from no lane");
    std::memcpy(&value, &fibers_[from]->handed_over, sizeof(T));
    wait(false);
    return value;
  }

  // Called from a thread: visit(lane, value) with what each lane of its warp hands over in the same
  // call.
  template <class T, class Visit>
  void gather(const T& value, Visit visit) {
    const T* const own = &value;
    std::memcpy(&current().handed_over, &own, sizeof(own));
    wait(false);
    const int first = running_ / 32 * 32;
    if (first + 32 > threads_) fail("a warp is not whole");
    for (int lane = 0; lane < 32; ++lane) {
      const T* of_lane;
      std::memcpy(&of_lane, &fibers_[first + lane]->handed_over, sizeof(of_lane));
      visit(lane, *of_lane);
    }
    wait(false);
  }

  int running() const { return running_; }

 private:
  using State = Fiber::State;

  [[noreturn]] static void fail(const char* what) {
    std::printf("emulated CUDA kernel: %s\n", what);
    std::abort();
  }

  Fiber& current() { return *fibers_[running_]; }

  static void fiber_main();

  // Frees the threads [begin, end) if all that are not done wait at this barrier.
  bool release(int begin, int end, State barrier) {
    bool any = false;
    for (int i = begin; i < end; ++i) {
      if (fibers_[i]->state != barrier && fibers_[i]->state != State::kDone) return false;
      any |= fibers_[i]->state == barrier;
    }
    for (int i = begin; i < end; ++i) {
      if (fibers_[i]->state == barrier) fibers_[i]->state = State::kReady;
    }
    return any;
  }

#ifdef MBLM_QUICK_SWITCH
  // Without the system calls that save and restore signal masks.
  void to_thread(Fiber& fiber) {
    if (_setjmp(point_)) return;
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  void to_scheduler(Fiber& fiber) {
    if (!_setjmp(fiber.point)) _longjmp(point_, 1);
  }
  void arrived(Fiber&) {}
#else
  // The address sanitizer wants to know of every change of stacks.
  void to_thread(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, Fiber::kStackSize);
#endif
    swapcontext(&context_, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }
  void to_scheduler(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fiber.fake_stack, stack_, stack_size_);
#endif
    swapcontext(&fiber.context, &context_);
    arrived(fiber);
  }
  void arrived([[maybe_unused]] Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack_, &stack_size_);
#endif
  }
#endif

  std::vector<std::unique_ptr<Fiber>> fibers_;
  int threads_ = 0, running_ = 0;
  const std::function<void()>* body_ = nullptr;
  ucontext_t context_;
  jmp_buf point_;
  const void* stack_ = nullptr;
  size_t stack_size_ = 0;
};

inline Scheduler scheduler;

inline void Scheduler::fiber_main() {
  scheduler.arrived(scheduler.current());
  for (;;) {
    (*scheduler.body_)();
    scheduler.current().state = State::kDone;
    scheduler.to_scheduler(scheduler.current());
  }
}

}  // namespace mblm::cuda::emulation

#define threadIdx (mblm::cuda::emulation::thread_index)
#define blockIdx (mblm::cuda::emulation::block_index)
#define blockDim (mblm::cuda::emulation::block_dimension)
#define gridDim (mblm::cuda::emulation::grid_dimension)

inline void __syncthreads() {
  mblm::cuda::emulation::scheduler.wait(true);
}

inline void __syncwarp() {
  mblm::cuda::emulation::scheduler.wait(false);
}

inline void __threadfence() {}

inline unsigned atomicInc(unsigned* address, unsigned last) {
  const unsigned before = *address;
  *address = before >= last ? 0 : before + 1;
  return before;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return mblm::cuda::emulation::scheduler.exchange(value, lane);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto& scheduler = mblm::cuda::emulation::scheduler;
  return scheduler.exchange(value, scheduler.running() % 32 ^ mask);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> (4 * i) & 7;
    result |= uint32_t(bytes >> (8 * from) & 0xff) << (8 * i);
  }
  return result;
}

namespace mblm::cuda {

// As in mma.cuh. The sums of sixteen products are rounded once.
inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Pieces {
    uint32_t a[4], b[2];
  } const own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto value = [](uint32_t pair, int index) {
    return __uint_as_float(index ? pair & 0xffff0000u : pair << 16);
  };
  auto& scheduler = emulation::scheduler;
  const int group = scheduler.running() % 32 / 4, part = scheduler.running() % 4;
  float left[2][16], right[16][2];  // this lane's two rows of a and columns of b
  scheduler.gather(own, [&](int lane, const Pieces& pieces) {
    for (int i = 0; i < 8; ++i) {
      const int pair = i / 2, k = lane % 4 * 2 + pair / 2 * 8 + i % 2;
      if (lane / 4 == group) left[pair % 2][k] = value(pieces.a[pair], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const int k = lane % 4 * 2 + i / 2 * 8 + i % 2;
      if (lane / 4 / 2 == part) right[k][lane / 4 % 2] = value(pieces.b[i / 2], i % 2);
    }
  });
  for (int i = 0; i < 4; ++i) {
    double sum = sums[i];
    for (int k = 0; k < 16; ++k) sum += double(left[i / 2][k]) * right[k][i % 2];
    sums[i] = float(sum);
  }
}

// As in kernel.cuh, on the spot. Few blocks are run at once, so that strides over the grid are
// taken.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
             Stream, Arguments... args) {
  constexpr int64_t kMaxBlocks = 5;
  constexpr size_t kSharedOfCompute86 = 99 * 1024;  // and of 8.9 and 12.0: the least there is
  if (blocks <= 0) return nullptr;
  if (threads < 1 || threads > 1024) return "invalid configuration argument";
  if (shared_bytes > kSharedOfCompute86) return "too much shared memory";
  std::vector<unsigned char> shared(shared_bytes);
  emulation::grid_dimension.x = unsigned(std::min(blocks, kMaxBlocks));
  emulation::block_dimension.x = unsigned(threads);
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(args)...); };
  for (unsigned i = 0; i < emulation::grid_dimension.x; ++i) {
    std::fill(shared.begin(), shared.end(), 0xff);
    emulation::shared = shared.data();
    emulation::block_index.x = i;
    emulation::scheduler.run(threads, body);
  }
  return nullptr;
}

// One block stands for a cluster.
template <class... Parameters, class... Arguments>
Error launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int, int threads,
                      size_t shared_bytes, Stream stream, Arguments... args) {
  return launch(kernel, clusters, threads, shared_bytes, stream, args...);
}
template <class... Parameters, class... Arguments>
Error launch_dependent(void (*kernel)(Parameters...), Arguments... args) {
  return launch(kernel, args...);
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::shared);
}

}  // namespace mblm::cuda
