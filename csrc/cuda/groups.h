// Positions grouped by token id, cut so that ids with many positions keep no one waiting.
#pragma once

#include <cstdint>

namespace mblm::cuda {

// A piece is at most this many positions of one id.
constexpr int64_t kPiecePositions = 256;

struct Groups {
  int64_t count, num_ids;
  const int64_t* order;    // (count): positions by rising id, those of one id in rising order
  const int64_t* offsets;  // (num_ids + 1): where an id's positions begin in order, and end
  const int64_t* pieces;   // (num_ids + 1): likewise its pieces

  // At least as many as there are pieces.
  int64_t max_pieces() const { return count / kPiecePositions + num_ids; }
};

}  // namespace mblm::cuda
