// A row's bytes from some number on: pages that rows share until one of them writes to its last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <span>
#include <vector>

#include "decode/pages.h"

namespace mblm::decode {

class Bytes {
 public:
  static constexpr int64_t kPage = 1024;
  static_assert(sizeof(int32_t) == sizeof(float));

  int64_t size() const { return size_; }
  int32_t operator[](int64_t index) const { return page(index)[index % kPage]; }

  // Makes room for so many more, in pages of kPage from a pool. Throws std::bad_alloc, and is as
  // before then.
  void reserve(Pool& pool, int64_t more) {
    const int64_t last = size_ / kPage, pages = (size_ + more + kPage - 1) / kPage;
    pages_.reserve(pages);
    for (int64_t i = last; i < std::min(pages, int64_t(pages_.size())); ++i) {
      if (!pages_[i].is_shared()) continue;
      const Block own(pool);
      if (i == last) std::copy_n(page(size_), size_ % kPage, data(own));
      pages_[i] = own;
    }
    while (int64_t(pages_.size()) < pages) pages_.emplace_back(pool);
  }

  // There must be room.
  void push_back(int32_t id) {
    data(pages_[size_ / kPage])[size_ % kPage] = id;
    ++size_;
  }

  // Forgets the last ones.
  void shorten(int64_t count) { size_ -= count; }

 private:
  static int32_t* data(const Block& block) { return reinterpret_cast<int32_t*>(block.data()); }
  const int32_t* page(int64_t index) const { return data(pages_[index / kPage]); }

  std::vector<Block> pages_;
  int64_t size_ = 0;
};

}  // namespace mblm::decode
