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

// Bytes of weights that a thread takes at a time: as long streams as leave even shares.
constexpr int64_t kFewestPartBytes = 1 << 16, kMostPartBytes = 1 << 19, kPartsPerThread = 2;
// Bytes of weights that stay in the first cache while all rows are multiplied with them.
constexpr int64_t kBlockBytes = 1 << 14;
constexpr int64_t kMaxBlock = 64;

template <class W>
void dots(const void* weight, const float* x, int64_t n, float* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = dot<float>(x, static_cast<const W*>(weight) + i * n, n);
  }
}

void dots_of_int8(const void* weights, const float* prepared, int64_t n, float* sums,
                  int64_t count) {
  const int16_t* x = int16_values(prepared);
  const int8_t* weight = static_cast<const int8_t*>(weights);
  for (int64_t row = 0; row < count; ++row, weight += n) {
    int64_t sum = 0;
    for (int64_t begin = 0; begin < n; begin += kColumnsPerInt32) {
      const int64_t end = std::min(begin + kColumnsPerInt32, n);
      int32_t part = 0;
      for (int64_t i = begin; i < end; ++i) part += int32_t(x[i]) * weight[i];
      sum += part;
    }
    sums[row] = float(sum) * prepared[0];
  }
}

MBLM_CLONES void apply_gelu(float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = gelu(values[i]);
}

int64_t bytes_of(WeightType type) {
  return type == WeightType::kFloat32 ? 4 : type == WeightType::kBFloat16 ? 2 : 1;
}

// The rows as the kernel wants them. Every thread has its own, which is quicker than to wait.
const float* prepare_rows(const Worker& worker, const Kernel& kernel, const float* x, int64_t rows,
                          int64_t inputs) {
  const int64_t stride = kPreparedHeader + inputs;
  worker.prepared.resize(std::max<size_t>(worker.prepared.size(), rows * stride));
  for (int64_t row = 0; row < rows; ++row) {
    kernel.prepare(x + row * inputs, inputs, worker.prepared.data() + row * stride);
  }
  return worker.prepared.data();
}

const Kernel& kernel_of(WeightType type) {
  static const MatrixKernels& best = matrix_kernels().front();
  return type == WeightType::kFloat32    ? best.float32
         : type == WeightType::kBFloat16 ? best.bfloat16
                                         : best.int8;
}

}  // namespace

MBLM_CLONES void round_to_int16(const float* x, int64_t n, float* prepared) {
  // The bits of numbers without sign are in the numbers' order, infinity and NaN last.
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  }
  const bool is_finite = largest < 0x7f800000u;
  const float scale = std::bit_cast<float>(largest) / 32767;
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
}

const std::vector<MatrixKernels>& matrix_kernels() {
  static const std::vector<MatrixKernels> kernels = [] {
    std::vector<MatrixKernels> list = {{"baseline",
                                        {nullptr, dots<float>},
                                        {nullptr, dots<BFloat16>},
                                        {round_to_int16, dots_of_int8}}};
    add_avx2_kernels(list);
    add_avx512_kernels(list);
    return list;
  }();
  return kernels;
}

void multiply(const Worker& worker, int64_t loop, const Matrix& matrix, const float* x,
              int64_t rows, float* out, Then then, const float* residual) {
  const Kernel& kernel = kernel_of(matrix.type);
  const int64_t inputs = matrix.inputs, outputs = matrix.outputs;
  const int64_t bytes = inputs * bytes_of(matrix.type);
  int64_t stride = inputs;
  if (kernel.prepare) {
    stride = kPreparedHeader + inputs;
    x = prepare_rows(worker, kernel, x, rows, inputs);
  }
  // At least 16 columns, so that threads do not write to one cache line.
  const int64_t part_bytes = std::clamp(outputs * bytes / (kPartsPerThread * worker.team.threads()),
                                        kFewestPartBytes, kMostPartBytes);
  const int64_t part = std::max<int64_t>(16, part_bytes / std::max<int64_t>(bytes, 1) / 16 * 16);
  const int64_t block =
      rows == 1 ? kMaxBlock
                : std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(bytes, 1), 4, kMaxBlock);
  worker.team.share(loop, outputs, part, [&](int64_t begin, int64_t end) {
    float sums[kMaxBlock];
    for (int64_t first = begin; first < end; first += block) {
      const int64_t count = std::min(block, end - first);
      const char* weight = static_cast<const char*>(matrix.weight) + first * bytes;
      for (int64_t row = 0; row < rows; ++row) {
        kernel.dots(weight, x + row * stride, inputs, sums, count);
        float* to = out + row * outputs + first;
        const float* added = residual ? residual + row * outputs + first : nullptr;
        for (int64_t i = 0; i < count; ++i) {
          float value = matrix.scale ? sums[i] * matrix.scale[first + i] : sums[i];
          if (matrix.bias) value += matrix.bias[first + i];
          to[i] = added ? value + added[i] : value;
        }
        if (then == Then::kGelu) apply_gelu(to, count);
      }
    }
  });
}

}  // namespace mblm::cpu
