// What stages do at the end of a patch: those above take in what is complete for many rows at once,
// and those below begin anew with the contexts that this gives.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/team.h"
#include "decode/call.h"
#include "decode/stage_rows.h"

namespace mblm::decode {

// Adds a position of a stage to a token's embedding: a rotation of pairs, a fixed one, the context.
void add_position(const StageParts& stage, const float* context, int64_t position, float* x);

class CatchUp {
 public:
  explicit CatchUp(const Call& call);

  // Makes room for what the members may take in. Returns how many floats each of so many threads
  // needs for what products prepare. Throws std::bad_alloc.
  int64_t prepare(int64_t threads);

  // By the first thread alone: forgets what was planned; plans for members that begin a patch.
  void clear();
  void plan(int64_t member);
  // By all threads of a team, which then wait.
  void work(const cpu::Worker& worker);

 private:
  struct Stage {
    Stage(const StageParts& parts, const StageLayout& layout) : rows(parts, layout) {}

    // Members that begin anew; where the input of the product lies that gives their context, or -1.
    std::vector<std::pair<int64_t, int64_t>> anew;
    int64_t projected = 0;
    std::vector<std::pair<int64_t, int64_t>> positions;  // to take in: member and position
    StageRows rows;
  };

  void begin_anew(const cpu::Worker& worker, int64_t n);
  void take_in(const cpu::Worker& worker, int64_t n);
  // These by one thread for one row.
  void restart(int64_t n, int64_t member, int64_t input);
  void embed_patch(int64_t n, int64_t member, int64_t position, float* to) const;

  const Call& call_;
  std::vector<Stage> stages_;  // the local one takes in nothing here
};

}  // namespace mblm::decode
