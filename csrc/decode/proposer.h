// Proposes a row's next bytes: those that came after the longest earlier match of its last ones.
// The twin of mblm/inference/draft.py's Proposer, which says how.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "decode/bytes.h"

namespace mblm::decode {

class Proposer {
 public:
  static constexpr int64_t kMost = 24;  // bytes that are proposed at a time

  Proposer() { right_.fill(kExpected); }

  // Makes room for bytes before number `end`. Throws std::bad_alloc, and is as before then.
  void reserve(const Bytes& bytes, int64_t end);
  // Takes note of bytes that the row has got, for which there must be room.
  void follow(const Bytes& bytes) noexcept;
  // Some of the next bytes, at most so many or kMost, where each must be right with a probability
  // above `price`. They stay until the next call.
  std::span<const int64_t> propose(const Bytes& bytes, int64_t most, double price) noexcept;

 private:
  static constexpr int64_t kShortest = 3, kLongest = 12;  // bytes of a match
  static constexpr int64_t kLookedAt = 8;
  static constexpr double kExpected = 0.6, kRate = 1. / 16;

  void add(const Bytes& bytes) noexcept;
  void search(const Bytes& bytes) noexcept;
  size_t find(const Bytes& bytes, int64_t at) const noexcept;

  int64_t known_ = 0;            // bytes that are noted
  int64_t at_ = -1, match_ = 0;  // what comes after the match, and its length; -1 without one
  std::array<double, kLongest + 1> right_;  // how often the byte after such a match is right
  // Of the last kShortest bytes: where they end last, in a table by hash, and where before that.
  std::vector<int32_t> last_, before_;
  std::array<int64_t, kMost> proposed_;
};

// What a pass costs: a line through the seconds of those before by their positions.
class Pace {
 public:
  void note(int64_t positions, double seconds) noexcept;
  // Of one position more in a pass of so many rows, in bytes that they choose in that time.
  double price(int64_t rows) const noexcept;

 private:
  int64_t count_ = 0;
  double positions_ = 0, seconds_ = 0;  // means
  double spread_ = 1, common_ = 0;      // variance of positions; covariance with seconds
};

}  // namespace mblm::decode
