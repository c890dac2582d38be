// Positions on a GPU grouped by token id, with torch's own operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>

#include <tuple>

#include "cuda/groups.h"
#include "tensors.h"

namespace mblm {

// Ids outside [0, num_ids) are in no group.
class GroupsOnDevice {
 public:
  GroupsOnDevice(const at::Tensor& ids, int64_t num_ids) : num_ids_(num_ids) {
    at::Tensor sorted;
    std::tie(sorted, order_) = ids.flatten().sort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
    offsets_ = at::searchsorted(sorted, at::arange(num_ids + 1, ids.options()));
    const at::Tensor pieces =
        offsets_.diff().add(cuda::kPiecePositions - 1).floor_divide(cuda::kPiecePositions);
    pieces_ = make::padded(pieces.cumsum(0), {1, 0});
  }

  cuda::Groups groups() const {
    return {order_.numel(), num_ids_, order_.const_data_ptr<int64_t>(),
            offsets_.const_data_ptr<int64_t>(), pieces_.const_data_ptr<int64_t>()};
  }

  // Scratch for sums of this many columns.
  at::Tensor sums(int64_t width, const at::TensorOptions& options) const {
    return make::empty({groups().max_pieces(), width}, options);
  }

 private:
  int64_t num_ids_;
  at::Tensor order_, offsets_, pieces_;
};

}  // namespace mblm
