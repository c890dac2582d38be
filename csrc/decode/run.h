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
#include "decode/choose.h"
#include "decode/memory.h"
#include "decode/parts.h"
#include "decode/proposer.h"
#include "decode/rows.h"
#include "decode/stage_rows.h"

namespace mblm::decode {

// A row of a call.
struct Member {
  Row* row = nullptr;
  // Bytes to have taken in, for which its memory is reserved: how far it goes, or may go.
  int64_t to = 0;
  std::span<const int64_t> draft = {};  // bytes that may be chosen next
  // Out: why it does not go on. A hosted stage may be due before it does.
  std::optional<Reason> reason = {};
  bool wants_host = false;

  bool goes() const { return !reason && !wants_host; }
};

// What a run works with; another one may use it after that.
struct Workspace {
  using Floats = cpu::cache_lines::Vector<float>;
  Floats x;                         // (positions, dim) of the local stage
  Floats logits;                    // (outputs, num_tokens)
  Floats outputs;                   // per thread (outputs, dim)
  Floats inputs, embed, values;     // of stages above
  Floats trail;                     // to roll back with, of the local stage
  Floats scratch;                   // of the stages' kernels
  std::vector<Chooser> choosers;    // per thread
  Pace pace;                        // of choosing
  std::unique_ptr<Workspace> next;  // of those that no run uses
};

// Whether a hosted stage is to take in a patch before a row's next byte is taken in.
bool is_host_due(const Parts& parts, const Row& row);

class Run {
 public:
  enum class Kind {
    kTakeIn,  // all bytes before `to`, at once
    kLogits,  // the same, and the logits after them, which are left in the rows
    kChoose   // byte after byte, by the rows' plans
  };

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

  // What a stage does before the local stage's next step.
  struct StageWork {
    StageWork(const StageParts& parts, const StageLayout& layout) : rows(parts, layout) {}

    // Members that begin anew; where the input of the product lies that gives their context, or -1.
    std::vector<std::pair<int64_t, int64_t>> anew;
    int64_t projected = 0;
    std::vector<int64_t> takes;                          // members with positions to take in
    std::vector<std::pair<int64_t, int64_t>> positions;  // those: member and position
    StageRows rows;
  };

  bool chooses() const { return kind_ == Kind::kChoose; }
  bool gives_logits() const { return kind_ != Kind::kTakeIn; }
  int64_t local() const { return parts_.schedule.stages() - 1; }
  const StageLayout& layout(int64_t n) const { return memory_.layout(n); }
  Row& row(int64_t member) const { return *members_[member].row; }
  float* blob(int64_t n, int64_t member) const { return row(member).stages[n].blob.data(); }
  // Bytes that a row has taken in after its next step, without drafts.
  int64_t next(const Row& row, const Member& member) const;
  // Whether it begins a patch with its next step.
  bool begins_patch(int64_t member) const;
  int64_t most_positions(int64_t n, const Member& member) const;
  bool proposes(const Row& row) const { return draws_apart_ && row.plan->proposer; }

  // These are called by the first thread alone.
  void begin_round();
  void sort_members();
  void plan_catch_up();
  void plan_step();
  void embed_bytes();
  // By the last thread alone.
  void draw();

  // These are called by all threads.
  void catch_up(const cpu::Worker& worker);
  void begin_anew(const cpu::Worker& worker, int64_t n);
  void take_in(const cpu::Worker& worker, int64_t n);

  // These by one thread for one row.
  void restart(int64_t n, int64_t member, int64_t input);
  void embed_patch(int64_t n, int64_t member, int64_t position, float* to) const;
  void read_outputs(const Active& active, float* outputs) const;
  void finish(const Active& active, const float* outputs, Chooser& chooser);
  int64_t choose_bytes(const Active& active, Chooser& chooser);
  const float* logits_of(const Active& active, int64_t i) const;

  const Parts& parts_;
  const Memory& memory_;
  const Kind kind_;
  std::vector<Member>& members_;
  Workspace& space_;
  // Whether rows may choose several bytes at a time in any order, drawing the same numbers.
  const bool draws_apart_;

  // In a line that is written to in every round: others read what is beside it.
  struct alignas(cpu::cache_lines::kBytesApart) Round {
    bool is_over = false, catches_up = false, has_drafts = false;
    int64_t positions = 0, outputs = 0;
  };
  Round round_;
  bool needs_memory_ = false;
  std::vector<Active> active_;
  std::vector<int64_t> left_;  // of each row that goes on: see Schedule::pays_to_wait
  std::vector<StageWork> stages_;

  int64_t outputs_of_thread_ = 0;
};

}  // namespace mblm::decode
