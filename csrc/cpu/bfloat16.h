// bfloat16: the upper half of a float's bits, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace mblm::cpu {

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;

  explicit BFloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
  }

  explicit BFloat16(double value) : BFloat16(static_cast<float>(value)) {}

  operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  }
};

}  // namespace mblm::cpu
