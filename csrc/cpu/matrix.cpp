// Products of packed weights and a few rows: see matrix.h.
#include "cpu/matrix.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "cpu/bfloat16.h"
#include "cpu/dot.h"
#include "cpu/kernel.h"
#include "cpu/lanes.h"
#include "cpu/matrix_kernels.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {
namespace {

// At least so many columns, so that threads do not write to one cache line.
constexpr int64_t kFewestColumns = 16;
// Bytes of weights that stay in the first cache while all rows are multiplied with them.
constexpr int64_t kBlockBytes = 1 << 14;
constexpr int64_t kMaxBlock = 64;

// Calls dot(row of weights) for the rows of all streams.
template <class W, class Dot>
void for_rows(const void* weights, int64_t apart, int64_t n, float* sums, int64_t count, Dot dot) {
  const W* weight = static_cast<const W*>(weights);
  for (int64_t k = 0; k < kStreams; ++k) {
    for (int64_t i = 0; i < count; ++i) sums[i * kStreams + k] = dot(weight + (k * apart + i) * n);
  }
}

template <class W>
void dots(const void* weights, int64_t apart, const float* x, int64_t n, float* sums,
          int64_t count) {
  for_rows<W>(weights, apart, n, sums, count,
              [&](const W* weight) { return dot<float>(x, weight, n); });
}

void dots_of_int8(const void* weights, int64_t, const float* prepared, int64_t n, float* sums,
                  int64_t count) {
  const int8_t* weight = static_cast<const int8_t*>(weights);
  for (int64_t output = 0; output < count; output += kTileOutputs) {
    int64_t totals[kTileOutputs] = {};
    for (int64_t begin = 0; begin < n; begin += kTileInputs) {
      const int16_t* x = int16_values(prepared) + begin;
      for (int64_t k = 0; k < kTileOutputs; ++k, weight += kTileInputs) {
        for (int64_t i = 0; i < kTileInputs; ++i) totals[k] += int32_t(x[i]) * weight[i];
      }
    }
    for (int64_t k = 0; k < kTileOutputs; ++k) sums[output + k] = float(totals[k]) * prepared[0];
  }
}

MBLM_CLONES void apply_gelu(float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = gelu(values[i]);
}

// Columns [first, first + count) and as many, `apart` from them, for each further stream.
struct Columns {
  int64_t first, count, streams, apart;
};

// out[begin + i] = values[i], scaled, with bias and residual (outputs) added, for i < count. What
// is added may be `out` itself.
MBLM_INLINE void finish_values(const Matrix& matrix, int64_t begin, int64_t count, float* values,
                               float* out, const float* residual) {
  // In a loop of its own: no sum is rounded together with its product.
  for (int64_t i = 0; matrix.scale && i < count; ++i) values[i] *= matrix.scale[begin + i];
  const float* const bias = matrix.bias ? matrix.bias + begin : nullptr;
  if (residual) residual += begin;
  constexpr int64_t kWidth = kLaneCount<float>;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    FloatLanes value = load(values + i);
    if (bias) value += load(bias + i);
    if (residual) value += load(residual + i);
    store(out + begin + i, value);
  }
  for (; i < count; ++i) {
    float value = values[i];
    if (bias) value += bias[i];
    if (residual) value += residual[i];
    out[begin + i] = value;
  }
}

// The same for the sums of streams: output columns.first + k * apart + i has sums[i * stride + k].
MBLM_CLONES void finish_streams(const Matrix& matrix, const float* sums, int64_t stride,
                                const Columns& columns, float* out, const float* residual) {
  for (int64_t k = 0; k < columns.streams; ++k) {
    float values[kMaxBlock];
    for (int64_t i = 0; i < columns.count; ++i) values[i] = sums[i * stride + k];
    finish_values(matrix, columns.first + k * columns.apart, columns.count, values, out, residual);
  }
}

// The same for a panel, whose first output is `column`.
MBLM_CLONES void finish_panel(const Matrix& matrix, const Panel& panel, int64_t column, float* out,
                              const float* residual) {
  for (int64_t row = 0; row < panel.rows; ++row) {
    const int64_t to = row * matrix.outputs;
    for (int64_t k = 0; k < panel.streams; ++k) {
      finish_values(matrix, column + k * panel.apart, panel.outputs,
                    panel.sums + row * kPanelStride + k * kStreamOutputs, out + to,
                    residual ? residual + to : nullptr);
    }
  }
}

const Kernel& kernel_of(WeightType type) {
  static const MatrixKernels& best = matrix_kernels().front();
  return type == WeightType::kFloat32    ? best.float32
         : type == WeightType::kBFloat16 ? best.bfloat16
                                         : best.int8;
}

// How many columns are a thread's own. With one part for each thread, streams are long, and every
// thread finds what there is in its own cache at the next byte.
int64_t columns_of_part(int64_t threads, const Matrix& matrix) {
  const int64_t columns = (matrix.outputs + threads - 1) / threads;
  return round_up(columns, matrix.type == WeightType::kInt8 ? kTileOutputs : kFewestColumns);
}

// Bytes from an output's weights to the next one's, of tiles on average: these fill inputs up.
int64_t bytes_of_output(const Matrix& matrix) {
  const bool has_tiles = matrix.type == WeightType::kInt8;
  return (has_tiles ? round_up(matrix.inputs, kTileInputs) : matrix.inputs) * size_of(matrix.type);
}

// Rows as a kernel wants them.
struct Prepared {
  const float* x;
  int64_t row_stride;
};

// Every thread has its own, which is quicker than to wait.
Prepared prepare_rows(const Worker& worker, const Matrix& matrix, const float* x, int64_t rows) {
  const Kernel& kernel = kernel_of(matrix.type);
  const bool packs = kernel.pack && rows > 1;
  if (!kernel.prepare && !packs) return {x, matrix.inputs};
  const int64_t stride = prepared_size(matrix.inputs);
  // Changes nothing where with_team was told how many floats that takes.
  worker.prepared.resize(std::max<size_t>(worker.prepared.size(), prepared_floats(matrix, rows)));
  float* const to = worker.prepared.data();
  if (packs) kernel.pack(x, rows, matrix.inputs, stride, to);
  for (int64_t row = 0; !packs && row < rows; ++row) {
    kernel.prepare(x + row * matrix.inputs, matrix.inputs, to + row * stride);
  }
  return {to, stride};
}

// Columns [begin, end) of several rows' product, a panel at a time.
void multiply_panels(const Matrix& matrix, const Prepared& prepared, int64_t rows, int64_t begin,
                     int64_t end, float* out, const float* residual) {
  const Kernel& kernel = kernel_of(matrix.type);
  const int64_t outputs = matrix.outputs, bytes = bytes_of_output(matrix);
  alignas(64) float sums[kPanelRows * kPanelStride];
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  const int64_t most = round_up((rows + panels - 1) / panels, kPackedRows);
  const auto multiply_streams = [&](int64_t first, int64_t column, int64_t streams, int64_t apart) {
    for (int64_t i = 0; i < apart; i += kernel.panel_outputs) {
      const Panel panel = {static_cast<const char*>(matrix.weight) + (column + i) * bytes,
                           std::min(kernel.panel_outputs, apart - i),
                           matrix.inputs,
                           prepared.x + first * prepared.row_stride,
                           prepared.row_stride,
                           std::min(most, rows - first),
                           sums,
                           streams,
                           apart};
      kernel.panel(panel);
      finish_panel(matrix, panel, column + i, out + first * outputs,
                   residual ? residual + first * outputs : nullptr);
    }
  };
  const int64_t apart = (end - begin) / kernel.panel_streams;
  const int64_t rest = begin + kernel.panel_streams * apart;
  for (int64_t first = 0; first < rows; first += most) {
    multiply_streams(first, begin, kernel.panel_streams, apart);
    multiply_streams(first, rest, 1, end - rest);
  }
}

// See matrix.h; columns [begin, end) of the product with prepared rows.
void multiply_columns(const Matrix& matrix, const Prepared& prepared, int64_t rows, int64_t begin,
                      int64_t end, float* out, Then then, const float* residual) {
  const Kernel& kernel = kernel_of(matrix.type);
  const int64_t outputs = matrix.outputs;
  const int64_t bytes = bytes_of_output(matrix), divisor = std::max<int64_t>(bytes, 1);
  const Dots dots = kernel.dots;
  const int64_t side_by_side = kernel.streams;
  const int64_t fewest = side_by_side == 1 ? kTileOutputs : 1;
  const int64_t most = std::clamp(kBlockBytes / side_by_side / divisor, fewest, kMaxBlock);
  const int64_t block = rows == 1 ? kMaxBlock : most / fewest * fewest;

  const auto multiply_streams = [&](Columns columns) {
    float sums[kStreams * kMaxBlock];
    for (const int64_t last = columns.first + columns.count; columns.first < last;
         columns.first += block) {
      columns.count = std::min(block, last - columns.first);
      const char* weight = static_cast<const char*>(matrix.weight) + columns.first * bytes;
      for (int64_t row = 0; row < rows; ++row) {
        const float* x = prepared.x + row * prepared.row_stride;
        dots(weight, columns.apart, x, matrix.inputs, sums, columns.count);
        finish_streams(matrix, sums, side_by_side, columns, out + row * outputs,
                       residual ? residual + row * outputs : nullptr);
      }
    }
  };

  if (rows > 1 && kernel.panel) {
    multiply_panels(matrix, prepared, rows, begin, end, out, residual);
  } else {
    const int64_t apart = (end - begin) / side_by_side;
    multiply_streams({begin, apart, side_by_side, apart});
    for (int64_t column = begin + side_by_side * apart; column < end; ++column) {
      multiply_streams({column, 1, 1, 0});
    }
  }
  for (int64_t row = 0; then == Then::kGelu && row < rows; ++row) {
    apply_gelu(out + row * outputs + begin, end - begin);
  }
}

void share_columns(const Worker& worker, const Matrix& matrix, const Prepared& prepared,
                   int64_t rows, float* out, Then then, const float* residual) {
  worker.share(matrix.outputs, columns_of_part(worker.team.threads(), matrix),
               [&](int64_t begin, int64_t end) {
                 multiply_columns(matrix, prepared, rows, begin, end, out, then, residual);
               });
}

}  // namespace

MBLM_CLONES void round_to_int16(const float* x, int64_t n, float* prepared) {
  // The bits of numbers without sign are in the numbers' order, infinity and NaN last.
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  }
  int16_t* values = reinterpret_cast<int16_t*>(prepared + kPreparedHeader);
  const int64_t filled = round_up(n, kTileInputs);
  if (largest >= 0x7f800000u) {
    // The result of a row with infinities or NaN is NaN. These have no integer.
    prepared[0] = NAN;
    std::fill(values, values + filled, int16_t(0));
    return;
  }
  const float scale = prepared[0] = std::bit_cast<float>(largest) / kLargestInt16;
  // Too small a number has no reciprocal.
  const float factor = scale >= std::numeric_limits<float>::min() ? 1 / scale : 0;
  for (int64_t i = 0; i < n; ++i) {
    // Adding this number, whose last bit counts ones, rounds to the nearest integer.
    constexpr float kRound = 12582912;
    values[i] = int16_t(int32_t(x[i] * factor + kRound - kRound));
  }
  std::fill(values + n, values + filled, int16_t(0));
}

const std::vector<MatrixKernels>& matrix_kernels() {
  static const std::vector<MatrixKernels> kernels = [] {
    std::vector<MatrixKernels> list = {{"baseline",
                                        {nullptr, dots<float>},
                                        {nullptr, dots<BFloat16>},
                                        {round_to_int16, dots_of_int8, nullptr, kTileOutputs, 1}}};
    add_avx2_kernels(list);
    add_avx512_kernels(list);
    return list;
  }();
  return kernels;
}

int64_t prepared_floats(const Matrix& matrix, int64_t rows) {
  const Kernel& kernel = kernel_of(matrix.type);
  return kernel.prepare || kernel.pack ? rows * prepared_size(matrix.inputs) : 0;
}

void ask_for(const Worker& worker, const float* values, int64_t count) {
  // What the first cache has room for, and what a line of it holds.
  constexpr int64_t kMost = 1 << 13, kLine = 16;
  if (worker.team.threads() == 1) return;
  for (int64_t i = 0; i < std::min(count, kMost); i += kLine) __builtin_prefetch(values + i);
}

void wait_for(const Worker& worker, const Matrix* next) {
  // What a core's second cache has room for, and what a turn takes.
  constexpr int64_t kMostBytes = 1 << 17, kLine = 64, kTurn = 4 * kLine;
  if (!next || kernel_of(next->type).streams > 1) return worker.wait();
  const int64_t columns = columns_of_part(worker.team.threads(), *next);
  const int64_t begin = std::min(worker.index * columns, next->outputs);
  const int64_t bytes = bytes_of_output(*next);
  const char* at = static_cast<const char*>(next->weight) + begin * bytes;
  const char* end =
      at + std::min(std::min(columns, next->outputs - begin) * bytes, kMostBytes) / kTurn * kTurn;
  worker.wait([&] {
    if (at == end) return Team::pause();
    for (int64_t i = 0; i < kTurn; i += kLine) __builtin_prefetch(at + i, 0, 2);
    at += kTurn;
  });
}

Matrix outputs_of(const Matrix& matrix, int64_t begin, int64_t count) {
  Matrix part = matrix;
  part.outputs = count;
  part.weight = static_cast<const char*>(matrix.weight) + begin * bytes_of_output(matrix);
  if (matrix.scale) part.scale += begin;
  if (matrix.bias) part.bias += begin;
  return part;
}

bool has_even_parts(int64_t threads, const Matrix& matrix) {
  return threads * columns_of_part(threads, matrix) == matrix.outputs;
}

void multiply(const Worker& worker, const Matrix& matrix, const float* x, int64_t rows, float* out,
              Then then, const float* residual) {
  ask_for(worker, x, rows * matrix.inputs);
  const Prepared prepared = prepare_rows(worker, matrix, x, rows);
  share_columns(worker, matrix, prepared, rows, out, then, residual);
}

void multiply(const Worker& worker, std::span<const Product> products, const float* x,
              int64_t rows) {
  const Matrix& one = products.front().matrix;
  ask_for(worker, x, rows * one.inputs);
  const Prepared prepared = prepare_rows(worker, one, x, rows);
  for (const auto& [matrix, out] : products) {
    share_columns(worker, matrix, prepared, rows, out, Then::kStore, nullptr);
  }
}

void multiply_alone(const Worker& worker, std::span<const Product> products, const float* x,
                    int64_t rows, Then then) {
  const Prepared prepared = prepare_rows(worker, products.front().matrix, x, rows);
  for (const auto& [matrix, out] : products) {
    multiply_columns(matrix, prepared, rows, 0, matrix.outputs, out, then, nullptr);
  }
}

}  // namespace mblm::cpu
