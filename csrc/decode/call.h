// What a run is about: weights, the rows of one call, and memory to work with.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cpu/cache_lines.h"
#include "decode/choose.h"
#include "decode/memory.h"
#include "decode/parts.h"
#include "decode/proposer.h"
#include "decode/rows.h"

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
  std::array<Pace, 8> paces;        // of choosing, by the number of rows
  std::unique_ptr<Workspace> next;  // of those that no run uses

  // Half as many rows, or twice, take another time.
  Pace& pace(int64_t rows) {
    return paces[std::min<size_t>(std::bit_width(uint64_t(rows)), paces.size()) - 1];
  }
};

// Whether a hosted stage is to take in a patch before a row's next byte is taken in.
inline bool is_host_due(const Parts& parts, const Row& row) {
  return row.taken > 0 && !row.is_supplied &&
         parts.stages[parts.schedule.due(row.taken)].is_hosted();
}

struct Call {
  enum class Kind {
    kTakeIn,  // all bytes before `to`, at once
    kLogits,  // the same, and the logits after them, which are left in the rows
    kChoose   // byte after byte, by the rows' plans
  };

  const Parts& parts;
  const Memory& memory;
  Kind kind;
  std::vector<Member>& members;
  Workspace& space;

  bool chooses() const { return kind == Kind::kChoose; }
  bool gives_logits() const { return kind != Kind::kTakeIn; }
  int64_t local() const { return parts.schedule.stages() - 1; }
  const StageLayout& layout(int64_t n) const { return memory.layout(n); }
  Row& row(int64_t member) const { return *members[member].row; }
  float* blob(int64_t n, int64_t member) const { return row(member).stages[n].blob.data(); }
  // Bytes that a member has taken in after its next step, without drafts.
  int64_t next(int64_t member) const {
    const Row& of = row(member);
    return chooses() ? std::min(of.taken + 1, of.length) : members[member].to;
  }
  // Positions that a stage takes in with them.
  int64_t new_positions(int64_t n, int64_t member) const {
    return parts.schedule.new_positions(n, row(member).taken, next(member));
  }
  bool begins_anew(int64_t n, int64_t member) const {
    return parts.schedule.begins_anew(n, row(member).taken, next(member));
  }
  // Positions that members come to have in a stage's sequence, at most.
  int64_t most_positions(int64_t n) const {
    int64_t most = 0;
    for (const Member& member : members) {
      const bool goes_round =
          chooses() && n > 0 && parts.schedule.begins_anew(n, member.row->taken, member.to);
      most = std::max(
          most, goes_round ? parts.schedule.seq_len(n) : parts.schedule.position(n, member.to));
    }
    return most;
  }
};

// Memory that need not keep what it held.
inline void grow(Workspace::Floats& memory, int64_t size) {
  if (int64_t(memory.size()) < size) memory.resize(size);
}

}  // namespace mblm::decode
