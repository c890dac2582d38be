// Token ids: the check that they lie in a table, and their positions grouped by id.
#pragma once

#include <cstdint>

namespace mblm::cpu {

// Index of the first id outside [0, num_ids), or -1 if there is none.
int64_t first_id_outside(const int64_t* ids, int64_t count, int64_t num_ids);

// The positions of each id in turn: those of id v are order[offsets[v]] .. order[offsets[v + 1]-1],
// in rising order. offsets holds num_ids + 1 numbers, order holds count. Ids lie in [0, num_ids).
void group_by_id(const int64_t* ids, int64_t count, int64_t num_ids, int64_t* offsets,
                 int64_t* order);

}  // namespace mblm::cpu
