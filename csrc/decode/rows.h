// Rows: sequences that are decoded, each in a slot, that are added, copied and dropped at any time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "cpu/sampling.h"
#include "decode/automaton.h"
#include "decode/pages.h"

namespace mblm::decode {

// Slot and generation: a dropped handle never means another row.
using RowId = int64_t;

// Why a row's run returned.
enum class Reason { kTime, kLength, kStop, kMatched, kContext, kMemory, kLogits };

// Where the uniform random numbers of plans come from: see draws.h.
class Draws {
 public:
  virtual ~Draws() = default;
  // The n-th numbers (num_tokens) of a lane, valid until the lane asks for others or leaves; null
  // if there is no memory left.
  virtual const float* of(int64_t lane, int64_t n) noexcept = 0;
  // The lane serves its row no longer, and would go on with the n-th numbers.
  virtual void leave(int64_t lane, int64_t n) noexcept = 0;
};

// A lane of draws that serves a row.
class Lane {
 public:
  Lane() = default;
  Lane(std::shared_ptr<Draws> draws, int64_t lane, int64_t first)
      : draws_(std::move(draws)), lane_(lane), next_(first) {}
  Lane(Lane&& other) noexcept = default;
  Lane& operator=(Lane&& other) noexcept {
    leave();
    draws_ = std::move(other.draws_);
    lane_ = other.lane_;
    next_ = other.next_;
    return *this;
  }
  ~Lane() { leave(); }

  // Numbers of the next byte, the same until one is chosen; null if there is no memory left.
  const float* numbers() const { return draws_->of(lane_, next_); }
  void advance() { ++next_; }
  void leave() noexcept {
    if (draws_) draws_->leave(lane_, next_);
    draws_.reset();
  }

 private:
  std::shared_ptr<Draws> draws_;
  int64_t lane_ = 0, next_ = 0;
};

// How a row is to be continued, and how far it is.
struct Plan {
  int64_t max_tokens = 0;
  cpu::Sampling sampling;
  Lane lane;
  std::shared_ptr<const Automaton> allow, stop;
  bool wants_log_probs = false, pauses = false;

  int64_t count = 0;  // bytes chosen
  int32_t allow_state = 0, stop_state = 0;
  std::optional<Reason> end;

  int64_t left() const { return max_tokens - count; }
};

// What a row has in one stage: see memory.h for where things lie.
struct StageState {
  Block blob;
  std::vector<Block> pages;
  std::vector<float*> keys, values;  // of the pages
};

struct Row {
  int64_t length = 0;         // bytes it has
  int64_t taken = 0;          // bytes that its stages have taken in: length or length - 1
  std::vector<int32_t> tail;  // the last bytes: see kept_bytes
  std::vector<StageState> stages;
  // Whether a hosted stage that is due has taken in its patch, though the next byte has not been.
  bool is_supplied = false;

  std::optional<Plan> plan;

  // What the last run or choice gave.
  std::vector<int64_t> ids;
  std::vector<float> log_probs;
  Reason reason = Reason::kTime;

  // Logits after the bytes taken in, (num_tokens); empty where they have not been computed.
  std::vector<float> logits;

  bool has_pending() const { return length > taken; }
  // A byte of the tail, by its number.
  int32_t byte(int64_t number) const { return tail[number - (length - int64_t(tail.size()))]; }
};

// The rows of a cache.
class Rows {
 public:
  explicit Rows(int64_t stages) : stages_(stages) {}
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  std::vector<RowId> add(int64_t count);
  // Forgets rows, one that is in a call when that ends. Ignores what are none.
  void drop(std::span<const RowId> ids) noexcept;

  // The rows of one call, which no other call may use meanwhile.
  class Lease {
   public:
    // Throws std::invalid_argument naming a row that is unknown, in another call or given twice.
    Lease(Rows& rows, std::span<const RowId> ids);
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { release(held_.size()); }

    int64_t size() const { return int64_t(held_.size()); }
    Row& operator[](int64_t i) const { return *held_[i].row; }

   private:
    struct Held {
      int64_t slot;
      Row* row;
    };
    void release(size_t count) noexcept;

    Rows& rows_;
    std::vector<Held> held_;
  };

 private:
  struct Slot {
    std::unique_ptr<Row> row;
    int64_t generation = 0;
    bool is_busy = false, is_dropped = false;
  };

  Slot* find(RowId id) noexcept;
  std::unique_ptr<Row> vacate(int64_t slot) noexcept;

  const int64_t stages_;
  std::vector<Slot> slots_;
  std::vector<int64_t> free_;  // slots without a row
};

}  // namespace mblm::decode
