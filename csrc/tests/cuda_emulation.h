// Runs CUDA kernels on the CPU, so that their logic is tested on any machine.
//
// Included before a .cu file, it lets a C++ compiler take that file: the qualifiers mean nothing or
// `static`, launch() runs the blocks one after another, and a block's threads are fibers that take
// turns at barriers and shuffles. Between two barriers the threads run one after another, in rising
// or falling order: a result that differs between the two lacks a barrier. Shared memory has
// exactly the size asked for, so that the address sanitizer sees what lies outside, and is filled
// with NaNs, so that nothing rests on what it held before.
#pragma once

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
#endif

#define MBLM_CUDA_EMULATION
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // #pragma unroll
#endif

#include "cuda/stream.h"

namespace mblm::cuda::emulation {

struct Index {
  unsigned x = 0;
};

// In which order a block's threads run between barriers.
inline bool falling_order = false;

// The threads of one block, each on a stack of its own.
class Block {
 public:
  explicit Block(int threads) : threads_(threads) {
    while (int(stacks_.size()) < threads) stacks_.push_back(std::make_unique_for_overwrite<Stack>());
    for (int i = 0; i < threads; ++i) threads_[i].stack = stacks_[i]->bytes;
  }

  // Runs body() in every thread, to its end.
  void run(const std::function<void()>& body);

  // Called from a thread: wait for all threads of the block, or of the warp.
  void wait(bool for_block) {
    current().state = for_block ? State::kAtBlockBarrier : State::kAtWarpBarrier;
    to_scheduler(false);
  }

  // Called from a thread: what `lane` of its warp hands over in the same call.
  template <class T>
  T exchange(T value, int lane) {
    static_assert(sizeof(T) <= sizeof(current().handed_over));
    std::memcpy(&current().handed_over, &value, sizeof(T));
    wait(false);
    const int from = running_ / 32 * 32 + lane;
    if (lane < 0 || lane >= 32 || from >= int(threads_.size())) fail("a shuffle from no lane");
    std::memcpy(&value, &threads_[from].handed_over, sizeof(T));
    wait(false);
    return value;
  }

  int running() const { return running_; }

  static inline Block* current_block = nullptr;

 private:
  static constexpr size_t kStackSize = 128 * 1024;
  enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };
  struct Stack {
    alignas(16) char bytes[kStackSize];
  };
  struct Thread {
    char* stack;
    ucontext_t context;
    State state = State::kReady;
    uint64_t handed_over = 0;
    void* fake_stack = nullptr;
  };

  [[noreturn]] static void fail(const char* what) {
    std::printf("emulated CUDA kernel: %s\n", what);
    std::abort();
  }

  Thread& current() { return threads_[running_]; }

  static void start() {
    Block* block = current_block;
    block->arrived(nullptr);
    (*block->body_)();
    block->current().state = State::kDone;
    block->to_scheduler(true);
  }

  // Frees the threads [begin, end) if all that are not done wait at this barrier.
  bool release(size_t begin, size_t end, State barrier) {
    bool any = false;
    for (size_t i = begin; i < end; ++i) {
      if (threads_[i].state == barrier) any = true;
      else if (threads_[i].state != State::kDone) return false;
    }
    for (size_t i = begin; i < end; ++i) {
      if (threads_[i].state == barrier) threads_[i].state = State::kReady;
    }
    return any;
  }

  // The address sanitizer wants to know of every change of stacks.
  void to_thread();
  void to_scheduler(bool for_good);
  void arrived(void* fake_stack) {
    (void)fake_stack;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }

  static inline std::vector<std::unique_ptr<Stack>> stacks_;  // of all blocks, one after the other
  std::vector<Thread> threads_;
  ucontext_t scheduler_;
  int running_ = 0;
  const std::function<void()>* body_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
};

inline Index thread_index, block_index, block_dimension, grid_dimension;
inline unsigned char* shared = nullptr;

inline void Block::to_thread() {
  thread_index.x = unsigned(running_);
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, current().stack, kStackSize);
#endif
  swapcontext(&scheduler_, &current().context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline void Block::to_scheduler(bool for_good) {
  Thread& thread = current();
  (void)for_good;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.fake_stack, scheduler_stack_,
                                 scheduler_stack_size_);
#endif
  swapcontext(&thread.context, &scheduler_);
  arrived(thread.fake_stack);
}

inline void Block::run(const std::function<void()>& body) {
  current_block = this;
  body_ = &body;
  for (Thread& thread : threads_) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStackSize;
    thread.context.uc_link = nullptr;
    thread.state = State::kReady;
    makecontext(&thread.context, &Block::start, 0);
  }
  const size_t count = threads_.size();
  for (;;) {
    bool progress = false, all_done = true;
    for (size_t i = 0; i < count; ++i) {
      running_ = int(falling_order ? count - 1 - i : i);
      if (current().state == State::kReady) {
        to_thread();
        progress = true;
      }
    }
    for (const Thread& thread : threads_) all_done = all_done && thread.state == State::kDone;
    if (all_done) return;
    for (size_t warp = 0; warp < count; warp += 32) {
      progress |= release(warp, std::min(warp + 32, count), State::kAtWarpBarrier);
    }
    progress |= release(0, count, State::kAtBlockBarrier);
    if (!progress) fail("threads wait at different barriers");
  }
}

}  // namespace mblm::cuda::emulation

#define threadIdx (mblm::cuda::emulation::thread_index)
#define blockIdx (mblm::cuda::emulation::block_index)
#define blockDim (mblm::cuda::emulation::block_dimension)
#define gridDim (mblm::cuda::emulation::grid_dimension)

inline void __syncthreads() {
  mblm::cuda::emulation::Block::current_block->wait(true);
}

inline void __syncwarp() {
  mblm::cuda::emulation::Block::current_block->wait(false);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return mblm::cuda::emulation::Block::current_block->exchange(value, lane);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto* block = mblm::cuda::emulation::Block::current_block;
  return block->exchange(value, block->running() % 32 ^ mask);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

namespace mblm::cuda {

// As in kernel.cuh, on the spot. Few blocks are run at once, so that strides over the grid are
// taken.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
             Stream, Arguments... args) {
  constexpr int64_t kMaxBlocks = 5;
  constexpr size_t kSharedOfCompute80 = 163 * 1024;
  if (blocks <= 0) return nullptr;
  if (threads < 1 || threads > 1024) return "invalid configuration argument";
  if (shared_bytes > kSharedOfCompute80) return "too much shared memory";
  std::vector<unsigned char> shared(shared_bytes);
  emulation::grid_dimension.x = unsigned(std::min(blocks, kMaxBlocks));
  emulation::block_dimension.x = unsigned(threads);
  emulation::Block block(threads);
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(args)...); };
  for (unsigned i = 0; i < emulation::grid_dimension.x; ++i) {
    std::fill(shared.begin(), shared.end(), 0xff);
    emulation::shared = shared.data();
    emulation::block_index.x = i;
    block.run(body);
  }
  return nullptr;
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::shared);
}

}  // namespace mblm::cuda
