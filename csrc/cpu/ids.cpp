// Token ids, checked and grouped: see ids.h.
#include "cpu/ids.h"

#include <algorithm>

namespace mblm::cpu {

int64_t first_id_outside(const int64_t* ids, int64_t count, int64_t num_ids) {
  const auto outside = [num_ids](int64_t id) { return id < 0 || id >= num_ids; };
  const int64_t* found = std::find_if(ids, ids + count, outside);
  return found == ids + count ? -1 : found - ids;
}

void group_by_id(const int64_t* ids, int64_t count, int64_t num_ids, int64_t* offsets,
                 int64_t* order) {
  // A counting sort. While positions are placed, offsets[v + 1] is where the next one of id v goes:
  // it starts at the number of smaller ids and ends at the start of the next id's positions.
  std::fill(offsets, offsets + num_ids + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] + 2 <= num_ids) ++offsets[ids[i] + 2];
  }
  for (int64_t v = 1; v <= num_ids; ++v) offsets[v] += offsets[v - 1];
  for (int64_t i = 0; i < count; ++i) order[offsets[ids[i] + 1]++] = i;
}

}  // namespace mblm::cpu
