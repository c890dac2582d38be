// Memory in whole cache lines: what two threads write does not lie in one line, which their caches
// would take from each other; nor close behind what the other reads, where caches read ahead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace mblm::cpu::cache_lines {

constexpr int64_t kBytes = 64, kFloats = kBytes / int64_t(sizeof(float));
constexpr int64_t kBytesApart = 512, kFloatsApart = kBytesApart / int64_t(sizeof(float));

inline int64_t round_up(int64_t floats) {
  return (floats + kFloats - 1) / kFloats * kFloats;
}

// The first beginning of a line, at most kFloats - 1 later.
inline float* align(float* floats) {
  const auto at = int64_t(reinterpret_cast<uintptr_t>(floats) / sizeof(float));
  return floats + (round_up(at) - at);
}

template <class T>
struct Allocator {
  using value_type = T;

  Allocator() = default;
  template <class Other>
  Allocator(const Allocator<Other>&) {}

  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(kBytes)));
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t(kBytes)); }

  bool operator==(const Allocator&) const { return true; }
};

// Begins with a line.
template <class T>
using Vector = std::vector<T, Allocator<T>>;

}  // namespace mblm::cpu::cache_lines
