// The rows of a call, each with positions of its own, which lie one row after the other.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

namespace mblm::cpu {

template <class Row>
class CallRows {
 public:
  explicit CallRows(std::span<const Row> rows) : rows_(rows), positions_(first_of(size())) {}

  int64_t size() const { return int64_t(rows_.size()); }
  int64_t positions() const { return positions_; }
  const Row& operator[](int64_t row) const { return rows_[row]; }

  // Where a row's positions begin among those of all, and where they end.
  int64_t first(int64_t row) const { return positions_ == size() ? row : first_of(row); }
  std::pair<int64_t, int64_t> range(int64_t row) const {
    const int64_t begin = first(row);
    return {begin, begin + rows_[row].count};
  }

 private:
  int64_t first_of(int64_t row) const {
    int64_t first = 0;
    for (int64_t i = 0; i < row; ++i) first += rows_[i].count;
    return first;
  }

  const std::span<const Row> rows_;
  const int64_t positions_;
};

}  // namespace mblm::cpu
