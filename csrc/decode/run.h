// A run: what a team of threads does for the rows of one call.
//
// Rows are sequences that run side by side, each at its own position of its own patch. A row whose
// patch is complete waits until the others' are; then the stages above take in what is complete,
// for all rows at once, and hand down new contexts. In a round, the local stage takes in the next
// bytes of the rows that do not wait, and each has a byte chosen, if it is to.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu/cache_lines.h"
#include "cpu/team.h"
#include "decode/choose.h"
#include "decode/memory.h"
#include "decode/parts.h"
#include "decode/rows.h"
#include "decode/stage_rows.h"

namespace mblm::decode {

// A row of a call.
struct Member {
  Row* row = nullptr;
  // How far it may go: bytes to have taken in. Its memory is reserved for those.
  int64_t to = 0;
  std::span<const int64_t> draft;  // what is left of it
  // Out: why it does not go on in this call.
  enum class State { kGoes, kIsDone, kIsPaused, kWantsHost } state = State::kGoes;
};

class Run {
 public:
  enum class Kind {
    kTakeIn,   // all bytes before `to`, at once
    kLogits,   // the same, and the logits after them, which are left in the rows
    kContinue  // byte after byte, by the rows' plans
  };

  Run(const Parts& parts, const Memory& memory, Kind kind, std::vector<Member>& members);

  // Products of weights and values that a round takes.
  int64_t products() const;
  // Allocates what that many threads, or fewer, work with.
  void prepare(int64_t threads);

  // All threads of a team call it. It returns when no row goes on, or one is paused; or before: at
  // the given time, where memory is to be reserved, or if the team waits so long for a thread
  // without a core that one thread is quicker. Another team goes on.
  void work(const cpu::Worker& worker, cpu::Team::Clock::time_point until) noexcept;
  bool is_over() const { return round_.is_over; }

 private:
  // A row that takes part in a round.
  struct Active {
    int64_t member;
    int64_t first = 0, count = 0;     // of its positions in the local stage's input
    int64_t output = 0, outputs = 0;  // of those that are read
    const float* numbers = nullptr;
  };
  // What a stage does before patches begin; numbers of members.
  struct CatchUp {
    std::vector<int64_t> anew;
    std::vector<int64_t> projected;  // of those, whose context is to be computed
    std::vector<int64_t> takes;
    std::vector<std::pair<int64_t, int64_t>> positions;  // taken in: member and position
    StageRows rows;
  };

  Row& row(int64_t member) const { return *members_[member].row; }
  int64_t local() const { return parts_.schedule.stages() - 1; }
  bool chooses() const { return kind_ == Kind::kContinue; }
  int64_t end_of_step(const Member& member) const;
  bool wants_host(const Row& row) const;

  // These are the first thread's alone.
  void begin_round();
  void sort_members();
  void plan_catch_up();
  void embed_bytes();
  void draw();

  // These are called by all threads.
  void catch_up(const cpu::Worker& worker);
  void begin_anew(const cpu::Worker& worker, int64_t n);
  void take_in(const cpu::Worker& worker, int64_t n);
  // These by one thread for one row.
  void restart(int64_t n, int64_t member);
  void embed_patch(int64_t n, int64_t member, int64_t position, float* to) const;
  void finish(const Active& active, const float* outputs, Chooser& chooser);
  int64_t choose(const Active& active, Chooser& chooser);

  const Parts& parts_;
  const Memory& memory_;
  const Kind kind_;
  std::vector<Member>& members_;
  bool reads_once_ = false;

  // In a line that is written to in every round: others read what is beside it.
  struct alignas(cpu::cache_lines::kBytesApart) Round {
    bool is_over = false, catches_up = false, has_drafts = false, is_shared = false;
    int64_t positions = 0, outputs = 0;
  };
  Round round_;
  std::vector<Active> active_;
  std::vector<int64_t> waiting_;
  std::vector<CatchUp> upper_;
  StageRows local_rows_;

  cpu::cache_lines::Vector<float> x_;        // (positions, dim), of the local stage
  cpu::cache_lines::Vector<float> logits_;   // (outputs, num_tokens)
  cpu::cache_lines::Vector<float> outputs_;  // per thread (outputs, dim)
  cpu::cache_lines::Vector<float> inputs_, embedded_, values_, scratch_;
  std::vector<Chooser> choosers_;  // per thread
};

}  // namespace mblm::decode
