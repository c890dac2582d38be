// Proposes a row's next bytes: those that came after the longest earlier match of its last ones.
// The twin of mblm/inference/proposer.py, which says how.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "decode/bytes.h"

namespace mblm::decode {

// What it costs to check drafts, in bytes that would be chosen meanwhile: any at all, and each.
struct Price {
  double any = 0, each = 0;
};

class Proposer {
 public:
  static constexpr int64_t kMost = 24;  // bytes that are proposed at a time

  Proposer() { right_.fill(kExpected); }

  // Makes room for bytes before number `end`. Throws std::bad_alloc, and is as before then.
  void reserve(const Bytes& bytes, int64_t end);
  // Takes note of bytes that the row has got, for which there must be room.
  void follow(const Bytes& bytes) noexcept;
  // Some of the next bytes, at most so many or kMost: as many as are worth most more than their
  // price, if any are. They stay until the next call.
  std::span<const int64_t> propose(const Bytes& bytes, int64_t most, const Price& price) noexcept;

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

// What drafts cost: a line through what rounds with drafts took longer than those without.
class Pace {
 public:
  // A round of so many rows took so long.
  void note(int64_t rows, int64_t drafted, double seconds) noexcept;
  // For each of so many rows. Too high for any drafts before it knows a round without.
  Price price(int64_t rows) const noexcept;

 private:
  static constexpr Price kExpected{0.25, 0.25};

  int64_t rounds_ = 0;  // without drafts
  double plain_ = 0;    // mean seconds of these
  // Means of bytes drafted and of their cost in bytes; the former's variance, and the covariance.
  double drafted_ = 4, cost_ = kExpected.any + 4 * kExpected.each;
  double spread_ = 16, common_ = 16 * kExpected.each;
};

}  // namespace mblm::decode
