// Positions on a GPU grouped by token id, with torch's own operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>

#include <tuple>

#include "cuda/groups.h"

namespace mblm {

// Ids outside [0, num_ids) are in no group.
class GroupsOnDevice {
 public:
  GroupsOnDevice(const at::Tensor& ids, int64_t num_ids) : num_ids_(num_ids) {
    at::Tensor sorted;
    std::tie(sorted, order_) = at::sort(ids.flatten(), /*stable=*/true, /*dim=*/0,
                                        /*descending=*/false);
    offsets_ = at::searchsorted(sorted, at::arange(num_ids + 1, ids.options()));
    const at::Tensor pieces =
        at::floor_divide(offsets_.diff().add(cuda::kPiecePositions - 1), cuda::kPiecePositions);
    pieces_ = at::constant_pad_nd(at::cumsum(pieces, 0), {1, 0});
  }

  cuda::Groups groups() const {
    return {order_.numel(), num_ids_, order_.const_data_ptr<int64_t>(),
            offsets_.const_data_ptr<int64_t>(), pieces_.const_data_ptr<int64_t>()};
  }

  // Scratch for sums of this many columns.
  at::Tensor sums(int64_t width, const at::TensorOptions& options) const {
    return at::empty({groups().max_pieces(), width}, options);
  }

 private:
  int64_t num_ids_;
  at::Tensor order_, offsets_, pieces_;
};

}  // namespace mblm
