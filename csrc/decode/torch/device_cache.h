// The cache of decoding states on a GPU. What Cache checks and knows of rows holds here, too; only
// where their states lie, and who advances them, is another matter.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "decode/torch/cache.h"
#include "decode/torch/device_slots.h"

namespace mblm::decode {

class DeviceCache : public Cache {
 public:
  // With slots for so many rows from the beginning, which another cache may have left. More are
  // made when there are more rows; the kernels, and so a row's last bits, may differ with their
  // number.
  DeviceCache(std::shared_ptr<const Hierarchy> hierarchy, int64_t max_rows);
  ~DeviceCache() override;

  int64_t slots();
  int64_t graphs();

 private:
  SavedState save(const Row& row) override;
  RowState load(const Row& row, const SavedState& state) override;
  void copy_memory(const Row& from, const Row& to) override;
  void reserve(const Parts& parts, Row& row, int64_t to, bool jumps) override;
  void feed_long(const Lease& rows, Host& host, const std::vector<Ids>& ids, int64_t most) override;
  bool advance(const Parts& parts, Run::Kind kind, std::vector<Member>& members,
               cpu::Team::Clock::time_point until) override;

  void make_room(int64_t slots, int64_t bytes);
  bool run_unit(Run::Kind kind, std::vector<Member>& members);
  // Tells the GPU what is to become of a row in the next unit, and returns in how many steps.
  int64_t tell(Run::Kind kind, const Member& member);
  int64_t steps_of(const Row& row, int64_t left) const;
  // Numbers for the rows that choose, and for how many steps at most it is known who draws.
  int64_t draw(const std::vector<Member*>& going, int64_t count);
  void read(Run::Kind kind, Row& row);
  // What the rows whose caller is to choose, or wants logits, come to; whether there are such.
  bool pause(Run::Kind kind, std::vector<Member>& members);
  cuda::Automaton on_device(const std::shared_ptr<const Automaton>& automaton, int64_t state);

  std::mutex mutex_;  // of what follows; held while a unit runs
  std::shared_ptr<const Hierarchy> used_;
  std::shared_ptr<DeviceSlots> slots_;
  // Tables of automata, (classes of tokens, next, distance).
  std::map<std::shared_ptr<const Automaton>, at::Tensor> automata_;
};

}  // namespace mblm::decode
