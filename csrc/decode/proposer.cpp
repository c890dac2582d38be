// The index of a row's bytes, and what its matches are worth: see proposer.h.
#include "decode/proposer.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace mblm::decode {

void Proposer::reserve(const Bytes& bytes, int64_t end) {
  if (2 * end <= int64_t(last_.size())) return;
  std::vector<int32_t> larger(std::bit_ceil(size_t(2 * end)), -1);
  before_.reserve(larger.size() / 2);
  last_.swap(larger);
  before_.clear();
  const int64_t known = std::exchange(known_, 0);
  while (known_ < known) add(bytes);
}

void Proposer::follow(const Bytes& bytes) noexcept {
  if (at_ >= 0 && known_ + 1 == bytes.size()) {
    const bool is_right = bytes[at_] == bytes[known_];
    right_[match_] += kRate * (double(is_right) - right_[match_]);
    at_ = is_right ? at_ + 1 : -1;
    match_ = std::min(match_ + 1, kLongest);
  } else if (known_ < bytes.size()) {
    at_ = -1;
  }
  const bool has_come = known_ < bytes.size();
  while (known_ < bytes.size()) add(bytes);
  if (has_come && at_ < 0) search(bytes);
}

std::span<const int64_t> Proposer::propose(const Bytes& bytes, int64_t most,
                                           double price) noexcept {
  most = std::min(most, kMost);
  double expected = 1;
  int64_t count = 0;
  for (; at_ >= 0 && count < most; ++count) {
    expected *= right_[std::min(match_ + count, kLongest)];
    if (expected <= price) break;
    // A match that overlaps the end goes on periodically.
    const int64_t from = at_ + count - known_;
    proposed_[count] = from < 0 ? bytes[at_ + count] : proposed_[from];
  }
  return {proposed_.data(), size_t(count)};
}

// Notes one more byte.
void Proposer::add(const Bytes& bytes) noexcept {
  before_.push_back(-1);
  if (++known_ < kShortest) return;
  const size_t place = find(bytes, known_);
  before_.back() = std::exchange(last_[place], int32_t(known_));
}

// Where the table has, or is to have, the bytes that end there.
size_t Proposer::find(const Bytes& bytes, int64_t at) const noexcept {
  uint64_t hash = 0;
  for (int64_t i = 1; i <= kShortest; ++i) {
    hash = (hash ^ uint64_t(bytes[at - i])) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 32;
  }
  const auto is_same = [&](int64_t other) {
    int64_t i = 1;
    while (i <= kShortest && bytes[other - i] == bytes[at - i]) ++i;
    return i > kShortest;
  };
  size_t place = hash & (last_.size() - 1);
  while (last_[place] >= 0 && !is_same(last_[place])) place = (place + 1) & (last_.size() - 1);
  return place;
}

// Looks for the longest match, of those the last.
void Proposer::search(const Bytes& bytes) noexcept {
  if (known_ < kShortest) return;
  match_ = 0;
  int64_t candidate = before_[known_ - 1];
  for (int64_t looked = 0; candidate >= 0 && looked < kLookedAt && match_ < kLongest; ++looked) {
    int64_t length = kShortest;
    while (length < kLongest && length < candidate &&
           bytes[candidate - 1 - length] == bytes[known_ - 1 - length]) {
      ++length;
    }
    if (length > match_) {
      match_ = length;
      at_ = candidate;
    }
    candidate = before_[candidate - 1];
  }
}

void Pace::note(int64_t positions, double seconds) noexcept {
  constexpr double kAtFirst = 0.4;
  const double rate = 1. / double(std::min<int64_t>(8 + count_++, 32));
  if (seconds_ == 0) {
    positions_ = double(positions);
    seconds_ = seconds;
    common_ = kAtFirst * seconds / double(positions);
    return;
  }
  // Another program may have had the core.
  const double along = double(positions) - positions_;
  const double usual = seconds_ + common_ / spread_ * along;
  const double above = std::min(seconds, 2 * std::max(usual, seconds_ / 2)) - seconds_;
  positions_ += rate * along;
  seconds_ += rate * above;
  if (along * along < 0.01) return;  // it says nothing of the slope
  spread_ += rate * (along * along - spread_);
  common_ += rate * (along * above - common_);
}

double Pace::price(int64_t rows) const noexcept {
  if (seconds_ == 0) return 1;
  const double slope = std::max(common_ / spread_, 0.);
  const double pass = std::max(seconds_ + slope * (double(rows) - positions_), seconds_ / 16);
  return slope * double(rows) / pass;
}

}  // namespace mblm::decode
