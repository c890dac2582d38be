// Positions grouped by id as the CUDA kernels want them.
#pragma once

#include <vector>

#include "cpu/ids.h"
#include "cuda/groups.h"

namespace mblm::test {

struct GroupedIds {
  std::vector<int64_t> order, offsets, pieces;

  GroupedIds(const std::vector<int64_t>& ids, int64_t num_ids)
      : order(ids.size()), offsets(num_ids + 1), pieces(num_ids + 1) {
    cpu::group_by_id(ids.data(), int64_t(ids.size()), num_ids, offsets.data(), order.data());
    for (int64_t v = 0; v < num_ids; ++v) {
      const int64_t count = offsets[v + 1] - offsets[v];
      pieces[v + 1] = pieces[v] + (count + cuda::kPiecePositions - 1) / cuda::kPiecePositions;
    }
  }

  cuda::Groups groups() const {
    return {int64_t(order.size()), int64_t(offsets.size()) - 1, order.data(), offsets.data(),
            pieces.data()};
  }
};

}  // namespace mblm::test
