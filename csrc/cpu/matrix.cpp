// Products of packed weights and a few rows: see matrix.h.
#include "cpu/matrix.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "cpu/bfloat16.h"
#include "cpu/dot.h"
#include "cpu/kernel.h"
#include "cpu/matrix_kernels.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {
namespace {

// At least so many columns, so that threads do not write to one cache line.
constexpr int64_t kFewestColumns = 16;
static_assert(kFewestColumns % kTileOutputs == 0);
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
        int32_t part = 0;
        for (int64_t i = 0; i < kTileInputs; ++i) part += int32_t(x[i]) * weight[i];
        totals[k] += part;
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

// out[begin + i] = values[i], scaled, with bias and residual (outputs) added, for i < count.
MBLM_INLINE void finish_values(const Matrix& matrix, int64_t begin, int64_t count, float* values,
                               float* out, const float* residual) {
  const auto each = [&](const float* given, auto combine) MBLM_INLINE_LAMBDA {
    for (int64_t i = 0; given && i < count; ++i) values[i] = combine(values[i], given[begin + i]);
  };
  const auto add = [](float value, float given) MBLM_INLINE_LAMBDA { return value + given; };
  each(matrix.scale, [](float value, float by) MBLM_INLINE_LAMBDA { return value * by; });
  each(matrix.bias, add);
  each(residual, add);
  std::copy_n(values, count, out + begin);
}

// out[first + k * apart + i] = sums[i * stride + k], those of the other half added if there is one,
// scaled, with bias and residual (outputs) added, for each stream k and i < count.
MBLM_CLONES void finish(const Matrix& matrix, const float* sums, const float* other, int64_t stride,
                        const Columns& columns, float* out, const float* residual) {
  const int64_t count = columns.count;
  for (int64_t k = 0; k < columns.streams; ++k) {
    float values[kMaxBlock];
    for (int64_t i = 0; i < count; ++i) values[i] = sums[i * stride + k];
    for (int64_t i = 0; other && i < count; ++i) values[i] += other[i * stride + k];
    finish_values(matrix, columns.first + k * columns.apart, count, values, out, residual);
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
int64_t columns_of_part(int64_t threads, int64_t outputs) {
  const int64_t columns = (outputs + threads - 1) / threads;
  return round_up(columns, kFewestColumns);
}

// How many matrices lie one behind the other, and how many inputs each has.
int64_t halves_of(const Matrix& matrix) {
  return matrix.is_halved ? 2 : 1;
}

int64_t inputs_of_half(const Matrix& matrix) {
  return matrix.inputs / halves_of(matrix);
}

// What tiles fill up.
int64_t filled(const Matrix& matrix, int64_t size, int64_t of_tile) {
  return matrix.type == WeightType::kInt8 ? round_up(size, of_tile) : size;
}

// Bytes from an output's weights to the next one's, of tiles on average.
int64_t bytes_of_output(const Matrix& matrix) {
  return filled(matrix, inputs_of_half(matrix), kTileInputs) * size_of(matrix.type);
}

// Bytes from the first half to the second.
int64_t bytes_of_half(const Matrix& matrix) {
  return filled(matrix, matrix.outputs, kTileOutputs) * bytes_of_output(matrix);
}

// Rows as a kernel wants them: each one, or one half of it and then the other.
struct Prepared {
  const float* x;
  int64_t row_stride, half_stride;
};

// Every thread has its own, which is quicker than to wait.
Prepared prepare_rows(const Worker& worker, const Matrix& matrix, const float* x, int64_t rows) {
  const Kernel& kernel = kernel_of(matrix.type);
  const int64_t halves = halves_of(matrix), n = inputs_of_half(matrix);
  if (!kernel.prepare) return {x, matrix.inputs, n};
  const int64_t stride = prepared_size(n);
  worker.prepared.resize(std::max<size_t>(worker.prepared.size(), rows * halves * stride));
  for (int64_t half = 0; half < rows * halves; ++half) {
    kernel.prepare(x + half * n, n, worker.prepared.data() + half * stride);
  }
  return {worker.prepared.data(), halves * stride, stride};
}

// See matrix.h; columns [begin, end) of the product with prepared rows.
void multiply_columns(const Worker& worker, const Matrix& matrix, const Prepared& prepared,
                      int64_t rows, int64_t begin, int64_t end, float* out, Then then,
                      const float* residual) {
  const Kernel& kernel = kernel_of(matrix.type);
  const int64_t inputs = inputs_of_half(matrix), outputs = matrix.outputs;
  const int64_t bytes = bytes_of_output(matrix), divisor = std::max<int64_t>(bytes, 1);
  const Dots dots = worker.reads_once && kernel.dots_once ? kernel.dots_once : kernel.dots;
  const int64_t side_by_side = kernel.streams;
  const int64_t fewest = side_by_side == 1 ? kTileOutputs : 1;
  const int64_t most = std::clamp(kBlockBytes / side_by_side / divisor, fewest, kMaxBlock);
  const int64_t block = rows == 1 ? kMaxBlock : most / fewest * fewest;

  const auto multiply_streams = [&](Columns columns) {
    float sums[kStreams * kMaxBlock], other[kStreams * kMaxBlock];
    for (const int64_t last = columns.first + columns.count; columns.first < last;
         columns.first += block) {
      columns.count = std::min(block, last - columns.first);
      const char* weight = static_cast<const char*>(matrix.weight) + columns.first * bytes;
      for (int64_t row = 0; row < rows; ++row) {
        const float* x = prepared.x + row * prepared.row_stride;
        dots(weight, columns.apart, x, inputs, sums, columns.count);
        if (matrix.is_halved) {
          dots(weight + bytes_of_half(matrix), columns.apart, x + prepared.half_stride, inputs,
               other, columns.count);
        }
        finish(matrix, sums, matrix.is_halved ? other : nullptr, side_by_side, columns,
               out + row * outputs, residual ? residual + row * outputs : nullptr);
      }
    }
  };

  const int64_t apart = (end - begin) / side_by_side;
  multiply_streams({begin, apart, side_by_side, apart});
  for (int64_t column = begin + side_by_side * apart; column < end; ++column) {
    multiply_streams({column, 1, 1, 0});
  }
  for (int64_t row = 0; then == Then::kGelu && row < rows; ++row) {
    apply_gelu(out + row * outputs + begin, end - begin);
  }
}

void share_columns(const Worker& worker, const Matrix& matrix, const Prepared& prepared,
                   int64_t rows, float* out, Then then, const float* residual) {
  worker.share(matrix.outputs, columns_of_part(worker.team.threads(), matrix.outputs),
               [&](int64_t begin, int64_t end) {
                 multiply_columns(worker, matrix, prepared, rows, begin, end, out, then, residual);
               });
}

}  // namespace

MBLM_CLONES void round_to_int16(const float* x, int64_t n, float* prepared) {
  // The bits of numbers without sign are in the numbers' order, infinity and NaN last.
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  }
  const bool is_finite = largest < 0x7f800000u;
  const float scale = std::bit_cast<float>(largest) / kLargestInt16;
  // The result of a row with infinities or NaN is NaN.
  prepared[0] = is_finite ? scale : NAN;
  // Too small a number has no reciprocal.
  const float factor = is_finite && scale >= std::numeric_limits<float>::min() ? 1 / scale : 0;
  int16_t* values = reinterpret_cast<int16_t*>(prepared + kPreparedHeader);
  for (int64_t i = 0; i < n; ++i) {
    // Adding this number, whose last bit counts ones, rounds to the nearest integer.
    constexpr float kRound = 12582912;
    values[i] = int16_t(int32_t(x[i] * factor + kRound - kRound));
  }
  std::fill(values + n, values + round_up(n, kTileInputs), int16_t(0));
}

const std::vector<MatrixKernels>& matrix_kernels() {
  static const std::vector<MatrixKernels> kernels = [] {
    std::vector<MatrixKernels> list = {{"baseline",
                                        {nullptr, dots<float>},
                                        {nullptr, dots<BFloat16>},
                                        {round_to_int16, dots_of_int8, 1}}};
    add_avx2_kernels(list);
    add_avx512_kernels(list);
    return list;
  }();
  return kernels;
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
  if (!next || next->is_halved || kernel_of(next->type).streams > 1) return worker.wait();
  const int64_t columns = columns_of_part(worker.team.threads(), next->outputs);
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

bool has_even_parts(int64_t threads, int64_t outputs) {
  return threads * columns_of_part(threads, outputs) == outputs;
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
    multiply_columns(worker, matrix, prepared, rows, 0, matrix.outputs, out, then, nullptr);
  }
}

void multiply_half(const Worker& worker, const Matrix& matrix, int64_t half, const float* x,
                   int64_t rows, float* sums) {
  Matrix part;
  part.outputs = matrix.outputs;
  part.inputs = inputs_of_half(matrix);
  part.type = matrix.type;
  part.weight = static_cast<const char*>(matrix.weight) + half * bytes_of_half(matrix);
  const Product product[] = {{part, sums}};
  multiply_alone(worker, product, x, rows);
}

MBLM_CLONES void add_halves(const Matrix& matrix, const float* first, const float* second,
                            int64_t rows, float* out, const float* residual) {
  const int64_t outputs = matrix.outputs;
  for (int64_t at = 0; at < rows * outputs; at += outputs) {
    for (int64_t begin = 0; begin < outputs; begin += kMaxBlock) {
      const int64_t count = std::min(kMaxBlock, outputs - begin), from = at + begin;
      float values[kMaxBlock];
      for (int64_t i = 0; i < count; ++i) values[i] = first[from + i] + second[from + i];
      finish_values(matrix, begin, count, values, out + at, residual ? residual + at : nullptr);
    }
  }
}

}  // namespace mblm::cpu
