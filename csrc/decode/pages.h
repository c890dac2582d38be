// Memory of rows: blocks of one size from a pool, shared by rows until one of them writes.
//
// A page holds the keys and values of some positions of a stage, a blob what else a row has there.
// Blocks are taken and made a row's own before threads start, so that a step never allocates.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "cpu/cache_lines.h"

namespace mblm::decode {

// Held for moments, never while anything is computed or destroyed: it guards the tables
// of all caches, and os.fork() takes it too, so that a child finds it free. See rows.cpp.
std::mutex& table_mutex();
// The same, while random numbers are drawn.
std::mutex& draws_mutex();

class Pool;

// In memory, before a block's floats.
struct alignas(cpu::cache_lines::kBytes) BlockHeader {
  std::atomic<int64_t> users{1};
  Pool* pool;
  BlockHeader* next_free = nullptr;

  explicit BlockHeader(Pool* of) : pool(of) {}
  float* data() { return reinterpret_cast<float*>(this + 1); }
};

// Blocks of so many floats. It outlives them.
class Pool {
 public:
  explicit Pool(int64_t floats) : floats_(floats) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    while (free_) destroy(std::exchange(free_, free_->next_free));
  }

  int64_t floats() const { return floats_; }

  // A block with one user, of any content. Throws std::bad_alloc.
  BlockHeader* take() {
    {
      const std::lock_guard lock(table_mutex());
      if (free_) {
        BlockHeader* block = std::exchange(free_, free_->next_free);
        block->users.store(1, std::memory_order_relaxed);
        free_bytes_ -= bytes();
        return block;
      }
    }
    void* memory = ::operator new(size_t(bytes()), std::align_val_t(alignof(BlockHeader)));
    return new (memory) BlockHeader(this);
  }

  void give_back(BlockHeader* block) noexcept {
    {
      const std::lock_guard lock(table_mutex());
      if (free_bytes_ + bytes() <= kMostFreeBytes) {
        block->next_free = std::exchange(free_, block);
        free_bytes_ += bytes();
        return;
      }
    }
    destroy(block);
  }

 private:
  static constexpr int64_t kMostFreeBytes = int64_t(1) << 26;

  static void destroy(BlockHeader* block) noexcept {
    block->~BlockHeader();
    ::operator delete(block, std::align_val_t(alignof(BlockHeader)));
  }

  int64_t bytes() const { return int64_t(sizeof(BlockHeader) + size_t(floats_) * sizeof(float)); }

  const int64_t floats_;
  BlockHeader* free_ = nullptr;
  int64_t free_bytes_ = 0;
};

// One user's hold on a block; a copy shares it.
class Block {
 public:
  Block() = default;
  // A new block of a pool's.
  explicit Block(Pool& pool) : header_(pool.take()) {}
  Block(const Block& other) noexcept : header_(other.header_) {
    if (header_) header_->users.fetch_add(1, std::memory_order_relaxed);
  }
  Block(Block&& other) noexcept : header_(std::exchange(other.header_, nullptr)) {}
  Block& operator=(Block other) noexcept {
    std::swap(header_, other.header_);
    return *this;
  }
  ~Block() {
    if (header_ && header_->users.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      header_->pool->give_back(header_);
    }
  }

  explicit operator bool() const { return header_; }
  float* data() const { return header_->data(); }
  bool is_shared() const { return header_->users.load(std::memory_order_acquire) > 1; }

 private:
  BlockHeader* header_ = nullptr;
};

}  // namespace mblm::decode
