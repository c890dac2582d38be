// Rows in their slots on a GPU: how far each is, and how it is to go on.
//
// The host writes them before a unit of work and reads them after it. Within a unit, kernels read
// them until a byte is chosen, which is when they change.
#pragma once

#include <cmath>
#include <cstdint>

namespace mblm::cuda {

// Follows the bytes that a row chooses. Tables may be shared by rows.
struct Automaton {
  const int32_t* classes = nullptr;   // (num_tokens); null where there is no automaton
  const int32_t* next = nullptr;      // (states, num_classes), -1 where a token is forbidden
  const int32_t* distance = nullptr;  // (states), fewest tokens to acceptance
  int64_t num_classes = 0;
  int64_t state = 0;  // -1 after one that is forbidden
};

// What becomes of a row that has taken in its pending byte.
enum class Way : int32_t {
  kPause,   // nothing: the host chooses
  kFeed,    // the host has chosen already
  kChoose,  // the GPU chooses
};

struct Slot {
  int64_t taken = 0;     // bytes taken in
  int64_t pending = -1;  // the byte that comes next; -1 for none
  int64_t left = 0;      // bytes by which it is to grow in this unit; without, nothing is written
  int64_t planned = 0;   // bytes that its plan has left
  int64_t done = 0;      // bytes by which it has grown in this unit
  // Bytes up to the end of a patch that is fed, by which alone it grows in this unit: the local
  // stage takes no step for them, as it begins anew after them.
  int64_t skipped = 0;
  Way way = Way::kPause;

  float temperature = 1;
  int64_t top_k = 1;
  float top_p = 0;  // instead, if it is positive
  float least =
      -INFINITY;  // of what is kept, the logarithm of how likely it is beside the likeliest
  bool has_log_probs = false;
  bool has_numbers = false;  // the host has drawn them: see Slots::uniform
  // Random numbers: how many threads draw them, and which of what they draw at once are the row's.
  uint32_t threads = 1, first_number = 0;
  Automaton allow, stop;
};

// Where a generator is when it draws the numbers of a byte.
struct Drawn {
  uint64_t seed = 0, offset = 0;
};

// Which stages are due when: see decode/schedule.h.
struct Schedule {
  int64_t stages = 1;
  const int64_t* patch_sizes = nullptr;  // (stages), bytes of a position; the local stage's is 1
};

}  // namespace mblm::cuda
