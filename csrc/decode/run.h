// A run: what a team of threads does for the rows of one call.
//
// Rows are sequences that run side by side, each at its own position of its own patch. A row whose
// patch is complete may wait for others', that the stages above take in what is complete for many
// rows at once, and hand down new contexts. In a round, the local stage takes in the next bytes of
// the rows that do not wait, and each has a byte chosen, if it is to.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cpu/cache_lines.h"
#include "cpu/team.h"
#include "decode/call.h"
#include "decode/catch_up.h"
#include "decode/choose.h"
#include "decode/stage_rows.h"

namespace mblm::decode {

class Run : Call {
 public:
  using Kind = Call::Kind;

  Run(const Parts& parts, const Memory& memory, Kind kind, std::vector<Member>& members,
      Workspace& space);

  // Products of weights and values in a round.
  int64_t products() const;
  // Allocates what that many threads work with; returns how many floats each needs for what
  // products prepare. Throws std::bad_alloc.
  int64_t prepare(int64_t threads);

  // All threads of a team call it. It returns when no row goes on. Where bytes are chosen, it
  // returns before if one is paused or has no memory reserved, at the given time, or if the team
  // waits so long for a thread without a core that one thread is quicker. Another team may go on.
  void work(const cpu::Worker& worker, cpu::Team::Clock::time_point until) noexcept;
  // Whether it has returned because a row has no memory reserved.
  bool needs_memory() const { return needs_memory_; }

 private:
  // A row that takes part in a round.
  struct Active {
    int64_t member = 0;
    int64_t first = 0, count = 0;     // of its positions in the local stage's input
    int64_t output = 0, outputs = 0;  // of those whose output is read
    int64_t place = 0;                // among the rows that take in positions
    const float* numbers = nullptr;   // to choose with
  };

  int64_t most_positions_at_once(int64_t member) const;
  bool proposes(const Row& row) const { return draws_apart_ && row.plan->proposer; }

  // These are called by the first thread alone.
  void begin_round();
  void sort_members();
  void plan_step();
  void embed_bytes();
  // By the last thread alone.
  void draw();

  // These by one thread for one row.
  void read_outputs(const Active& active, float* outputs) const;
  void finish(const Active& active, const float* outputs, Chooser& chooser);
  int64_t choose_bytes(const Active& active, Chooser& chooser);
  const float* logits_of(const Active& active, int64_t i) const;

  // Whether rows may choose several bytes at a time in any order, drawing the same numbers: if not,
  // nothing is drafted.
  const bool draws_apart_;

  // In a line that is written to in every round: others read what is beside it.
  struct alignas(cpu::cache_lines::kBytesApart) Round {
    bool is_over = false, catches_up = false;
    int64_t positions = 0, outputs = 0, drafted = 0;
  };
  Round round_;
  bool needs_memory_ = false;
  std::vector<Active> active_;
  std::vector<int64_t> left_;  // of each row that goes on: see Schedule::pays_to_wait

  StageRows rows_;  // that the local stage takes in
  CatchUp catch_up_;
  int64_t outputs_of_thread_ = 0;
};

}  // namespace mblm::decode
