// See groups.h.
#ifdef MBLM_CUDA
#include "groups.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>

#include <tuple>

namespace mblm {

GroupsOnDevice::GroupsOnDevice(const at::Tensor& ids, int64_t num_ids) : num_ids_(num_ids) {
  at::Tensor sorted;
  std::tie(sorted, order_) = ids.flatten().sort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  offsets_ = at::searchsorted(sorted, at::arange(num_ids + 1, ids.options()));
  const at::Tensor pieces =
      offsets_.diff().add(cuda::kPiecePositions - 1).floor_divide(cuda::kPiecePositions);
  pieces_ = make::padded(pieces.cumsum(0), {1, 0});
}

}  // namespace mblm
#endif
