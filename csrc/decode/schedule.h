// Which stages take in what, as a pure function of how many bytes a row has taken in: the twin of
// mblm/inference/schedule.py.
//
// Before byte number `length` is taken in, the most global stage whose patches end there is due: it
// takes in the patch just completed, and every stage below it begins a new sequence. So a stage's
// place in its sequence follows from the bytes taken in and is stored nowhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace mblm::decode {

class Schedule {
 public:
  Schedule() = default;
  // seq_lens: positions of each stage's sequence, the most global stage first, all positive, whose
  // product fits.
  explicit Schedule(std::vector<int64_t> seq_lens)
      : seq_lens_(std::move(seq_lens)), patch_sizes_(seq_lens_.size(), 1) {
    for (int64_t n = stages() - 2; n >= 0; --n) {
      patch_sizes_[n] = patch_sizes_[n + 1] * seq_lens_[n + 1];
    }
  }

  int64_t stages() const { return int64_t(seq_lens_.size()); }
  int64_t seq_len(int64_t n) const { return seq_lens_[n]; }
  // Bytes that a position stands for.
  int64_t patch_size(int64_t n) const { return patch_sizes_[n]; }
  // Bytes that a sequence stands for; the most global stage has one that does not end.
  int64_t span(int64_t n) const {
    return n == 0 ? std::numeric_limits<int64_t>::max() : patch_sizes_[n - 1];
  }

  // The stage that is due before byte number `length`.
  int64_t due(int64_t length) const {
    int64_t n = 0;
    while (length % patch_sizes_[n] != 0) ++n;
    return n;
  }

  // The first byte of stage n's sequence after `taken` bytes.
  int64_t begin(int64_t n, int64_t taken) const {
    return n == 0 || taken == 0 ? 0 : (taken - 1) / span(n) * span(n);
  }

  // Positions that stage n's sequence has after `taken` bytes, its start token not counted.
  int64_t position(int64_t n, int64_t taken) const {
    if (taken == 0) return 0;
    const int64_t bytes = taken - begin(n, taken);
    return n + 1 == stages() ? bytes : (bytes - 1) / patch_sizes_[n];
  }

  // Whether stage n begins a sequence anew while bytes [from, to) are taken in.
  bool begins_anew(int64_t n, int64_t from, int64_t to) const {
    return from < to && (from == 0 || begin(n, to) != begin(n, from));
  }

  // Positions that stage n takes in with bytes [from, to): those of its last sequence alone.
  int64_t new_positions(int64_t n, int64_t from, int64_t to) const {
    return position(n, to) - (begins_anew(n, from, to) ? 0 : position(n, from));
  }

  // Whether a stage takes in more than `most` positions where `count` bytes are fed after `length`.
  // The last one before counts, pending or not: to look at a row changes no bits.
  bool is_long(int64_t length, int64_t count, int64_t most) const {
    const int64_t from = std::max<int64_t>(length - 1, 0), to = length + count - 1;
    for (int64_t n = 0; count > 0 && n < stages(); ++n) {
      if (new_positions(n, from, to) > most) return true;
    }
    return false;
  }

  // Whether stage n takes in anything, or begins anew, with bytes [from, to).
  bool touches(int64_t n, int64_t from, int64_t to) const {
    return begins_anew(n, from, to) || new_positions(n, from, to) > 0;
  }

 private:
  std::vector<int64_t> seq_lens_, patch_sizes_;
};

// Whether rows at the end of a patch wait for others: `left` (sorted by this) is how many steps
// each row is from there. See the twin.
inline bool pays_to_wait(int64_t patch_size, std::span<int64_t> left) {
  std::sort(left.begin(), left.end());
  const double size = double(patch_size), rows = double(left.size());
  double coming = 0;
  return std::any_of(left.begin(), left.end(), [&](int64_t steps) {
    return steps > 0 && ++coming * size >= double(steps) * rows;
  });
}

}  // namespace mblm::decode
