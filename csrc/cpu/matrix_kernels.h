// The inner loop of matrix.h, once per instruction set; the best that the machine has is used.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/matrix.h"

namespace mblm::cpu {

// Floats before the values of a prepared row, so that these keep to cache lines.
constexpr int64_t kPreparedHeader = 16;

inline int64_t round_up(int64_t size, int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

// Floats of a prepared row: values fill the last tile up.
inline int64_t prepared_size(int64_t n) {
  return kPreparedHeader + round_up(n, kTileInputs);
}

// Rows of weights that are read side by side, far from each other: a core asks the memory for more
// at a time than it does by itself for one stream of consecutive addresses.
constexpr int64_t kStreams = 4;

// How many bytes ahead tiles are asked for: the machine reads ahead by itself, but not as far as a
// core multiplies bytes in the time that memory takes.
constexpr int64_t kTilesAhead = 12288;

using Dots = void (*)(const void* weight, int64_t apart, const float* x, int64_t n, float* sums,
                      int64_t count);

// Some outputs and rows of a product, small enough that working memory is on the stack.
constexpr int64_t kPanelOutputs = 24, kPanelRows = 64;  // outputs of tiles: one tile's
// From a row's sums to the next one's; up to three behind those asked for are overwritten.
constexpr int64_t kPanelStride = 32;
static_assert(kPanelOutputs + 3 <= kPanelStride && kTileOutputs <= kPanelStride);

// A panel's outputs may be of several streams, far from each other: of each it has consecutive
// outputs, and the next panel has those behind them, so that the machine reads ahead by itself.
constexpr int64_t kPanelStreams = 3, kStreamOutputs = kPanelOutputs / kPanelStreams;
// Rows that are packed together: of each, as many values as a vector has, in turns.
constexpr int64_t kPackedRows = 4;
static_assert(kPanelRows % kPackedRows == 0);

struct Panel {
  const void* weight;              // (outputs, n), or tiles
  int64_t outputs, n;              // of each stream, at most the kernel's panel_outputs
  const float* x;                  // (rows, n), or as many prepared or packed rows
  int64_t row_stride, rows;        // at most kPanelRows
  float* sums;                     // (rows, kPanelStride): a stream's begin every kStreamOutputs
  int64_t streams = 1, apart = 0;  // outputs from a stream's first to the next one's
};

// How a kernel multiplies weights of one type.
struct Kernel {
  // Writes x (n) as `dots` wants it, into prepared_size(n) floats; null if it wants x itself.
  void (*prepare)(const float* x, int64_t n, float* prepared);
  // sums[i * streams + k] = x . weight[k * apart + i] for each stream k and i < count, where
  // weight (.., n) is of the kernel's type. Of tiles: sums[i] for all outputs of as many tiles as
  // count takes.
  Dots dots;
  // sums[r][k * kStreamOutputs + o] = x[r] . weight[k * apart + o] for each stream k, with the bits
  // of `dots`: for several rows, whose weights stay in the first cache or in registers; null to
  // call `dots` for each row.
  void (*panel)(const Panel& panel) = nullptr;
  int64_t panel_outputs = kPanelOutputs;
  int64_t streams = kStreams;  // or 1, for tiles, which are read in order
  // Packs x (rows, n) for `panel`, each row `stride` behind the one before; null if it wants x.
  void (*pack)(const float* x, int64_t rows, int64_t n, int64_t stride, float* packed) = nullptr;
  int64_t panel_streams = 1;
};

struct MatrixKernels {
  const char* name;
  Kernel float32, bfloat16, int8;
};

// Those that run on this machine, the best first; the last is for every machine.
const std::vector<MatrixKernels>& matrix_kernels();

// Puts its kernels in front of the others if the machine has the instructions.
void add_avx2_kernels(std::vector<MatrixKernels>& kernels);
void add_avx512_kernels(std::vector<MatrixKernels>& kernels);

// What an int8 weight is multiplied with: x rounded to 16 bits, its scale in front, zeros up to the
// end of a tile. Sums of their products are integers, the same in whatever order: no instruction
// set has numbers of its own.
void round_to_int16(const float* x, int64_t n, float* prepared);

inline const int16_t* int16_values(const float* prepared) {
  return reinterpret_cast<const int16_t*>(prepared + kPreparedHeader);
}

// 127 * 256 + 127: such a number is cut into two bytes with signs.
constexpr float kLargestInt16 = 32639;

// A sum of 32 bits holds the products of so many columns: 128 * 32639 * 512 < 2^31.
constexpr int64_t kColumnsPerInt32 = 512;
static_assert(kTileInputs <= kColumnsPerInt32);

}  // namespace mblm::cpu
