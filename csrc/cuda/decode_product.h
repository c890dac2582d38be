// Products of packed weights and the activations of a few rows, in decoding on a GPU: what comes
// before a product and what comes after it are done with it.
#pragma once

#include <algorithm>

#include "cpu/matrix.h"
#include "cuda/decode_attention.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// RMSNorm of a row: divides by the root of the mean of squares, which is bounded from below by
// 1e-8, or to which eps is added first.
struct RowNorm {
  const float* weight = nullptr;  // (inputs); null is no norm
  float eps = 0;
  bool is_bounded = false;
};

// The causal convolution and SiLU of some columns of a product, whose window moves on by one.
struct Convolution {
  int64_t first = 0, channels = 0, taps = 1;  // columns [first, first + channels); none for 0
  const float* weight = nullptr;              // (channels, taps)
  const float* bias = nullptr;                // (channels)
  float* window = nullptr;                    // (rows, taps - 1, channels), oldest first
};

// Weights that later products read, which are asked for while this one waits.
struct Ahead {
  struct Part {
    const void* from = nullptr;
    uint32_t bytes = 0;
  } parts[2];

  Ahead() = default;
  explicit Ahead(const cpu::Matrix& first, const cpu::Matrix& second = {}) {
    add(first, parts[0]);
    add(second, parts[1]);
  }

 private:
  static void add(const cpu::Matrix& matrix, Part& part) {
    constexpr int64_t kMost = int64_t(1) << 31;
    if (reinterpret_cast<uintptr_t>(matrix.weight) % 16) return;
    part.from = matrix.weight;
    part.bytes = uint32_t(std::min(matrix.weights() * cpu::size_of(matrix.type), kMost));
  }
};

// out = then(inputs @ weight.T + bias + residual), of one matrix or of two with the same inputs.
struct Product {
  int64_t rows = 0;
  const int64_t* positions = nullptr;  // (rows), negative where nothing is written; or null

  const float* x = nullptr;   // (rows, inputs)
  int64_t x_stride = 0;       // from a row to the next
  CachedAttention attention;  // if it has heads, what it gives is x: see attends
  RowNorm norm;
  const float* delayed = nullptr;  // (rows, inputs / 2), instead of x's last half; or null

  cpu::Matrix matrix, second;                   // second has no outputs where there is one matrix
  float *out = nullptr, *out_second = nullptr;  // (rows, outputs)
  cpu::Then then = cpu::Then::kStore;
  const float* residual = nullptr;  // (rows, outputs), may be out; with one matrix alone
  float* keep = nullptr;            // (rows, outputs / 2): gets the residual's last half
  Convolution convolution;
  Ahead ahead;
};

// Tensor cores multiply rounded weights, up to so many rows at a time, or 32 where there are more;
// adders multiply float32.
constexpr int kFewRows = 8;

// A matrix has whole packs of so many inputs, and all that is read begins at a multiple of 16
// bytes.
constexpr int kPack = 8;

// A row is summed in the same order however many rows there are, if it is up to kFewRows or more
// than that on both sides; by adders always.
Error multiply(const Product& product, Stream stream);

// Whether a product can attend for itself: of up to four rows, to short caches.
bool attends(const Product& product, const CachedAttention& attention);

}  // namespace mblm::cuda
