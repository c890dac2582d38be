// The cache of decoding states on a CPU: rows that come and go, and calls that advance them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "decode/memory.h"
#include "decode/rows.h"
#include "decode/run.h"
#include "decode/torch/draws.h"
#include "decode/torch/given.h"
#include "decode/torch/host.h"
#include "decode/torch/state.h"
#include "decode/torch/weights.h"

namespace mblm::decode {

// A plan that Python has checked.
struct NewPlan : Wishes {
  std::shared_ptr<GeneratorDraws> draws;  // none: a lane of the device's default generator
  int64_t lane = 0;
};

// What a run did with a row.
struct Ran {
  at::Tensor ids, log_probs;  // (n) int64; (n) float32, or undefined
  Reason reason;
};

using RowIds = std::vector<RowId>;
using Lease = Rows::Lease;

// See mblm/inference/cache.py; bind.cpp makes calls of it. They throw std::invalid_argument or
// c10::ValueError before they change anything, and what the host throws.
class Cache {
 public:
  explicit Cache(std::shared_ptr<const Hierarchy> hierarchy);
  virtual ~Cache() = default;

  // Goes on with other weights of the same shapes.
  void set_hierarchy(std::shared_ptr<const Hierarchy> hierarchy);

  RowIds add(int64_t count) { return rows_.add(count); }
  void drop(const RowIds& rows) noexcept { rows_.drop(rows); }
  // Of rows that calls are for.
  Lease lease(const RowIds& rows) { return Lease(rows_, rows); }
  RowIds copy(const Lease& rows);
  std::vector<int64_t> lengths(const Lease& rows);

  // Takes in all but the last of the bytes, which stays pending. The host is given pieces with
  // which a stage takes in more than `most` positions.
  void feed(const Lease& rows, Host& host, const std::vector<at::Tensor>& given, int64_t most);
  // Returns the rows' lengths.
  std::vector<int64_t> begin(const Lease& rows, std::vector<NewPlan> plans);
  std::vector<Ran> run(const Lease& rows, Host& host, double seconds,
                       const std::vector<std::optional<at::Tensor>>& drafts);
  std::vector<Ran> last(const Lease& rows);
  at::Tensor logits(const Lease& rows, Host& host);
  // By exactly one of the three.
  std::vector<Ran> choose(const Lease& rows, Host& host, const std::optional<at::Tensor>& ids,
                          const std::optional<at::Tensor>& logits,
                          const std::optional<at::Tensor>& mask);

  // Of one row.
  SavedState state(const Lease& rows, Host& host);
  SavedState state_so_far(const Lease& rows);
  void set_state(const Lease& rows, Host& host, const SavedState& state);

 protected:
  // Makes memory a row's own for the bytes before number `to`: see Memory.
  virtual void reserve(const Parts& parts, Row& row, int64_t to, bool jumps);
  // Feeds rows of which a piece is long, or for which a hosted stage is due: all or none.
  virtual void feed_long(const Lease& rows, Host& host, const std::vector<Ids>& ids, int64_t most);
  // Goes on until no member does, one is paused, or the time is over. Returns whether it ended
  // before, for lack of reserved memory.
  virtual bool advance(const Parts& parts, Run::Kind kind, std::vector<Member>& members,
                       cpu::Team::Clock::time_point until = cpu::Team::Clock::time_point::max());
  virtual SavedState save(const Row& row);
  // What a saved row is; it changes nothing of this row but memory that lies outside of it.
  virtual RowState load(const Row& row, const SavedState& state);
  // Copies what lies outside of rows.
  virtual void copy_memory(const Row& /* from */, const Row& /* to */) {}

  std::shared_ptr<const Hierarchy> hierarchy() const;
  static void load_fed(Row& row, RowState after);
  void append(Row& row, const Ids& ids);
  // Takes in all bytes, or all but the last.
  void take_in(const Lease& rows, Host& host, bool keeps_pending);

  std::shared_ptr<const Hierarchy> hierarchy_;
  Memory memory_;
  Rows rows_;

 private:
  // As load, with the local stage before its sequence, whose bytes it has yet to take in; but as it
  // was saved, if they are more than `most`.
  RowState load_above(const Row& row, const SavedState& state, int64_t most);
  // Does nothing and returns false where feed_long is needed.
  bool feed_short(const Lease& rows, const std::vector<Ids>& ids, int64_t most);
  // Goes on also where hosted stages are due.
  bool advance(const Parts& parts, Run::Kind kind, std::vector<Member>& members, Host& host,
               cpu::Team::Clock::time_point until = cpu::Team::Clock::time_point::max());
  // Has hosted stages take in a patch of each member that waits for it.
  void step_hosted(const Parts& parts, std::vector<Member>& members, Host& host);
  void step_hosted(const Parts& parts, int64_t n, const std::vector<Row*>& rows, Host& host);

  // What a call reads: it stays, with the weights, whatever the other calls' become meanwhile.
  std::shared_ptr<const Parts> parts(int64_t most_bytes) const;
  std::shared_ptr<const Parts> parts_for(const Lease& rows, int64_t more) const;
  std::unique_ptr<Workspace> take_space();
  void give_space(std::unique_ptr<Workspace> space) noexcept;
  void reserve_ahead(const Parts& parts, std::vector<Member>& members);
  std::vector<Ids> check_fed(const Lease& rows, const std::vector<at::Tensor>& ids) const;

  const int64_t num_tokens_, max_length_;
  std::unique_ptr<Workspace> spaces_;  // of calls that are over
};

}  // namespace mblm::decode
