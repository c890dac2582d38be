// Products with float32 and bfloat16 weights in lanes along the inputs, for the file of each
// instruction set. Before it includes this, that file defines MBLM_TILE, its functions' target, and
//   Vector, of kLanes floats; zeros(); load(const float*); load(const BFloat16*); store(float*, v);
//   multiply_add(a, b, sum) = a * b + sum, rounded once; sums_of(a, b, c, d), of each one's lanes.
//
// Products are summed in one order: in kLanes interleaved sums, then these. Every function here
// keeps to it, so that a row has the same bits whatever other rows are computed beside it.
#pragma once

#include <emmintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/bfloat16.h"
#include "cpu/matrix_kernels.h"

#define MBLM_TILE_INLINE MBLM_TILE inline __attribute__((always_inline))

namespace mblm::cpu {
namespace {

// Inputs that are taken at a time: the weights of a tile stay in the first cache meanwhile.
constexpr int64_t kDepth = 64 * kLanes;

// sums[o][r] += weight[o * apart + lane] * x[r * row_stride + lane].
template <int kOutputs, int kRows, class W>
MBLM_TILE_INLINE void add_lanes(const W* weight, int64_t apart, const float* x, int64_t row_stride,
                                Vector (&sums)[kOutputs][kRows]) {
  Vector weights[kOutputs];
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o) weights[o] = load(weight + o * apart);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vector values = load(x + r * row_stride);
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) sums[o][r] = multiply_add(weights[o], values, sums[o][r]);
  }
}

// The same for the last, fewer than kLanes inputs, with zeros for those that lack.
template <int kOutputs, int kRows, class W>
MBLM_TILE_INLINE void add_rest(const W* weight, int64_t apart, const float* x, int64_t row_stride,
                               int64_t count, Vector (&sums)[kOutputs][kRows]) {
  W weights[kOutputs * kLanes] = {};
  float values[kRows * kLanes] = {};
  for (int o = 0; o < kOutputs; ++o) std::copy_n(weight + o * apart, count, weights + o * kLanes);
  for (int r = 0; r < kRows; ++r) std::copy_n(x + r * row_stride, count, values + r * kLanes);
  add_lanes(weights, kLanes, values, kLanes, sums);
}

// sums (count, kStreams): see Kernel.
template <class W>
MBLM_TILE void multiply_row(const void* weights, int64_t apart, const float* x, int64_t n,
                            float* sums, int64_t count) {
  const W* weight = static_cast<const W*>(weights);
  for (int64_t row = 0; row < count; ++row, weight += n) {
    Vector of[kStreams][1];
    for (int k = 0; k < kStreams; ++k) of[k][0] = zeros();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add_lanes(weight + i, apart * n, x + i, 0, of);
    if (i < n) add_rest(weight + i, apart * n, x + i, 0, n - i, of);
    static_assert(kStreams == 4);
    _mm_storeu_ps(sums + row * kStreams, sums_of(of[0][0], of[1][0], of[2][0], of[3][0]));
  }
}

// Some inputs of some outputs and rows, whose sums stay in registers.
struct Tile {
  const void* weight;  // (outputs, count), rows `apart` from each other
  int64_t apart;
  const float* x;  // (rows, count)
  int64_t row_stride, count;
  bool is_first, is_last;  // of all inputs
  float* kept;             // the sums' lanes, in between
  float* sums;             // (rows, kPanelStride)
  const char* ahead;       // weights to ask for meanwhile: of so many outputs, in bytes from each
  int64_t ahead_outputs, ahead_apart, ahead_step;  // other and for each kLanes inputs
};

template <class W, int kOutputs, int kRows>
MBLM_TILE void multiply_tile(const Tile& tile) {
  const W* weight = static_cast<const W*>(tile.weight);
  Vector sums[kOutputs][kRows];
#pragma GCC unroll 32
  for (int i = 0; i < kOutputs * kRows; ++i) {
    sums[i / kRows][i % kRows] = tile.is_first ? zeros() : load(tile.kept + i * kLanes);
  }
  int64_t i = 0;
  const char* ahead = tile.ahead;
  for (; i + kLanes <= tile.count; i += kLanes, ahead += tile.ahead_step) {
    for (int64_t o = 0; o < tile.ahead_outputs; ++o) {
      __builtin_prefetch(ahead + o * tile.ahead_apart);
    }
    add_lanes(weight + i, tile.apart, tile.x + i, tile.row_stride, sums);
  }
  if (i < tile.count) {
    add_rest(weight + i, tile.apart, tile.x + i, tile.row_stride, tile.count - i, sums);
  }
  if (!tile.is_last) {
#pragma GCC unroll 32
    for (int i = 0; i < kOutputs * kRows; ++i) {
      store(tile.kept + i * kLanes, sums[i / kRows][i % kRows]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; o += 4) {
      constexpr int kLast = kOutputs - 1;
      const __m128 of = sums_of(sums[o][r], sums[std::min(o + 1, kLast)][r],
                                sums[std::min(o + 2, kLast)][r], sums[std::min(o + 3, kLast)][r]);
      _mm_storeu_ps(tile.sums + r * kPanelStride + o, of);
    }
  }
}

MBLM_TILE inline void widen(const BFloat16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = float(from[i]);
}

using MultiplyTile = void (*)(const Tile&);

template <class W, int kOutputs, int... kRows>
MultiplyTile tile_of_rows(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr MultiplyTile kTiles[] = {multiply_tile<W, kOutputs, kRows + 1>...};
  return kTiles[rows - 1];
}

// See Kernel. The tiles' weights are read as T: the first rows' or, where others follow, widened
// once for all of them.
template <class W, class T, int kOutputs, int kRows>
MBLM_TILE void multiply_in_tiles(const Panel& panel) {
  constexpr bool kWidens = !std::is_same_v<W, T>;
  using Rows = std::make_integer_sequence<int, kRows>;
  alignas(64) float kept[kPanelOutputs * kPanelRows * kLanes];
  alignas(64) float widened[kWidens ? kOutputs * kDepth : 1];
  const int64_t n = panel.n, turns = (panel.rows + kRows - 1) / kRows;
  const W* const weights = static_cast<const W*>(panel.weight);
  for (int64_t begin = 0; begin == 0 || begin < n; begin += kDepth) {
    const int64_t count = std::min(kDepth, n - begin);
    for (int64_t o = 0, outputs; o < panel.outputs; o += outputs) {
      outputs = panel.outputs - o < kOutputs ? 1 : kOutputs;
      const W* const weight = weights + o * n + begin;
      const W* next = weight + outputs * n;  // what is multiplied after this
      if (o + outputs == panel.outputs) {
        next = weights + (begin + count < n ? begin + count : panel.outputs * n);
      }

      Tile tile;
      tile.weight = weight;
      tile.apart = n;
      if constexpr (kWidens) {
        for (int64_t k = 0; k < outputs; ++k) widen(weight + k * n, count, widened + k * kDepth);
        tile.weight = widened;
        tile.apart = kDepth;
      }
      tile.row_stride = panel.row_stride;
      tile.count = count;
      tile.is_first = begin == 0;
      tile.is_last = begin + count >= n;
      tile.ahead_apart = n * int64_t(sizeof(W));
      tile.ahead_step = kLanes * int64_t(sizeof(W));
      const int64_t share = (outputs + turns - 1) / turns;
      for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t row = turn * kRows, asked_for = std::min(turn * share, outputs);
        tile.x = panel.x + row * panel.row_stride + begin;
        tile.kept = kept + (o * kPanelRows + row * outputs) * kLanes;
        tile.sums = panel.sums + row * kPanelStride + o;
        tile.ahead = reinterpret_cast<const char*>(next + asked_for * n);
        tile.ahead_outputs = std::min(share, outputs - asked_for);
        const int64_t rows = std::min<int64_t>(kRows, panel.rows - row);
        const auto multiply = outputs == 1 ? tile_of_rows<T, 1>(rows, Rows{})
                                           : tile_of_rows<T, kOutputs>(rows, Rows{});
        multiply(tile);
      }
    }
  }
}

// See Kernel: kPackedRows by kPanelStreams sums fill sixteen registers.
MBLM_TILE inline void pack_rows(const float* x, int64_t rows, int64_t n, int64_t stride,
                                float* packed) {
  for (int64_t row = 0; row < rows; row += kPackedRows, x += kPackedRows * n) {
    const int64_t count = std::min(kPackedRows, rows - row);
    float* to = packed + row * stride;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t r = 0; r < count; ++r, to += kLanes) store(to, load(x + r * n + i));
    }
    for (int64_t r = 0; r < count; ++r, to += kLanes) std::copy(x + r * n + i, x + r * n + n, to);
  }
}

// Some of the inputs, whose sums are kept until the next piece; whole rows are one piece.
struct Piece {
  bool is_first = true, is_last = true;
  float* kept = nullptr;
};
enum class Take { kWhole, kPiece, kPieceAndAsk };  // asks for the weights of the next one

// sums[r * kPanelStride + k * kStreamOutputs] = x[r] . weight[k * apart], of packed rows x. Each
// row of weights has a pointer of its own, so that the loop is hardly more than its products.
template <class W, Take kTake, int kOutputs, int kRows>
MBLM_TILE void multiply_packed(const W* weight, int64_t apart, const float* x, int64_t n,
                               float* sums, const Piece& piece) {
  constexpr bool kWhole = kTake == Take::kWhole;
  Vector of[kOutputs][kRows];
#pragma GCC unroll 32
  for (int k = 0; k < kOutputs * kRows; ++k) {
    of[k / kRows][k % kRows] = kWhole || piece.is_first ? zeros() : load(piece.kept + k * kLanes);
  }
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes, x += 2 * kLanes * kRows) {
#pragma GCC unroll 8
    for (int k = 0; kTake == Take::kPieceAndAsk && k < kOutputs; ++k) {
      __builtin_prefetch(weight + n + i + k * apart);
    }
    add_lanes(weight + i, apart, x, kLanes, of);
    add_lanes(weight + i + kLanes, apart, x + kLanes * kRows, kLanes, of);
  }
  for (; i + kLanes <= n; i += kLanes, x += kLanes * kRows) {
    add_lanes(weight + i, apart, x, kLanes, of);
  }
  if (i < n) add_rest(weight + i, apart, x, kLanes, n - i, of);
  if (!kWhole && !piece.is_last) {
#pragma GCC unroll 32
    for (int k = 0; k < kOutputs * kRows; ++k) {
      store(piece.kept + k * kLanes, of[k / kRows][k % kRows]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, sums += kPanelStride) {
    constexpr int kLast = kOutputs - 1;
    const __m128 all = sums_of(of[0][r], of[std::min(1, kLast)][r], of[kLast][r], of[kLast][r]);
#pragma GCC unroll 8
    for (int k = 0; k < kOutputs; ++k) sums[k * kStreamOutputs] = all[k];
  }
}

template <class W>
using MultiplyPacked = void (*)(const W*, int64_t, const float*, int64_t, float*, const Piece&);

template <class W, Take kTake, int... kRows>
MultiplyPacked<W> packed_of_rows(int64_t streams, int64_t rows,
                                 std::integer_sequence<int, kRows...>) {
  static constexpr MultiplyPacked<W> kTiles[][kPackedRows] = {
      {multiply_packed<W, kTake, 1, kRows + 1>...},
      {multiply_packed<W, kTake, kPanelStreams, kRows + 1>...}};
  return kTiles[streams > 1][rows - 1];
}

// See Kernel, for packed rows: all weights of a panel with one group of them, then with the next.
// The first group waits for memory, the second for the adders. Of long rows they therefore take
// turns after each piece, and the second asks for the weights of the next one. With bfloat16, both
// wait for the adders.
template <class W>
MBLM_TILE void multiply_streams(const Panel& panel) {
  constexpr std::make_integer_sequence<int, kPackedRows> kRows;
  constexpr int64_t kPiece = 512;
  const W* const weights = static_cast<const W*>(panel.weight);
  const int64_t n = panel.n, apart = panel.apart * n, streams = panel.streams;
  int64_t row = 0;
  if (std::is_same_v<W, float> && panel.rows > kPackedRows && n > kPiece) {
    row = 2 * kPackedRows;
    alignas(64) float kept[2][kPackedRows * kPanelStreams * kLanes];
    const int64_t more = std::min(row, panel.rows) - kPackedRows;
    const auto first = packed_of_rows<W, Take::kPiece>(streams, kPackedRows, kRows);
    const auto second = packed_of_rows<W, Take::kPieceAndAsk>(streams, more, kRows);
    const float* const next = panel.x + kPackedRows * panel.row_stride;
    for (int64_t o = 0; o < panel.outputs; ++o) {
      float* const sums = panel.sums + o;
      for (int64_t i = 0; i < n; i += kPiece) {
        const int64_t count = std::min(kPiece, n - i);
        const W* const weight = weights + o * n + i;
        const bool is_first = i == 0, is_last = i + count == n;
        first(weight, apart, panel.x + i * kPackedRows, count, sums, {is_first, is_last, kept[0]});
        second(weight, apart, next + i * more, count, sums + kPackedRows * kPanelStride,
               {is_first, is_last, kept[1]});
      }
    }
  }
  for (; row < panel.rows; row += kPackedRows) {
    const int64_t rows = std::min(kPackedRows, panel.rows - row);
    const auto multiply = packed_of_rows<W, Take::kWhole>(streams, rows, kRows);
    for (int64_t o = 0; o < panel.outputs; ++o) {
      multiply(weights + o * n, apart, panel.x + row * panel.row_stride, n,
               panel.sums + row * kPanelStride + o, {});
    }
  }
}

}  // namespace
}  // namespace mblm::cpu
