// Positions on a GPU grouped by token id, with torch's own operators.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/groups.h"
#include "tensors.h"

namespace mblm {

// Ids outside [0, num_ids) are in no group.
class GroupsOnDevice {
 public:
  GroupsOnDevice(const at::Tensor& ids, int64_t num_ids);

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
