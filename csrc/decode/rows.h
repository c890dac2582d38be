// Rows: sequences that are decoded, each in a slot, that are added, copied and dropped at any time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "cpu/sampling.h"
#include "decode/automaton.h"
#include "decode/bytes.h"
#include "decode/pages.h"
#include "decode/proposer.h"

namespace mblm::decode {

// Slot and generation: a dropped handle never means another row.
using RowId = int64_t;

// Why a row's run returned.
enum class Reason { kTime, kLength, kStop, kMatched, kContext, kMemory, kLogits };

inline const char* name_of(Reason reason) {
  constexpr const char* kNames[] = {"time",    "length", "stop",  "matched",
                                    "context", "memory", "logits"};
  return kNames[int(reason)];
}

// Uniform random numbers (num_tokens): drawn, or, of a GPU's generator, what draws them again. See
// cuda/philox.h.
struct Numbers {
  const float* values = nullptr;
  uint64_t seed = 0, offset = 0;
  uint32_t threads = 1, first = 0;
};

// Where the uniform random numbers of plans come from: see draws.h.
class Draws {
 public:
  virtual ~Draws() = default;
  // The n-th numbers (num_tokens) of a lane, valid until the lane asks for others or leaves; null
  // if there is no memory left.
  virtual const float* of(int64_t lane, int64_t n) noexcept = 0;
  // The same, of a byte to come. Throws std::bad_alloc.
  virtual Numbers ahead(int64_t lane, int64_t n) = 0;
  // Numbers before the n-th are not asked for again.
  virtual void pass_on(int64_t lane, int64_t n) noexcept = 0;
  // The lane serves its row no longer, and would go on with the n-th numbers.
  virtual void leave(int64_t lane, int64_t n) noexcept = 0;
  // Gives numbers that no lane has come to back to a generator that can take them back, if nobody
  // has drawn from it since.
  virtual void give_back() noexcept {}
  virtual bool can_give_back() const { return false; }
  virtual const void* generator() const = 0;
  // The lane is as it was before it was entered.
  virtual void put_back(int64_t lane) noexcept = 0;
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
  Numbers ahead(int64_t by) const { return draws_->ahead(lane_, next_ + by); }
  void pass_on() const noexcept {
    if (draws_) draws_->pass_on(lane_, next_);
  }
  Draws* draws() const { return draws_.get(); }
  void advance() { ++next_; }
  bool is(const Draws* draws, int64_t lane) const { return draws_.get() == draws && lane_ == lane; }
  void leave() noexcept {
    if (draws_) draws_->leave(lane_, next_);
    draws_.reset();
  }
  // As if it had not been entered.
  void put_back() noexcept {
    if (draws_) draws_->put_back(lane_);
    draws_.reset();
  }

 private:
  std::shared_ptr<Draws> draws_;
  int64_t lane_ = 0, next_ = 0;
};

// How a row is to be continued.
struct Wishes {
  int64_t max_tokens = 0;
  cpu::Sampling sampling;
  std::shared_ptr<const Automaton> allow, stop;
  bool wants_log_probs = false, pauses = false;
  int64_t draft = 0;  // bytes that are proposed at a time, at most
};

// The same, and how far it is.
struct Plan : Wishes {
  int64_t room = 0;  // bytes that the row may still have had when the plan began
  Lane lane;
  std::unique_ptr<Proposer> proposer;  // none without drafts

  int64_t count = 0;  // bytes chosen
  int32_t allow_state = 0, stop_state = 0;
  std::optional<Reason> end;

  int64_t left() const { return std::min(max_tokens, room) - count; }
};

// The state of a stage that Python steps: an object of Python's, which may be let go without the
// GIL. See bind.cpp.
using HostedState = std::shared_ptr<const void>;

// What a row has in one stage: see memory.h for where things lie.
struct StageState {
  Block blob;
  int64_t start_id = 0;  // whose start token's keys and values the first page begins with
  std::vector<Block> pages;
  std::vector<float*> keys, values;  // of the pages
  HostedState hosted;
};

// What a row is, without its plan.
struct RowState {
  int64_t length = 0;  // bytes it has
  int64_t taken = 0;   // bytes that its stages have taken in: length or length - 1
  Bytes bytes;         // the last of them, from the most global stage's last patch on or earlier
  std::vector<StageState> stages;
  // Whether the stage that is due has taken in its patch, and the context that it gives is there,
  // though the next byte has not been taken in.
  bool is_supplied = false;
  // Logits after the bytes taken in, (num_tokens); empty where they have not been computed.
  std::vector<float> logits;

  bool has_pending() const { return length > taken; }
  // One of the bytes, by its number.
  int32_t byte(int64_t number) const { return bytes[number - (length - bytes.size())]; }
};

struct Row : RowState {
  int64_t slot = 0;
  std::optional<Plan> plan;

  // What the last run or choice gave.
  std::vector<int64_t> ids;
  std::vector<float> log_probs;
  bool lacks_memory = false;  // which ended the last run

  // Why the last run returned, or the next one would.
  Reason reason() const {
    if (plan->end) return *plan->end;
    if (lacks_memory) return Reason::kMemory;
    return plan->pauses && !has_pending() ? Reason::kLogits : Reason::kTime;
  }
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

  // Rows in use, which nobody else may use until they are released.
  class Lease {
   public:
    // Throws std::invalid_argument naming a row that is unknown, in another call or given twice.
    Lease(Rows& rows, std::span<const RowId> ids);
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { release(); }

    // After which it is of no rows.
    void release() noexcept;

    int64_t size() const { return int64_t(held_.size()); }
    Row& operator[](int64_t i) const { return *held_[i].row; }
    RowId id(int64_t i) const { return held_[i].id; }

   private:
    struct Held {
      RowId id;
      Row* row;
    };

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
