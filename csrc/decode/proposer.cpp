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
                                           const Price& price) noexcept {
  most = at_ < 0 ? 0 : std::min(most, kMost);
  double expected = 1, gain = -price.any, best = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < most; ++i) {
    expected *= right_[std::min(match_ + i, kLongest)];
    if (expected <= price.each) break;
    // A match that overlaps the end goes on periodically.
    const int64_t from = at_ + i - known_;
    proposed_[i] = from < 0 ? bytes[at_ + i] : proposed_[from];
    gain += expected - price.each;
    if (gain < best) continue;
    best = gain;
    count = i + 1;
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

void Pace::note(int64_t rows, int64_t drafted, double seconds) noexcept {
  seconds = std::max(seconds, 1e-9);  // a clock may stand still
  // Another program may have had the core: no round counts for more than twice what is usual.
  if (drafted == 0) {
    const double most = rounds_ > 0 ? 2 * plain_ : seconds;
    ++rounds_;
    plain_ += (std::min(seconds, most) - plain_) / double(std::min<int64_t>(rounds_, 32));
    // What once was too costly is tried again later.
    constexpr double kForgotten = 1. / 1024;
    cost_ += kForgotten * (kExpected.any + kExpected.each * drafted_ - cost_);
    common_ += kForgotten * (kExpected.each * spread_ - common_);
  } else if (rounds_ > 0) {
    constexpr double kRate = 1. / 16;
    const double along = double(drafted) - drafted_;
    const double usual = cost_ + common_ / spread_ * along;
    const double cost = (seconds / plain_ - 1) * double(rows);
    const double above = std::min(cost, 2 * std::max(usual, 0.) + double(rows)) - cost_;
    drafted_ += kRate * along;
    cost_ += kRate * above;
    // Drafts that all have one length say nothing of the slope.
    spread_ = std::max(spread_ + kRate * (along * along - spread_), 1.);
    common_ += kRate * (along * above - common_);
  }
}

Price Pace::price(int64_t rows) const noexcept {
  if (rounds_ == 0) return {.any = double(Proposer::kMost)};
  // For a gain that is seen. One of several rows that gets ahead may wait at its patch's end.
  const double margin = rows > 1 ? 2 : 1.2;
  const double each = std::max(common_ / spread_, 0.);
  return {margin * std::max(cost_ - each * drafted_, 0.), margin * each};
}

}  // namespace mblm::decode
