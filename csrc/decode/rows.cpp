// Slots of rows, and who uses them: see rows.h.
#include "decode/rows.h"

#if __has_include(<pthread.h>)
#include <pthread.h>
#define MBLM_HAS_FORK
#endif

#include <algorithm>
#include <stdexcept>
#include <string>

namespace mblm::decode {
namespace {

constexpr int64_t kMostRows = int64_t(1) << 24;

int64_t slot_of(RowId id) {
  return id & 0xffffffff;
}

[[noreturn]] void refuse(RowId id, const char* why) {
  throw std::invalid_argument("row " + std::to_string(id) + ": " + why);
}

// A child of os.fork() has only the thread that forked: what another one held would stay locked.
struct Mutexes {
  std::mutex table, draws;

  Mutexes() {
#ifdef MBLM_HAS_FORK
    pthread_atfork(
        [] {
          draws_mutex().lock();
          table_mutex().lock();
        },
        unlock, unlock);
#endif
  }
  static void unlock() {
    table_mutex().unlock();
    draws_mutex().unlock();
  }
};

Mutexes& mutexes() {
  static Mutexes* const all = new Mutexes;  // it outlives the rows of an ending process
  return *all;
}

}  // namespace

std::mutex& table_mutex() {
  return mutexes().table;
}

std::mutex& draws_mutex() {
  return mutexes().draws;
}

std::vector<RowId> Rows::add(int64_t count) {
  const std::string got = ", got " + std::to_string(count);
  if (count < 0) throw std::invalid_argument("count: expected a number >= 0" + got);
  if (count > kMostRows) {
    throw std::invalid_argument("count: expected at most " + std::to_string(kMostRows) + " rows" +
                                got);
  }
  std::vector<RowId> ids;
  ids.reserve(count);
  std::vector<std::unique_ptr<Row>> made(count);
  for (auto& row : made) {
    row = std::make_unique<Row>();
    row->stages.resize(stages_);
  }
  const std::lock_guard lock(table_mutex());
  const int64_t all = std::max<int64_t>(0, count - int64_t(free_.size())) + int64_t(slots_.size());
  if (all > kMostRows) {
    throw std::invalid_argument("count: a cache has at most " + std::to_string(kMostRows) +
                                " rows" + got);
  }
  if (size_t(all) > std::min(slots_.capacity(), free_.capacity())) {
    const int64_t ahead = std::max(all, 2 * int64_t(slots_.size()));
    free_.reserve(ahead);
    slots_.reserve(ahead);
  }
  for (auto& row : made) {
    int64_t slot = int64_t(slots_.size());
    if (free_.empty()) {
      slots_.emplace_back();
    } else {
      slot = free_.back();
      free_.pop_back();
    }
    row->slot = slot;
    slots_[slot].row = std::move(row);
    ids.push_back(slot | slots_[slot].generation << 32);
  }
  return ids;
}

Rows::Slot* Rows::find(RowId id) noexcept {
  const int64_t slot = slot_of(id);
  if (id < 0 || slot >= int64_t(slots_.size())) return nullptr;
  Slot& found = slots_[slot];
  return found.row && !found.is_dropped && found.generation == id >> 32 ? &found : nullptr;
}

// The row of a slot that becomes free; it is destroyed when the table is no longer locked.
std::unique_ptr<Row> Rows::vacate(int64_t slot) noexcept {
  Slot& of = slots_[slot];
  of.is_busy = of.is_dropped = false;
  of.generation = (of.generation + 1) & 0x7fffffff;
  free_.push_back(slot);
  return std::move(of.row);
}

void Rows::drop(std::span<const RowId> ids) noexcept {
  for (const RowId id : ids) {
    std::unique_ptr<Row> dropped;
    const std::lock_guard lock(table_mutex());
    Slot* const slot = find(id);
    if (!slot) continue;
    if (slot->is_busy) {
      slot->is_dropped = true;
    } else {
      dropped = vacate(slot_of(id));
    }
  }
}

Rows::Lease::Lease(Rows& rows, std::span<const RowId> ids) : rows_(rows) {
  held_.reserve(ids.size());
  const char* why = nullptr;
  RowId which = 0;
  {
    const std::lock_guard lock(table_mutex());
    for (const RowId id : ids) {
      Slot* const slot = rows_.find(id);
      const auto is_it = [id](const Held& held) { return held.id == id; };
      which = id;
      if (!slot) {
        why = "there is no such row, or it was dropped";
      } else if (slot->is_busy) {
        why = std::any_of(held_.begin(), held_.end(), is_it) ? "twice in one call"
                                                             : "in another call at this time";
      }
      if (why) break;
      slot->is_busy = true;
      held_.push_back({id, slot->row.get()});
    }
  }
  if (why) {
    release();
    refuse(which, why);
  }
}

void Rows::Lease::release() noexcept {
  for (const Held& held : held_) {
    std::unique_ptr<Row> dropped;
    const std::lock_guard lock(table_mutex());
    Slot& slot = rows_.slots_[slot_of(held.id)];
    slot.is_busy = false;
    if (slot.is_dropped) dropped = rows_.vacate(slot_of(held.id));
  }
  held_.clear();
}

}  // namespace mblm::decode
