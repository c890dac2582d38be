// How much the last of the machine's caches holds.
#pragma once

#include <cstdint>
#include <fstream>

namespace mblm::cpu {

// Of the cores beside the first one. Linux tells; elsewhere it is what many have.
inline int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t kib = 0;
    return file >> kib && kib > 0 ? kib << 10 : int64_t(1) << 25;
  }();
  return bytes;
}

}  // namespace mblm::cpu
